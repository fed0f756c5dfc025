"""cvt, comparison, selection and mov (9.7.6, 9.7.7, 9.7.9)."""

import math
from fractions import Fraction

import pytest
import torch

from .rounding import FORMATS, round_fraction
from .snippet import TORCH, evaluate, from_ints, samples, to_ints
from .test_float import numbers
from .test_integer import clamp, width, wrap

INTS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


def bounds(kind):
    bits = width(kind)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def register(kind):
    """Registers have 16 bits at least."""
    return kind if width(kind) > 8 else f"{kind[0]}16"


@pytest.mark.parametrize("source", INTS)
@pytest.mark.parametrize("to", INTS)
def test_int_to_int(source, to):
    values = samples(source, 0)
    x = from_ints(values, register(source))
    plain, saturated = evaluate(
        f"cvt.{to}.{source} %o0, %i0; cvt.sat.{to}.{source} %o1, %i0;", [(register(source), x)], [register(to)] * 2
    )
    assert to_ints(plain, register(to)) == [wrap(wrap(v, to), register(to)) for v in values]
    assert to_ints(saturated, register(to)) == [clamp(v, *bounds(to)) for v in values]


@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_int(source, to, mode):
    x = numbers(source, 0)
    x[-6:] = torch.tensor([0.5, 1.5, 2.5, -0.5, math.inf, -math.inf], dtype=TORCH[source])
    (out,) = evaluate(f"cvt.{mode}.{to}.{source} %o0, %i0;", [(source, x)], [to])
    low, high = bounds(to)
    rounders = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for v, got in zip(x.double().tolist(), to_ints(out, to), strict=True):
        want = (high if v > 0 else low) if math.isinf(v) else clamp(rounders[mode](v), low, high)
        assert got == want, v


def test_nan_to_int():
    nan = torch.full((32,), math.nan)
    out = evaluate(
        "cvt.rni.s32.f32 %o0, %i0; cvt.rni.u16.f32 %o1, %i0; cvt.rni.s64.f32 %o2, %i0; cvt.rni.u32.f64 %o3, %i1;",
        [("f32", nan), ("f64", nan.double())],
        ["s32", "u16", "s64", "u32"],
    )
    assert [o[0].item() for o in out] == [0, 0, -(1 << 63), 1 << 31]


@pytest.mark.parametrize("source", INTS)
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_int_to_float(source, to, mode):
    values = samples(source, 1)
    x = from_ints(values, register(source))
    (out,) = evaluate(f"cvt.{mode}.{to}.{source} %o0, %i0;", [(register(source), x)], [to], target="sm_90")
    want = [round_fraction(Fraction(v), FORMATS[to], mode) for v in values]
    assert out.double().tolist() == want


def is_exact(to, source):
    return FORMATS[to].precision >= FORMATS[source].precision and FORMATS[to].emax >= FORMATS[source].emax


FLOATS = ["f16", "bf16", "f32", "f64"]
CONVERSIONS = [
    (s, t, m) for s in FLOATS for t in FLOATS for m in ("rn", "rz", "rm", "rp") if s != t and not is_exact(t, s)
]
CONVERSIONS += [(s, t, None) for s in FLOATS for t in FLOATS if s != t and is_exact(t, s)]


@pytest.mark.parametrize(("source", "to", "mode"), CONVERSIONS)
def test_float_to_float(source, to, mode):
    x = numbers(source, 0)
    modifier = f".{mode}" if mode else ""
    (out,) = evaluate(f"cvt{modifier}.{to}.{source} %o0, %i0;", [(source, x)], [to], target="sm_90")
    for v, got in zip(x.double().tolist(), out.double().tolist(), strict=True):
        want = math.copysign(0.0, v) if v == 0 else round_fraction(Fraction(v), FORMATS[to], mode or "rn")
        assert (got, math.copysign(1, got)) == (want, math.copysign(1, want)), v


