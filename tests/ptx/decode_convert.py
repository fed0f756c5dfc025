"""Decoding of cvt."""

from __future__ import annotations

from .decode import AWAY, FTZ, RELU, SAT, opcode
from .decode_alu import rounding

_FLOAT_CODES = {"f16": 0, "bf16": 1, "f32": 2, "f64": 3, "tf32": 4}
_INTEGRAL = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}


def _int_code(kind: str) -> int:
    return int(kind[1:]) | (kind[0] == "s") << 8


@opcode("cvt")
def cvt(d, ops, m):
    if m.take("pack"):
        return _cvt_pack(d, ops, m)
    source, to = m.type(), m.type()
    flags = FTZ if m.take("ftz") else 0
    integral = m.choice(*_INTEGRAL)
    if m.take("rna"):
        flags |= AWAY
    flags |= rounding(m)
    flags |= RELU if m.take("relu") else 0
    satfinite = m.take("satfinite")
    flags |= SAT if m.take("sat") else 0
    m.done()
    fp8 = {"e4m3x2": 0, "e5m2x2": 1}
    if to in ("f16x2", "bf16x2") and source == "f32":
        if satfinite:
            m.fail(".satfinite is not implemented here")
        code = _FLOAT_CODES[to[:-2]]
        return d.emit("cvt.pair", [d.dst(ops[0], to)], [d.src(o, "f32") for o in ops[1:3]], (code,), flags)
    if to in fp8 and source in ("f32", "f16x2") and satfinite:
        srcs = [d.src(o, source) for o in ops[1:]]
        return d.emit(f"cvt.fp8x2.{source}", [d.dst(ops[0], "b16")], srcs, (fp8[to],), flags)
    if source in fp8 and to == "f16x2":
        return d.emit("cvt.f16x2.fp8x2", [d.dst(ops[0], "b32")], [d.src(ops[1], "b16")], (fp8[source],), flags)
    if satfinite and to != "tf32":
        m.fail(".satfinite is not implemented here")
    flags |= SAT if satfinite else 0
    # a register may be wider than an integer type
    from_float, to_float = source in _FLOAT_CODES, to in _FLOAT_CODES
    if (
        (not from_float and source[0] not in "us")
        or (not to_float and to[0] not in "us")
        or source.endswith("x2")
        or to.endswith("x2")
    ):
        m.fail("not implemented")
    b = d.src(ops[1], source, wider=not from_float)
    a = d.dst(ops[0], to, wider=not to_float)
    if from_float and to_float:
        if to == "f64" and flags & 3:
            m.fail("rounding does not apply")
        mode = 0 if integral is None else _INTEGRAL[integral] + 1
        return d.emit("cvt.float.float", [a], [b], (_FLOAT_CODES[source], _FLOAT_CODES[to], mode), flags)
    if from_float:
        if integral is None:
            m.fail("a rounding to an integer is needed")
        return d.emit(
            "cvt.float.int",
            [a],
            [b],
            (_FLOAT_CODES[source], _int_code(to), _INTEGRAL[integral], a.size),
            flags & (FTZ | SAT),
        )
    if to_float:
        return d.emit("cvt.int.float", [a], [b], (_int_code(source), _FLOAT_CODES[to], b.size), flags)
    d.emit("cvt.int.int", [a], [b], (_int_code(source), _int_code(to), b.size | a.size << 8), flags)


def _cvt_pack(d, ops, m):
    if not m.take("sat"):
        m.fail(".sat is needed")
    parts = m.parts
    m.parts = []
    small = {"u16": 16, "s16": 16, "u8": 8, "s8": 8, "u4": 4, "s4": 4, "u2": 2, "s2": 2}
    if parts[0] not in small or parts[1] != "s32" or (len(parts) == 3) != (len(ops) == 4):
        m.fail("type not implemented")
    code = small[parts[0]] | (parts[0][0] == "s") << 8
    d.emit("cvt.pack", [d.dst(ops[0], "b32")], [d.src(o, "b32") for o in ops[1:]], (code,))
