"""Decoding of asynchronous copies and mbarriers."""

from __future__ import annotations

from . import syntax as ast
from .decode import STRICT, Decoder, opcode
from .decode_memory import SCOPES, address, drop_cache_hint, semantics, space, touch

_REDUCTIONS = ("none", "add", "min", "max", "and", "or", "xor")
# element types of reductions, numbered as those of tensor maps
_BULK_TYPES = {"u32": 2, "b32": 2, "s32": 3, "u64": 4, "b64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 9, "bf16": 10}


def _bulk(d: Decoder, ops, m, reduction: str):
    """cp.async.bulk and cp.reduce.async.bulk, linear and by tensor map."""
    if m.take("commit_group"):
        m.done()
        return d.emit("bulk.commit")
    if m.take("wait_group"):
        reads_only = m.take("read")
        m.done()
        return d.emit("bulk.wait", imm=(_count(d, ops[0]), reads_only))
    if m.take("prefetch"):
        return d.emit("nop")
    ops = list(drop_cache_hint(d, m, ops))
    tensor = m.take("tensor")
    rank = int(m.need("1d", "2d", "3d", "4d", "5d")[0]) if tensor else 0
    m.take("tile")
    if m.take("multicast::cluster"):
        m.fail("thread block clusters are not implemented")
    load = m.parts[0].startswith("shared")
    for words in (("shared::cta", "shared::cluster"), ("global",))[:: 1 if load else -1]:
        m.need(*words)
    m.need("mbarrier::complete_tx::bytes" if load else "bulk_group")
    touch(d, "global", 1)
    if tensor:
        if reduction != "none" and load:
            m.fail("not implemented")
        m.done()
        mapped, shared = (ops[1], ops[0]) if load else (ops[0], ops[1])
        if len(mapped.coords) != rank:
            d.fail(f"{rank} coordinates are needed")
        coords = [d.src(o, "s32") for o in mapped.coords]
        plain = ast.Addr(mapped.base, mapped.offset)
        parts = [address(d, o) for o in ((shared, plain, ops[2]) if load else (plain, shared))]
        sizes = sum(size << 8 * k for k, (_, _, size) in enumerate(parts)) | rank << 24
        offsets = [offset for _, offset, _ in parts]
        imm = (*offsets, sizes) if load else (*offsets, _REDUCTIONS.index(reduction), sizes)
        return d.emit(
            f"bulk.tensor.{'load' if load else 'store'}", (), [*(base for base, _, _ in parts), *coords], imm, 0, STRICT
        )
    code = _REDUCTIONS.index(reduction)
    if reduction != "none":
        m.take("noftz")
        kind = m.type()
        if kind not in _BULK_TYPES:
            m.fail("type not implemented")
        code |= _BULK_TYPES[kind] << 8
    m.done()
    parts = [address(d, ops[0]), address(d, ops[1])]
    if load:
        parts.append(address(d, ops[3]))
    srcs = [parts[0][0], parts[1][0], d.src(ops[2], "u32"), *(p[0] for p in parts[2:])]
    sizes = parts[0][2] | parts[1][2] << 8 | (parts[2][2] << 24 if load else 0)
    third = parts[2][1] if load else code
    d.emit(f"bulk.{'load' if load else 'store'}", (), srcs, (parts[0][1], parts[1][1], third, sizes), 0, STRICT)


@opcode("cp")
def cp(d: Decoder, ops, m):
    if m.take("reduce"):
        m.need("async")
        m.need("bulk")
        d.uses_async = True
        return _bulk(d, ops, m, m.need(*_REDUCTIONS[1:]))
    if not m.take("async"):
        m.fail("not implemented")
    d.uses_async = True
    if m.take("bulk"):
        return _bulk(d, ops, m, "none")
    if m.take("commit_group"):
        m.done()
        return d.emit("cp.async.commit")
    if m.take("wait_all"):
        m.done()
        return d.emit("cp.async.wait_all")
    if m.take("wait_group"):
        m.done()
        return d.emit("cp.async.wait", imm=(_count(d, ops[0]),))
    if m.take("mbarrier"):
        m.need("arrive")
        noinc = m.take("noinc")
        where = space(m)
        m.need("b64")
        m.done()
        base, offset, size = address(d, ops[0])
        return d.emit("cp.async.mbarrier.arrive", (), [base], (offset, noinc, 0, size), semantics(where), STRICT)
    m.need("ca", "cg")
    ops = drop_cache_hint(d, m, ops)
    m.need("shared", "shared::cta")
    m.need("global")
    m.choice("L2::64B", "L2::128B", "L2::256B")
    m.done()
    to, to_offset, to_size = address(d, ops[0])
    source, source_offset, source_size = address(d, ops[1])
    nbytes = _count(d, ops[2])
    if nbytes not in (4, 8, 16):
        d.fail(f"a copy of {nbytes} bytes")
    srcs, third = [to, source], 0
    if len(ops) > 3:
        third = 2 if isinstance(ops[3], ast.Reg) and ops[3].type == "pred" else 1
        srcs.append(d.src(ops[3], "pred" if third == 2 else "u32"))
    touch(d, "shared", nbytes)
    touch(d, "global", 4)
    d.emit(
        "cp.async", (), srcs, (to_offset, source_offset, nbytes | third << 8, to_size | source_size << 8), policy=STRICT
    )


def _count(d: Decoder, op) -> int:
    if not isinstance(op, ast.Imm):
        d.fail("an immediate is needed")
    return int(op.value)


@opcode("mbarrier")
def mbarrier(d: Decoder, ops, m):
    d.uses_async = True
    what = m.need("init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait")
    expect = what == "arrive" and m.take("expect_tx")
    incomplete = m.take("noComplete")
    parity = m.take("parity")
    m.choice("release", "acquire", "relaxed")
    m.choice(*SCOPES)
    where = space(m)
    m.need("b64")
    m.done()
    ops = list(ops)
    dsts = []
    if what in ("arrive", "arrive_drop") and not isinstance(ops[0], ast.Addr):
        dsts = [d.dst(ops.pop(0), "b64")]
    if what in ("test_wait", "try_wait"):
        dsts = [d.dst(ops.pop(0), "pred")]
    base, offset, size = address(d, ops[0])
    flags = semantics(where)
    touch(d, "shared", 8)
    if what in ("init", "inval"):
        return d.emit(
            f"mbarrier.{what}", (), [base, *(d.src(o, "u32") for o in ops[1:])], (offset, 0, 0, size), flags, STRICT
        )
    if what in ("test_wait", "try_wait"):
        # a third operand is a time limit, which only bounds how long the hardware may suspend the thread
        state = d.src(ops[1], "u32" if parity else "b64")
        return d.emit("mbarrier.wait", dsts, [base, state], (offset, parity, 0, size), flags, STRICT)
    code = {"arrive": 5 if incomplete else 1 if expect else 0, "expect_tx": 2, "complete_tx": 3, "arrive_drop": 4}[what]
    if what == "arrive_drop" and incomplete:
        m.fail(".noComplete is not implemented")
    values = [d.src(o, "u32") for o in ops[1:]]
    d.emit("mbarrier.arrive", dsts, [base, *values], (offset, code, bool(values), size), flags, STRICT)


# field -> byte in the engine's tensor map, bytes of the field, whether an ordinal selects one of several
_MAP_FIELDS = {
    "global_address": (0, 8, False), "rank": (8, 1, False), "elemtype": (9, 1, False), "interleave_layout": (10, 1,
    False),
    "swizzle_mode": (11, 1, False), "fill_mode": (12, 1, False), "box_dim": (16, 4, True), "global_dim": (36, 4, True),
    "element_stride": (56, 4, True), "global_stride": (80, 8, True),
}  # fmt: skip


@opcode("tensormap")
def tensormap(d: Decoder, ops, m):
    d.uses_async = True
    if m.take("cp_fenceproxy"):
        for word in ("global", "shared::cta", "tensormap::generic", "release"):
            m.need(word)
        scope = m.need(*SCOPES)
        m.need("sync")
        m.need("aligned")
        m.done()
        to, to_offset, to_size = address(d, ops[0])
        source, offset, size = address(d, ops[1])
        if _count(d, ops[2]) != 128:
            d.fail("a tensor map has 128 bytes")
        flags = semantics("generic", "release", scope)
        return d.emit("tensormap.copy", (), [to, source], (to_offset, offset, 0, to_size | size << 8), flags, STRICT)
    m.need("replace")
    m.need("tile")
    field = m.need(*_MAP_FIELDS)
    where = space(m)
    m.need("b1024")
    kind = m.need("b32", "b64")
    m.done()
    at, nbytes, ordinal = _MAP_FIELDS[field]
    base, offset, size = address(d, ops[0])
    if ordinal:
        at += nbytes * _count(d, ops[1])
    touch(d, where, nbytes)
    d.emit("tensormap.replace", (), [base, d.src(ops[-1], kind)], (offset, at, nbytes, size), semantics(where), STRICT)
