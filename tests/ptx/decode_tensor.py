"""Decoding of matrix operations of a warp: mma, wmma, ldmatrix, stmatrix, movmatrix."""

from __future__ import annotations

import re

from . import syntax as ast
from .decode import ASYNC, CUSTOM, STRICT, opcode
from .decode_memory import address, semantics, space, touch

ELEMENTS = {
    "f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6, "s4": 7, "u4": 8, "f64": 9, "f32": 10,
    "s32": 11,
}  # fmt: skip
BITS = {
    "f16": 16,
    "bf16": 16,
    "tf32": 32,
    "e4m3": 8,
    "e5m2": 8,
    "s8": 8,
    "u8": 8,
    "s4": 4,
    "u4": 4,
    "f64": 64,
    "f32": 32,
    "s32": 32,
}

# shape -> operand types, and accumulator types, that the ISA gives for it
_MMA = {
    "m16n8k8": ({"f16", "bf16", "tf32"}, {"f16", "f32"}), "m16n8k16": ({"f16", "bf16", "s8", "u8", "e4m3",
    "e5m2"}, {"f16", "f32", "s32"}),
    "m16n8k4": ({"tf32"}, {"f32"}), "m16n8k32": ({"s8", "u8", "s4", "u4", "e4m3", "e5m2"}, {"f16", "f32", "s32"}),
    "m16n8k64": ({"s4", "u4"}, {"s32"}),
}  # fmt: skip


def _shape(m) -> tuple[str, int, int, int]:
    for part in m.parts:
        found = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part)
        if found:
            m.parts.remove(part)
            return part, *map(int, found.groups())
    m.fail("no shape")


def _types(m, count: int) -> list[str]:
    found = m.parts[-count:]
    del m.parts[-count:]
    for kind in found:
        if kind not in ELEMENTS:
            m.fail(f"type .{kind} is not implemented")
    return found


def _items(d, op, count: int):
    items = op.items if isinstance(op, ast.Vec) else (op,)
    if len(items) != count:
        d.fail(f"a fragment of {count} registers is needed, {len(items)} found")
    return items


