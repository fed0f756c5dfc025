"""Integer arithmetic, logic and shifts against their definitions in the PTX ISA (9.7.1, 9.7.2, 9.7.8)."""

import numpy as np
import pytest

from .snippet import evaluate, from_ints, samples, to_ints
from .syntax import type_size


def width(kind):
    return 8 * type_size(kind)


def wrap(value, kind):
    """value modulo 2^width, in the range of the type."""
    bits = width(kind)
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def clamp(value, low, high):
    return min(max(value, low), high)


def check(instruction, kinds, result, reference, operands=None, target="sm_80"):
    """Runs `instruction` on samples of `kinds` and compares each lane with reference(inputs...)."""
    columns = operands or [samples(kind, seed) for seed, kind in enumerate(kinds)]
    inputs = [(kind, from_ints(column, kind)) for kind, column in zip(kinds, columns, strict=True)]
    (out,) = evaluate(instruction, inputs, [result], target=target)
    expected = [wrap(reference(*row), result) for row in zip(*columns, strict=True)]
    assert to_ints(out, result) == expected


def truncated_div(a, b):
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


ALL = ["u16", "s16", "u32", "s32", "u64", "s64"]
SIGNED = ["s16", "s32", "s64"]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("add", lambda a, b: a + b),  # 9.7.1.1
        ("sub", lambda a, b: a - b),  # 9.7.1.2
        ("mul.lo", lambda a, b: a * b),  # 9.7.1.3
        ("min", min),  # 9.7.1.12
        ("max", max),  # 9.7.1.13
    ],
)
def test_binary(name, reference, kind):
    check(f"{name}.{kind} %o0, %i0, %i1;", [kind, kind], kind, reference)