def test_round_to_integral_and_saturate():
    x = torch.tensor([0.5, 1.5, -0.5, 2.5, -1.7, 1e30, 2.0**-130, 7.3] * 4)
    rni, rzi, rmi, rpi, sat, ftz = evaluate(
        "cvt.rni.f32.f32 %o0, %i0; cvt.rzi.f32.f32 %o1, %i0; cvt.rmi.f32.f32 %o2, %i0; cvt.rpi.f32.f32 %o3, %i0;"
        "cvt.sat.f32.f32 %o4, %i0; cvt.ftz.f32.f32 %o5, %i0;",
        [("f32", x)],
        ["f32"] * 6,
    )
    assert torch.equal(rni, x.round())
    assert torch.equal(rzi, x.trunc())
    assert torch.equal(rmi, x.floor())
    assert torch.equal(rpi, x.ceil())
    assert torch.equal(sat, x.clamp(0, 1))
    assert ftz[6] == 0


def test_packed_conversions():
    a, b = numbers("f32", 0), numbers("f32", 1)
    for kind in ("f16", "bf16"):
        body = (
            f"cvt.rn.{kind}x2.f32 %o0, %i0, %i1; cvt.rz.{kind}x2.f32 %o1, %i0, %i1; "
            f"cvt.rn.relu.{kind}x2.f32 %o2, %i0, %i1;"
        )
        outs = evaluate(body, [("f32", a), ("f32", b)], [f"{kind}x2"] * 3)
        for out, mode, relu in zip(outs, ("rn", "rz", "rn"), (False, False, True), strict=True):
            low, high = out.view(TORCH[kind]).view(-1, 2).double().unbind(1)
            for got, source in ((high, a), (low, b)):  # the first operand is the upper half
                want = [round_fraction(Fraction(v), FORMATS[kind], mode) for v in source.tolist()]
                assert got.tolist() == [max(w, 0.0) if relu else w for w in want]


def test_tf32():
    x = numbers("f32", 0)
    rna, rn = evaluate(
        "cvt.rna.tf32.f32 %o0, %i0; cvt.rn.tf32.f32 %o1, %i0;", [("f32", x)], ["tf32"] * 2, target="sm_90"
    )
    for out, mode in ((rna, "rna"), (rn, "rn")):
        want = [round_fraction(Fraction(v), FORMATS["tf32"], mode) for v in x.tolist()]
        assert out.view(torch.float32).tolist() == want


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8(kind):
    a, b = numbers("f32", 2), numbers("f32", 3)
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    body = f"cvt.rn.satfinite.{kind}x2.f32 %o0, %i0, %i1; cvt.rn.f16x2.{kind}x2 %o1, %o0;"
    packed, back = evaluate(body, [("f32", a), ("f32", b)], ["b16", "b32"], target="sm_90")
    low, high = packed.view(torch.uint8).view(-1, 2).unbind(1)
    for got, source in ((high, a), (low, b)):
        want = [round_fraction(Fraction(v), FORMATS[kind], "rn", saturate=True) for v in source.tolist()]
        largest = 448.0 if kind == "e4m3" else 57344.0
        want = [clamp(w, -largest, largest) for w in want]
        assert got.contiguous().view(dtype).double().tolist() == want
    halves = back.view(torch.float16).view(-1, 2)
    assert torch.equal(halves[:, 0].double(), low.contiguous().view(dtype).double())
    f16 = numbers("f16", 4)
    pair = f16.view(torch.int32).view(torch.uint32)
    (out,) = evaluate(f"cvt.rn.satfinite.{kind}x2.f16x2 %o0, %i0;", [("f16x2", pair)], ["b16"], target="sm_90")
    want = [
        clamp(round_fraction(Fraction(v), FORMATS[kind], "rn", saturate=True), -largest, largest)
        for v in f16.double().tolist()
    ]
    assert out.view(torch.uint8).view(dtype).double().tolist() == want


