"""Decoding of asynchronous copies and mbarriers."""

from __future__ import annotations

from . import parser as ast
from .decode import STRICT, Decoder, opcode
from .decode_memory import SCOPES, _cache_hint, _touch, address, semantics, space


@opcode("cp")
def cp(d: Decoder, ops, m):
    if not m.take("async"):
        m.fail("not implemented")
    d.uses_async = True
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
    ops = _cache_hint(d, m, ops)
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
    _touch(d, "shared", nbytes)
    _touch(d, "global", 4)
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
    _touch(d, "shared", 8)
    if what in ("init", "inval"):
        return d.emit(
            f"mbarrier.{what}", (), [base, *(d.src(o, "u32") for o in ops[1:])], (offset, 0, 0, size), flags, STRICT
        )
    if what in ("test_wait", "try_wait"):
        # a third operand is a time limit, which only bounds how long the hardware may suspend the thread
        state = d.src(ops[1], "u32" if parity else "b64")
        return d.emit("mbarrier.wait", dsts, [base, state], (offset, parity, what == "try_wait", size), flags, STRICT)
    code = {"arrive": 5 if incomplete else 1 if expect else 0, "expect_tx": 2, "complete_tx": 3, "arrive_drop": 4}[what]
    if what == "arrive_drop" and incomplete:
        m.fail(".noComplete is not implemented")
    values = [d.src(o, "u32") for o in ops[1:]]
    d.emit("mbarrier.arrive", dsts, [base, *values], (offset, code, bool(values), size), flags, STRICT)