@pytest.mark.parametrize("kind", ALL)
def test_mul_hi_and_mad(kind):
    bits = width(kind)
    check(f"mul.hi.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda a, b: a * b >> bits)  # 9.7.1.3
    check(f"mad.lo.{kind} %o0, %i0, %i1, %i2;", [kind] * 3, kind, lambda a, b, c: a * b + c)  # 9.7.1.4
    check(f"mad.hi.{kind} %o0, %i0, %i1, %i2;", [kind] * 3, kind, lambda a, b, c: (a * b >> bits) + c)
    check(f"sad.{kind} %o0, %i0, %i1, %i2;", [kind] * 3, kind, lambda a, b, c: c + abs(a - b))  # 9.7.1.7


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide(kind):
    wide = f"{kind[0]}{2 * width(kind)}"
    check(f"mul.wide.{kind} %o0, %i0, %i1;", [kind] * 2, wide, lambda a, b: a * b)
    check(f"mad.wide.{kind} %o0, %i0, %i1, %i2;", [kind, kind, wide], wide, lambda a, b, c: a * b + c)


def test_saturating():
    low, high = -(1 << 31), (1 << 31) - 1
    check("add.sat.s32 %o0, %i0, %i1;", ["s32"] * 2, "s32", lambda a, b: clamp(a + b, low, high))
    check("sub.sat.s32 %o0, %i0, %i1;", ["s32"] * 2, "s32", lambda a, b: clamp(a - b, low, high))
    check("mad.hi.sat.s32 %o0, %i0, %i1, %i2;", ["s32"] * 3, "s32", lambda a, b, c: clamp((a * b >> 32) + c, low, high))
    check("min.relu.s32 %o0, %i0, %i1;", ["s32"] * 2, "s32", lambda a, b: max(min(a, b), 0), target="sm_90")
    check("max.relu.s32 %o0, %i0, %i1;", ["s32"] * 2, "s32", lambda a, b: max(a, b, 0), target="sm_90")


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_24_bit(kind):
    def low24(a):
        a &= 0xFFFFFF
        return a - (1 << 24) if kind == "s32" and a >> 23 else a

    check(f"mul24.lo.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda a, b: low24(a) * low24(b))  # 9.7.1.5
    check(f"mul24.hi.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda a, b: low24(a) * low24(b) >> 16)
    check(f"mad24.lo.{kind} %o0, %i0, %i1, %i2;", [kind] * 3, kind, lambda a, b, c: low24(a) * low24(b) + c)  # 9.7.1.6
    check(f"mad24.hi.{kind} %o0, %i0, %i1, %i2;", [kind] * 3, kind, lambda a, b, c: (low24(a) * low24(b) >> 16) + c)


@pytest.mark.parametrize("kind", ALL)
def test_division(kind):
    a = samples(kind, 0)
    b = [x or 7 for x in samples(kind, 1)]
    check(f"div.{kind} %o0, %i0, %i1;", [kind] * 2, kind, truncated_div, [a, b])  # 9.7.1.8
    check(f"rem.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda x, y: x - y * truncated_div(x, y), [a, b])  # 9.7.1.9


@pytest.mark.parametrize("kind", SIGNED)
def test_abs_and_neg(kind):
    check(f"abs.{kind} %o0, %i0;", [kind], kind, abs)  # 9.7.1.10
    check(f"neg.{kind} %o0, %i0;", [kind], kind, lambda a: -a)  # 9.7.1.11


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
def test_packed(kind):
    half = kind[:3]

    def halves(f):
        def both(a, b):
            lo = f(wrap(a, half), wrap(b, half)) & 0xFFFF
            return lo | (f(wrap(a >> 16, half), wrap(b >> 16, half)) & 0xFFFF) << 16

        return both

    for name, f in (("add", lambda a, b: a + b), ("min", min), ("max", max)):
        check(f"{name}.{kind} %o0, %i0, %i1;", ["u32"] * 2, "u32", halves(f), target="sm_90")


def bfind(a, kind, shift):
    if kind[0] == "s" and a < 0:
        a = ~a
    if a == 0:
        return 0xFFFFFFFF
    top = a.bit_length() - 1
    return width(kind) - 1 - top if shift else top


def fns(mask, base, offset):
    if offset == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    positions = range(base, 32) if offset > 0 else range(base, -1, -1)
    found = [p for p in positions if mask >> p & 1]
    return found[abs(offset) - 1] if len(found) >= abs(offset) else 0xFFFFFFFF


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits):
    kind = f"b{bits}"
    check(f"popc.{kind} %o0, %i0;", [kind], "u32", lambda a: a.bit_count())  # 9.7.1.14
    check(f"clz.{kind} %o0, %i0;", [kind], "u32", lambda a: bits - a.bit_length())  # 9.7.1.15
    check(f"brev.{kind} %o0, %i0;", [kind], kind, lambda a: int(f"{a:0{bits}b}"[::-1], 2))  # 9.7.1.18
    for sign in "us":
        t = f"{sign}{bits}"
        check(f"bfind.{t} %o0, %i0;", [t], "u32", lambda a, t=t: bfind(a, t, False))  # 9.7.1.16
        check(f"bfind.shiftamt.{t} %o0, %i0;", [t], "u32", lambda a, t=t: bfind(a, t, True))


def test_fns():
    n = 256
    rng = np.random.default_rng(0)
    columns = [samples("b32", 3), rng.integers(0, 32, n).tolist(), rng.integers(-6, 7, n).tolist()]
    check("fns.b32 %o0, %i0, %i1, %i2;", ["b32", "b32", "s32"], "b32", fns, columns)  # 9.7.1.17


def extract(a, pos, length, kind):
    """9.7.1.19: bits beyond the source read as the sign of the field."""
    bits = width(kind)
    pos, length = pos & 0xFF, length & 0xFF
    raw = a & ((1 << bits) - 1)
    sign = 0
    if kind[0] == "s" and length:
        sign = raw >> min(pos + length - 1, bits - 1) & 1
    out = 0
    for i in range(bits):
        bit = raw >> (pos + i) & 1 if i < length and pos + i < bits else sign
        out |= bit << i
    return out


def insert(a, b, pos, length, bits):
    """9.7.1.20"""
    pos, length = pos & 0xFF, length & 0xFF
    for i in range(length):
        if pos + i < bits:
            b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
    return b


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    n, bits = 256, width(kind)
    rng = np.random.default_rng(1)
    pos, length = rng.integers(0, bits + 8, n).tolist(), rng.integers(0, bits + 8, n).tolist()
    a, b = samples(kind, 0), samples(f"b{bits}", 1)
    check(
        f"bfe.{kind} %o0, %i0, %i1, %i2;",
        [kind, "u32", "u32"],
        kind,
        lambda x, p, q: extract(x, p, q, kind),
        [a, pos, length],
    )
    raw = [x & ((1 << bits) - 1) for x in a]
    t = f"b{bits}"
    check(
        f"bfi.{t} %o0, %i0, %i1, %i2, %i3;", [t, t, "u32", "u32"], t, lambda *v: insert(*v, bits), [raw, b, pos, length]
    )


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_szext_and_bmsk(mode):
    n = 256
    rng = np.random.default_rng(2)
    count = rng.integers(0, 70, n).tolist()
    start = rng.integers(0, 70, n).tolist()

    def limit(x):
        return min(x, 32) if mode == "clamp" else x % 32

    def szext(a, c, signed):
        c = limit(c)
        value = a & ((1 << c) - 1)
        return value - (1 << c) if signed and c and value >> (c - 1) else value

    check(
        f"szext.{mode}.u32 %o0, %i0, %i1;",
        ["u32", "u32"],
        "u32",
        lambda a, c: szext(a, c, False),
        [samples("u32", 0), count],
    )  # 9.7.1.21
    check(
        f"szext.{mode}.s32 %o0, %i0, %i1;",
        ["s32", "u32"],
        "s32",
        lambda a, c: szext(a, c, True),
        [samples("s32", 0), count],
    )
    mask = lambda p, c: ((1 << limit(c)) - 1) << limit(p)  # noqa: E731
    check(f"bmsk.{mode}.b32 %o0, %i0, %i1;", ["u32", "u32"], "b32", mask, [start, count])  # 9.7.1.22


@pytest.mark.parametrize("a_kind", ["u32", "s32"])
@pytest.mark.parametrize("b_kind", ["u32", "s32"])
def test_dot_products(a_kind, b_kind):
    def part(value, index, bits, kind):
        value = value >> (bits * index) & ((1 << bits) - 1)
        return value - (1 << bits) if kind == "s32" and value >> (bits - 1) else value

    def dp4a(a, b, c):
        return c + sum(part(a, i, 8, a_kind) * part(b, i, 8, b_kind) for i in range(4))

    signed = "s32" if "s32" in (a_kind, b_kind) else "u32"
    kinds = [a_kind, b_kind, signed]
    check(f"dp4a.{a_kind}.{b_kind} %o0, %i0, %i1, %i2;", kinds, signed, dp4a)  # 9.7.1.23
    for high in (False, True):
        ref = lambda a, b, c, h=high: c + sum(part(a, i, 16, a_kind) * part(b, i + 2 * h, 8, b_kind) for i in range(2))  # noqa: E731
        check(f"dp2a.{'hi' if high else 'lo'}.{a_kind}.{b_kind} %o0, %i0, %i1, %i2;", kinds, signed, ref)  # 9.7.1.24


@pytest.mark.parametrize("bits", [32, 64])
def test_extended_precision(bits):
    """9.7.2: chains through the condition code give the sums, differences and products of double width."""
    kind = f"u{bits}"
    columns = [samples(kind, seed) for seed in range(4)]
    inputs = [(kind, from_ints(c, kind)) for c in columns]
    mask = (1 << bits) - 1

    def run(body):
        low, high = evaluate(body, inputs, [kind, kind])
        return [x | y << bits for x, y in zip(to_ints(low, kind), to_ints(high, kind), strict=True)]

    pairs = [(a | b << bits, c | d << bits) for a, b, c, d in zip(*columns, strict=True)]
    added = run(f"add.cc.{kind} %o0, %i0, %i2; addc.{kind} %o1, %i1, %i3;")
    assert added == [(x + y) & (mask << bits | mask) for x, y in pairs]
    subtracted = run(f"sub.cc.{kind} %o0, %i0, %i2; subc.{kind} %o1, %i1, %i3;")
    assert subtracted == [(x - y) & (mask << bits | mask) for x, y in pairs]
    product = run(f"mad.lo.cc.{kind} %o0, %i0, %i1, %i2; madc.hi.{kind} %o1, %i0, %i1, %i3;")
    assert product == [(a * b + c + (d << bits)) & (mask << bits | mask) for a, b, c, d in zip(*columns, strict=True)]
    # carry out of a middle link
    chained = run(f"add.cc.{kind} %o0, %i0, %i1; addc.cc.{kind} %o0, %i2, %i3; addc.{kind} %o1, 0, 0;")
    assert chained == [
        (s := (c + d + ((a + b) >> bits))) & mask | (s >> bits) << bits for a, b, c, d in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    kind = f"b{bits}"
    check(f"and.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda a, b: a & b)  # 9.7.8.1
    check(f"or.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda a, b: a | b)  # 9.7.8.2
    check(f"xor.{kind} %o0, %i0, %i1;", [kind] * 2, kind, lambda a, b: a ^ b)  # 9.7.8.3
    check(f"not.{kind} %o0, %i0;", [kind], kind, lambda a: ~a)  # 9.7.8.4
    check(f"cnot.{kind} %o0, %i0;", [kind], kind, lambda a: int(a == 0))  # 9.7.8.5


def test_predicate_logic():
    n = 64
    rng = np.random.default_rng(3)
    p, q = (rng.integers(0, 2, n).tolist() for _ in range(2))
    for name, f in (("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)):
        check(f"{name}.pred %o0, %i0, %i1;", ["pred"] * 2, "pred", f, [p, q])
    check("not.pred %o0, %i0;", ["pred"], "pred", lambda a: 1 - a, [p])


@pytest.mark.parametrize("lut", [0x00, 0x80, 0xF8, 0x96, 0xE8, 0x1B, 0xFF])
def test_lop3(lut):
    def reference(a, b, c):
        out = 0
        for i in range(32):
            out |= (lut >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
        return out

    check(f"lop3.b32 %o0, %i0, %i1, %i2, {lut};", ["b32"] * 3, "b32", reference)  # 9.7.8.6
    body = f".reg .pred %z; setp.ne.b32 %z, %i2, 0; lop3.or.b32 %t3|%o0, %i0, %i1, %i2, {lut}, %z;"
    check(body, ["b32"] * 3, "pred", lambda a, b, c: int(reference(a, b, c) != 0 or c != 0))


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(mode):
    n = 256
    amount = np.random.default_rng(4).integers(0, 70, n).tolist()
    columns = [samples("b32", 0), samples("b32", 1), amount]

    def count(c):
        return min(c, 32) if mode == "clamp" else c % 32

    check(
        f"shf.l.{mode}.b32 %o0, %i0, %i1, %i2;",
        ["b32", "b32", "u32"],
        "b32",
        lambda a, b, c: ((b << 32 | a) << count(c)) >> 32,
        columns,
    )  # 9.7.8.7
    check(
        f"shf.r.{mode}.b32 %o0, %i0, %i1, %i2;",
        ["b32", "b32", "u32"],
        "b32",
        lambda a, b, c: (b << 32 | a) >> count(c),
        columns,
    )


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    n = 256
    amount = np.random.default_rng(5).integers(0, 80, n).tolist()
    t = f"b{bits}"
    check(f"shl.{t} %o0, %i0, %i1;", [t, "u32"], t, lambda a, c: a << min(c, bits), [samples(t, 0), amount])  # 9.7.8.8
    for kind in (f"u{bits}", f"s{bits}", t):
        check(
            f"shr.{kind} %o0, %i0, %i1;",
            [kind, "u32"],
            kind,
            lambda a, c: a >> min(c, bits),
            [samples(kind, 0), amount],
        )  # 9.7.8.9


def test_prmt():
    """9.7.9, prmt: the generic mode with sign replication, and the six named modes."""
    n = 256
    rng = np.random.default_rng(6)
    select = rng.integers(0, 1 << 16, n).tolist()

    def byte(a, b, i):
        return (b << 32 | a) >> (8 * (i & 7)) & 0xFF

    def generic(a, b, c):
        out = 0
        for i in range(4):
            s = c >> (4 * i) & 0xF
            v = byte(a, b, s)
            if s & 8:
                v = 0xFF if v & 0x80 else 0
            out |= v << (8 * i)
        return out

    columns = [samples("b32", 0), samples("b32", 1), select]
    check("prmt.b32 %o0, %i0, %i1, %i2;", ["b32"] * 3, "b32", generic, columns)
    tables = {
        "f4e": ["3210", "4321", "5432", "6543"],
        "b4e": ["5670", "6701", "7012", "0123"],
        "rc8": ["0000", "1111", "2222", "3333"],
        "ecl": ["3210", "3211", "3222", "3333"],
        "ecr": ["0000", "1110", "2210", "3210"],
        "rc16": ["1010", "3232", "1010", "3232"],
    }
    for mode, rows in tables.items():
        ref = lambda a, b, c, rows=rows: sum(byte(a, b, int(rows[c & 3][3 - i])) << (8 * i) for i in range(4))  # noqa: E731
        check(f"prmt.b32.{mode} %o0, %i0, %i1, %i2;", ["b32"] * 3, "b32", ref, columns)