@pytest.mark.parametrize("kind", ["u16", "s16", "u8", "s8", "s4", "u2"])
def test_cvt_pack(kind):
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    a, b, c = samples("s32", 0), samples("s32", 1), samples("b32", 2)
    part = lambda v: clamp(v, low, high) & ((1 << bits) - 1)  # noqa: E731
    inputs = [(k, from_ints(v, k)) for k, v in (("s32", a), ("s32", b), ("b32", c))]
    pairs = [part(x) << bits | part(y) for x, y in zip(a, b, strict=True)]
    if bits == 16:
        (out,) = evaluate(f"cvt.pack.sat.{kind}.s32 %o0, %i0, %i1;", inputs, ["b32"])
        assert to_ints(out, "b32") == pairs
    else:
        (out,) = evaluate(f"cvt.pack.sat.{kind}.s32.b32 %o0, %i0, %i1, %i2;", inputs, ["b32"])
        assert to_ints(out, "b32") == [(z << 2 * bits | p) & 0xFFFFFFFF for p, z in zip(pairs, c, strict=True)]


COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_comparison(kind):
    """9.7.6.1, 9.7.6.2"""
    a, b = samples(kind, 0), samples(kind, 1)
    b[::5] = a[::5]
    inputs = [(kind, from_ints(v, kind)) for v in (a, b)]
    for name, f in COMPARE.items():
        want = [f(x, y) for x, y in zip(a, b, strict=True)]
        body = (
            f"setp.{name}.{kind} %o0, %i0, %i1; set.{name}.u32.{kind} %o1, %i0, %i1; "
            f"set.{name}.f32.{kind} %o2, %i0, %i1;"
        )
        p, ones, floats = evaluate(body, inputs, ["pred", "u32", "f32"])
        assert [bool(v) for v in p.tolist()] == want
        assert ones.tolist() == [0xFFFFFFFF if w else 0 for w in want]
        assert floats.tolist() == [float(w) for w in want]
    if kind[0] == "u":
        for name, same in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            (p,) = evaluate(f"setp.{name}.{kind} %o0, %i0, %i1;", inputs, ["pred"])
            assert [bool(v) for v in p.tolist()] == [COMPARE[same](x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_float_comparison(kind):
    """9.7.6.2, 9.7.7.2: ordered comparisons with NaN are false, unordered ones true."""
    values = [0.0, -0.0, 1.0, -2.0, math.nan, math.inf]
    a = [x for x in values for _ in values][:32]
    b = (values * 6)[:32]
    inputs = [(kind, torch.tensor(v, dtype=TORCH[kind])) for v in (a, b)]
    for name, f in COMPARE.items():
        both = [(x, y, math.isnan(x) or math.isnan(y)) for x, y in zip(a, b, strict=True)]
        body = (
            f"setp.{name}.{kind} %o0, %i0, %i1; setp.{name}u.{kind} %o1, %i0, %i1; set.{name}.u32.{kind} %o2, %i0, %i1;"
        )
        ordered, unordered, ones = evaluate(body, inputs, ["pred", "pred", "u32"], target="sm_90")
        assert [bool(v) for v in ordered.tolist()] == [f(x, y) and not nan for x, y, nan in both]
        assert [bool(v) for v in unordered.tolist()] == [f(x, y) or nan for x, y, nan in both]
        assert ones.tolist() == [0xFFFFFFFF * (f(x, y) and not nan) for x, y, nan in both]
    num, nan = evaluate(
        f"setp.num.{kind} %o0, %i0, %i1; setp.nan.{kind} %o1, %i0, %i1;", inputs, ["pred"] * 2, target="sm_90"
    )
    assert [bool(v) for v in nan.tolist()] == [n for *_, n in both]
    assert [bool(v) for v in num.tolist()] == [not n for *_, n in both]


def test_comparison_combined_with_a_predicate():
    a, b = samples("s32", 0, 64), samples("s32", 1, 64)
    c = [i % 3 == 0 for i in range(64)]
    inputs = [
        ("s32", from_ints(a, "s32")),
        ("s32", from_ints(b, "s32")),
        ("pred", from_ints([int(v) for v in c], "pred")),
    ]
    combine = {"and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y}
    for name, f in combine.items():
        body = f"setp.lt.{name}.s32 %o0|%o1, %i0, %i1, %i2; setp.lt.{name}.s32 %o2, %i0, %i1, !%i2;"
        p, q, negated = evaluate(body, inputs, ["pred"] * 3)
        rows = list(zip(a, b, c, strict=True))
        assert [bool(v) for v in p.tolist()] == [f(x < y, z) for x, y, z in rows]
        assert [bool(v) for v in q.tolist()] == [
            f(not x < y, z) for x, y, z in rows
        ]  # the second: the opposite comparison
        assert [bool(v) for v in negated.tolist()] == [f(x < y, not z) for x, y, z in rows]


def test_packed_comparison():
    """9.7.7.2: a predicate a half."""
    a, b = numbers("f16", 0), numbers("f16", 1)
    pairs = [("f16x2", t.view(torch.int32).view(torch.uint32)) for t in (a, b)]
    p, q = evaluate("setp.lt.f16x2 %o0|%o1, %i0, %i1;", pairs, ["pred"] * 2)
    less = (a < b).view(-1, 2)
    assert torch.equal(p.bool(), less[:, 0])
    assert torch.equal(q.bool(), less[:, 1])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selection(bits):
    """9.7.6.3, 9.7.6.4"""
    kind = f"b{bits}"
    a, b, c = samples(kind, 0), samples(kind, 1), samples("s32", 2)
    inputs = [(k, from_ints(v, k)) for k, v in ((kind, a), (kind, b), ("s32", c))]
    inputs.append(("f32", torch.tensor([-0.0, 0.0, 1.0, -1.0] * 64)))
    body = (
        f".reg .pred %z; setp.lt.s32 %z, %i2, 0; selp.{kind} %o0, %i0, %i1, %z; slct.{kind}.s32 %o1, %i0, %i1, %i2;"
        f"slct.{kind}.f32 %o2, %i0, %i1, %i3;"
    )
    selected, by_int, by_float = evaluate(body, inputs, [kind] * 3)
    assert to_ints(selected, kind) == [x if z < 0 else y for x, y, z in zip(a, b, c, strict=True)]
    assert to_ints(by_int, kind) == [x if z >= 0 else y for x, y, z in zip(a, b, c, strict=True)]
    assert to_ints(by_float, kind) == [x if i % 4 != 3 else y for i, (x, y) in enumerate(zip(a, b, strict=True))]


def test_mov_packs_and_unpacks():
    a, b = samples("b32", 0), samples("b32", 1)
    inputs = [("b32", from_ints(a, "b32")), ("b32", from_ints(b, "b32"))]
    body = (
        "mov.b64 %o0, {%i0, %i1}; .reg .b16 %w<4>; mov.b64 {%w0, %w1, %w2, %w3}, %o0; mov.b32 %o1, {%w3, %w0};"
        ".reg .b128 %big; .reg .b64 %lo; mov.b128 %big, {%o0, 7}; mov.b128 {%lo, _}, %big; mov.u64 %o2, %lo; "
        "mov.pred %o3, -1;"
    )
    whole, mixed, low, true = evaluate(body, inputs, ["b64", "b32", "b64", "pred"])
    assert to_ints(whole, "b64") == [x | y << 32 for x, y in zip(a, b, strict=True)]
    assert to_ints(mixed, "b32") == [(y >> 16) | (x & 0xFFFF) << 16 for x, y in zip(a, b, strict=True)]
    assert torch.equal(low, whole)
    assert true.all()


def test_special_registers():
    names = [
        "%tid.x",
        "%ntid.x",
        "%ctaid.x",
        "%nctaid.x",
        "%laneid",
        "%warpid",
        "%lanemask_lt",
        "%lanemask_ge",
        "%nwarpid",
        "%cluster_nctarank",
    ]
    body = (
        "".join(f"mov.u32 %o{i}, {name};" for i, name in enumerate(names))
        + "mov.u64 %a39, %clock64; mov.u32 %t3, %clock;"
    )
    x = from_ints(list(range(192)), "u32")
    out = [o.tolist() for o in evaluate(body, [("u32", x)], ["u32"] * len(names), block=96)]
    for i, row in enumerate(zip(*out, strict=True)):
        lane = i % 32
        want = (i % 96, 96, i // 96, 2, lane, i % 96 // 32, (1 << lane) - 1, 0xFFFFFFFF ^ ((1 << lane) - 1), 3, 1)
        assert row == want