@opcode("mma")
def mma(d, ops, m):
    for word in ("sync", "aligned"):
        m.need(word)
    name, rows, cols, k = _shape(m)
    dt, at, bt, ct = _types(m, 4)
    m.need("row")
    m.need("col")
    sat = m.take("satfinite")
    m.done()
    if at == "f64":
        if bt != "f64" or dt != "f64" or ct != "f64" or name not in ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"):
            m.fail("not implemented")
        counts, kinds = (rows // 4, rows // 8 * (k // 4), k // 4, rows // 4), ("f64",) * 4
    else:
        if name not in _MMA or at not in _MMA[name][0] or dt not in _MMA[name][1] or ct != dt:
            m.fail("not implemented")
        if (dt == "s32") != (at in ("s8", "u8", "s4", "u4")) or BITS[bt] != BITS[at] or (BITS[at] >= 16 and at != bt):
            m.fail("not implemented")
        if at in ("bf16", "tf32") and dt != "f32":
            m.fail("not implemented")
        acc, acc_kind = (2, "b32") if dt == "f16" else (4, "b32")
        counts = (acc, rows * k * BITS[at] // 1024, k * cols * BITS[bt] // 1024, acc)
        kinds = (acc_kind, "b32", "b32", acc_kind)
    operands = [_items(d, op, n) for op, n in zip(ops, counts, strict=True)]
    dsts = [d.dst(o, kinds[0]) for o in operands[0]]
    srcs = [d.src(o, kind) for items, kind in zip(operands[1:], kinds[1:], strict=True) for o in items]
    imm = (ELEMENTS[at], ELEMENTS[bt], ELEMENTS[dt], rows | k << 8 | sat << 16)
    d.emit("mma", dsts, srcs, imm, policy=CUSTOM)


def _matrix_mods(m) -> tuple[int, bool, str]:
    m.need("sync")
    m.need("aligned")
    m.need("m8n8")
    count = int(m.need("x1", "x2", "x4")[1:])
    trans = m.take("trans")
    where = space(m)
    m.need("b16")
    m.done()
    return count, trans, where


@opcode("ldmatrix")
def ldmatrix(d, ops, m):
    count, trans, where = _matrix_mods(m)
    base, offset, size = address(d, ops[1])
    dsts = [d.dst(o, "b32") for o in _items(d, ops[0], count)]
    touch(d, where, 16)
    d.emit("ldmatrix", dsts, [base], (offset, trans, 0, size), semantics(where), CUSTOM)


@opcode("stmatrix")
def stmatrix(d, ops, m):
    count, trans, where = _matrix_mods(m)
    base, offset, size = address(d, ops[0])
    srcs = [d.src(o, "b32") for o in _items(d, ops[1], count)]
    touch(d, where, 16)
    d.emit("stmatrix", (), [base, *srcs], (offset, trans, 0, size), semantics(where), CUSTOM)


@opcode("movmatrix")
def movmatrix(d, ops, m):
    for word in ("sync", "aligned", "m8n8", "trans", "b16"):
        m.need(word)
    m.done()
    d.emit("movmatrix", [d.dst(ops[0], "b32")], [d.src(ops[1], "b32")], policy=STRICT)


# registers of a wmma fragment: (matrix, type) -> count; accumulators by type
_WMMA_SHAPES = {
    "m16n16k16": {"f16": (8, 8), "bf16": (4, 4), "s8": (2, 2), "u8": (2, 2)},
    "m8n32k16": {"f16": (8, 8), "bf16": (2, 8), "s8": (1, 4), "u8": (1, 4)},
    "m32n8k16": {"f16": (8, 8), "bf16": (8, 2), "s8": (4, 1), "u8": (4, 1)},
    "m16n16k8": {"tf32": (4, 4)},
    "m8n8k4": {"f64": (1, 1)},
}


def _wmma_registers(m, name: str, matrix: str, kind: str) -> int:
    if name not in _WMMA_SHAPES:
        m.fail(f"shape .{name} is not implemented")
    if matrix in "ab":
        if kind not in _WMMA_SHAPES[name]:
            m.fail("not implemented")
        return _WMMA_SHAPES[name][kind]["ab".index(matrix)]
    counts = {"f16": 4, "f32": 8, "s32": 8, "f64": 2}
    if kind not in counts:
        m.fail("not implemented")
    return counts[kind]


@opcode("wmma")
def wmma(d, ops, m):
    what = m.need("load", "store", "mma")
    if what == "mma":
        return _wmma_mma(d, ops, m)
    matrix = m.need("a", "b", "c", "d")
    m.need("sync")
    m.need("aligned")
    column = m.need("row", "col") == "col"
    name, rows, cols, k = _shape(m)
    where = space(m)
    (kind,) = _types(m, 1)
    m.done()
    count = _wmma_registers(m, name, matrix, kind)
    shape = {"a": (rows, k), "b": (k, cols)}.get(matrix, (rows, cols))
    register = "f64" if kind == "f64" else "b32"
    fragment, place = (ops[0], ops[1]) if what == "load" else (ops[1], ops[0])
    base, offset, size = address(d, place)
    stride = [d.src(ops[2], "u32")] if len(ops) > 2 else []
    code = shape[0] | shape[1] << 8 | ELEMENTS[kind] << 16 | column << 24
    items = _items(d, fragment, count)
    touch(d, where, max(BITS[kind] // 8, 1))
    imm = (offset, code, bool(stride), size)
    if what == "load":
        return d.emit("wmma.load", [d.dst(o, register) for o in items], [base, *stride], imm, semantics(where), STRICT)
    d.emit("wmma.store", (), [base, *stride, *(d.src(o, register) for o in items)], imm, semantics(where), STRICT)


def _wmma_mma(d, ops, m):
    m.need("sync")
    m.need("aligned")
    m.need("row", "col")
    m.need("row", "col")  # the layouts decided how the fragments were loaded
    name, rows, cols, k = _shape(m)
    if m.choice("rn", "rz", "rm", "rp", default="rn") != "rn":
        m.fail("rounding not implemented")
    sat = m.take("satfinite")
    known = [p for p in m.parts if p in ELEMENTS]
    # f16 operands leave their type out: .d.c only
    if len(known) == 2:
        (dt, ct), (at, bt) = _types(m, 2), ("f16", "f16")
    else:
        dt, at, bt, ct = _types(m, 4)
    m.done()
    na, nb = _wmma_registers(m, name, "a", at), _wmma_registers(m, name, "b", bt)
    nc, nd = _wmma_registers(m, name, "c", ct), _wmma_registers(m, name, "d", dt)
    register = "f64" if at == "f64" else "b32"
    dsts = [d.dst(o, register) for o in _items(d, ops[0], nd)]
    srcs = [d.src(o, register) for op, n in zip(ops[1:], (na, nb, nc), strict=True) for o in _items(d, op, n)]
    types = ELEMENTS[at] | ELEMENTS[bt] << 8 | ELEMENTS[ct] << 16 | ELEMENTS[dt] << 24
    d.emit("wmma.mma", dsts, srcs, (rows | cols << 8 | k << 16, types, na | nb << 8 | nc << 16, sat), policy=STRICT)


# types of a and b -> k of the shape, and accumulators
_WGMMA = {
    ("f16", "f16"): (16, ("f16", "f32")), ("bf16", "bf16"): (16, ("f32",)), ("tf32", "tf32"): (8, ("f32",)),
    **{(a, b): (32, ("f16", "f32")) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")},
    **{(a, b): (32, ("s32",)) for a in ("s8", "u8") for b in ("s8", "u8")},
}  # fmt: skip


@opcode("wgmma")
def wgmma(d, ops, m):
    d.uses_async = d.uses_wgmma = True
    what = m.need("mma_async", "fence", "commit_group", "wait_group")
    m.need("sync")
    m.need("aligned")
    if what != "mma_async":
        m.done()
        key = {"fence": "wgmma.fence", "commit_group": "wgmma.commit", "wait_group": "wgmma.wait"}[what]
        imm = (int(ops[0].value),) if what == "wait_group" else ()
        return d.emit(key, imm=imm, flags=ASYNC)
    if m.take("sp"):
        m.fail("sparse operands are not implemented")
    _, rows, n, k = _shape(m)
    dt, at, bt = _types(m, 3)
    sat = m.take("satfinite")
    m.done()
    if (
        (at, bt) not in _WGMMA
        or _WGMMA[at, bt][0] != k
        or dt not in _WGMMA[at, bt][1]
        or rows != 64
        or n % 8
        or not 8 <= n <= 256
    ):
        m.fail("not implemented")
    acc = _items(d, ops[0], n // 4 if dt == "f16" else n // 2)
    in_registers = isinstance(ops[1], ast.Vec)
    a = [d.src(o, "b32") for o in _items(d, ops[1], 4)] if in_registers else [d.src(ops[1], "b64")]
    rest = list(ops[4:])
    scale = d.src(ops[3], "pred") if len(ops) > 3 else d.src(ast.Imm(1), "pred")
    values = [int(o.value) for o in rest]
    negate_a, negate_b = (v == -1 for v in values[:2]) if values else (False, False)
    trans = values[2:]
    trans_a = trans_b = 0
    if trans:
        (trans_a, trans_b) = (0, trans[0]) if in_registers else trans
    options = in_registers | trans_a << 1 | trans_b << 2 | negate_a << 3 | negate_b << 4 | sat << 5
    registers = [d.dst(o, "b32") for o in acc]
    types = ELEMENTS[at] | ELEMENTS[bt] << 8 | ELEMENTS[dt] << 16
    srcs = [*registers, *a, d.src(ops[2], "b64"), scale]
    d.emit("wgmma.mma_async", registers, srcs, (n | k << 16, types, options), ASYNC, CUSTOM)
