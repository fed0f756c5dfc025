"""Floating-point arithmetic against exact rational arithmetic and the ISA's error bounds (9.7.3, 9.7.4)."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from .rounding import FORMATS, round_fraction
from .snippet import TORCH, evaluate, from_ints, samples, to_ints

ROUNDINGS = ["rn", "rz", "rm", "rp"]
BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def numbers(kind, seed, count=256):
    """Values of all magnitudes, with the edges of the format; no infinities or NaN."""
    rng = np.random.default_rng(seed)
    fmt = FORMATS[kind]
    span = min(fmt.emax, 60)
    random = rng.standard_normal(count) * 2.0 ** rng.integers(-min(span, -fmt.emin) // 2, span // 2, count)
    edges = [0.0, -0.0, 1.0, -1.0, float(fmt.largest), -float(fmt.largest), float(fmt.smallest_normal)]
    edges += [
        float(fmt.smallest_normal) * (1 - 2.0 ** (1 - fmt.precision)),
        2.0 ** (fmt.emin - fmt.precision + 1),
        1.5,
        3.0,
    ]
    random[: len(edges)] = rng.permutation(edges)
    return torch.tensor(random, dtype=torch.float64).to(TORCH[kind])


def same(out, expected, kind):
    """Equal bits, but for NaN, which must be the canonical one."""
    ref = torch.tensor(expected, dtype=torch.float64).to(TORCH[kind])
    bits = {16: torch.int16, 32: torch.int32, 64: torch.int64}[BITS[kind]]
    nan = ref.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan].view(bits), ref[~nan].view(bits))


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_fma_rounds_once(kind, mode):
    columns = [numbers(kind, s) for s in range(3)]
    (out,) = evaluate(f"fma.{mode}.{kind} %o0, %i0, %i1, %i2;", [(kind, c) for c in columns], [kind])  # 9.7.3.6
    (mad,) = evaluate(f"mad.{mode}.{kind} %o0, %i0, %i1, %i2;", [(kind, c) for c in columns], [kind])  # 9.7.3.7
    assert torch.equal(out.view(torch.uint8), mad.view(torch.uint8))
    for got, *row in zip(out.double().tolist(), *(c.double().tolist() for c in columns), strict=True):
        value = Fraction(row[0]) * Fraction(row[1]) + Fraction(row[2])
        if value:
            assert got == round_fraction(value, FORMATS[kind], mode), row
        else:
            assert got == 0


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("add", lambda a, b: a + b),  # 9.7.3.3
        ("sub", lambda a, b: a - b),  # 9.7.3.4
        ("mul", lambda a, b: a * b),  # 9.7.3.5
    ],
)
def test_rounded_binary(name, f, mode, kind):
    columns = [numbers(kind, s) for s in range(2)]
    (out,) = evaluate(f"{name}.{mode}.{kind} %o0, %i0, %i1;", [(kind, c) for c in columns], [kind])
    for got, a, b in zip(out.double().tolist(), *(c.double().tolist() for c in columns), strict=True):
        value = f(Fraction(a), Fraction(b))
        if value:
            assert got == round_fraction(value, FORMATS[kind], mode), (a, b)
        else:
            assert got == 0
            if name != "mul" and a != 0:  # exact cancellation
                assert math.copysign(1, got) == (-1 if mode == "rm" else 1)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_rounded_division_and_roots(kind, mode):
    a, b = numbers(kind, 0), numbers(kind, 1)
    b = torch.where(b == 0, torch.ones_like(b), b)
    div, rcp = evaluate(
        f"div.{mode}.{kind} %o0, %i0, %i1; rcp.{mode}.{kind} %o1, %i1;", [(kind, a), (kind, b)], [kind] * 2
    )
    fmt = FORMATS[kind]
    for x, y, q, r in zip(a.tolist(), b.tolist(), div.tolist(), rcp.tolist(), strict=True):
        assert r == round_fraction(1 / Fraction(y), fmt, mode)  # 9.7.3.13
        if x:
            assert q == round_fraction(Fraction(x) / Fraction(y), fmt, mode)  # 9.7.3.8
    positive = numbers(kind, 2).abs()
    (root,) = evaluate(f"sqrt.{mode}.{kind} %o0, %i0;", [(kind, positive)], [kind])  # 9.7.3.15
    for x, r in zip(positive.tolist(), root.tolist(), strict=True):
        # the root rounded: it and its neighbours bracket the exact value
        digits = Fraction(math.isqrt(int(Fraction(x) * 4**600)), 2**600) if x else Fraction(0)
        if digits * digits != Fraction(x):
            digits += Fraction(1, 2**601)
        assert r == round_fraction(digits, fmt, mode)


def test_ftz_sat_and_nan():
    tiny, big = 2.0**-130, 3.0
    a = torch.tensor([tiny, -tiny, 1.0, math.nan, math.inf, big, -big, 0.25] * 4)
    b = torch.tensor([0.0, 0.0, tiny, 1.0, -math.inf, 1.0, 1.0, 0.5] * 4)
    add, ftz, sat, mul = evaluate(
        "add.f32 %o0, %i0, %i1; add.ftz.f32 %o1, %i0, %i1; add.sat.f32 %o2, %i0, %i1; mul.ftz.f32 %o3, %i0, %i1;",
        [("f32", a), ("f32", b)],
        ["f32"] * 4,
    )
    assert add[:3].tolist() == [tiny, -tiny, 1.0]
    assert ftz[:3].tolist() == [0.0, 0.0, 1.0]
    assert math.copysign(1, ftz[1]) == 1  # -0 + 0
    assert math.copysign(1, mul[1]) == -1  # flushed operands keep their sign
    assert sat[2:8].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.75]
    assert add[3:5].view(torch.int32).tolist() == [0x7FFFFFFF] * 2  # NaN results are canonical


def test_sign_operations():
    a = torch.tensor([1.5, -0.0, 2.0**-140, -math.inf, math.nan, -3.0, 0.0, -(2.0**-130)] * 4)
    b = a.flip(0).contiguous()
    names = "neg.f32 %o0, %i0; abs.f32 %o1, %i0; neg.ftz.f32 %o2, %i0; copysign.f32 %o3, %i0, %i1;"
    neg, absolute, flushed, copied = evaluate(names, [("f32", a), ("f32", b)], ["f32"] * 4)
    same(neg, (-a.double()).tolist(), "f32")  # 9.7.3.10
    same(absolute, a.double().abs().tolist(), "f32")  # 9.7.3.9
    assert flushed[2] == 0
    assert math.copysign(1, flushed[2]) == -1
    finite = ~b.isnan()
    assert torch.equal(copied[finite], torch.copysign(b, a)[finite])  # 9.7.3.2: the sign of the first
    d, e = a.double(), b.double()
    names = "neg.f64 %o0, %i0; abs.f64 %o1, %i0; copysign.f64 %o2, %i0, %i1;"
    neg, absolute, copied = evaluate(names, [("f64", d), ("f64", e)], ["f64"] * 3)
    assert torch.equal(neg.nan_to_num(), (-d).nan_to_num())
    assert torch.equal(absolute.nan_to_num(), d.abs().nan_to_num())
    assert torch.equal(copied[finite], torch.copysign(e, d)[finite])


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_min_max(kind):
    """9.7.3.11, 9.7.3.12, 9.7.4.7, 9.7.4.8: NaN gives way unless .NaN, and -0 is below +0."""
    values = [0.0, -0.0, 1.0, -2.0, math.nan, math.inf, -math.inf, 7.0]
    a = torch.tensor([x for x in values for _ in values], dtype=TORCH[kind])
    b = torch.tensor(values * len(values), dtype=TORCH[kind])
    low, high = evaluate(f"min.{kind} %o0, %i0, %i1; max.{kind} %o1, %i0, %i1;", [(kind, a), (kind, b)], [kind] * 2)
    key = lambda v: (v, math.copysign(1, v))  # noqa: E731
    for x, y, lo, hi in zip(a.tolist(), b.tolist(), low.tolist(), high.tolist(), strict=True):
        numbers_only = [v for v in (x, y) if not math.isnan(v)]
        if not numbers_only:
            assert math.isnan(lo)
            assert math.isnan(hi)
        else:
            assert key(lo) == key(min(numbers_only, key=key))
            assert key(hi) == key(max(numbers_only, key=key))
    if kind == "f64":
        return
    names = f"min.NaN.{kind} %o0, %i0, %i1; max.NaN.{kind} %o1, %i0, %i1; max.xorsign.abs.{kind} %o2, %i0, %i1;"
    low, high, xored = evaluate(names, [(kind, a), (kind, b)], [kind] * 3, target="sm_90")
    either = a.isnan() | b.isnan()
    assert torch.equal(low.isnan(), either)
    assert torch.equal(high.isnan(), either)
    expected = torch.maximum(a.abs(), b.abs()) * torch.sign(
        torch.copysign(torch.ones_like(a), a) * torch.copysign(torch.ones_like(b), b)
    )
    assert torch.equal(xored[~either], expected[~either])


def test_testp():
    """9.7.3.1"""
    values = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 2.0**-140, -(2.0**-149)]
    for kind in ("f32", "f64"):
        x = torch.tensor(values * 4, dtype=TORCH[kind])
        if kind == "f64":
            x[6::8], x[7::8] = 2.0**-1040, -(2.0**-1070)
        tests = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"]
        body = " ".join(f"testp.{t}.{kind} %o{i}, %i0;" for i, t in enumerate(tests))
        out = [o[:8].tolist() for o in evaluate(body, [(kind, x)], ["pred"] * 6)]
        assert out == [
            [1, 1, 1, 0, 0, 0, 1, 1],
            [0, 0, 0, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 1, 1],
            [0, 0, 0, 0, 0, 1, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1],
        ]


# function, domain, allowed error: relative, or absolute where the ISA gives that
APPROXIMATE = [
    ("rcp.approx.f32", lambda x: 1 / x, (0.01, 1e6), 2.0**-23, 0),  # 9.7.3.13
    ("sqrt.approx.f32", math.sqrt, (0.0001, 1e6), 2.0**-23, 0),  # 9.7.3.15
    ("rsqrt.approx.f32", lambda x: x**-0.5, (0.0001, 1e6), 2.0**-22.9, 0),  # 9.7.3.16
    ("sin.approx.f32", math.sin, (-math.pi, math.pi), 0, 2.0**-20.5),  # 9.7.3.18
    ("cos.approx.f32", math.cos, (-math.pi, math.pi), 0, 2.0**-20.5),  # 9.7.3.19
    ("lg2.approx.f32", math.log2, (0.5, 2.0), 0, 2.0**-22),  # 9.7.3.20
    ("lg2.approx.ftz.f32", math.log2, (2.0, 1e30), 2.0**-22, 0),
    ("ex2.approx.f32", lambda x: 2.0**x, (-100.0, 100.0), 2.0**-22, 0),  # 9.7.3.21
    ("tanh.approx.f32", math.tanh, (-5.0, 5.0), 2.0**-11, 0),  # 9.7.3.22
]


@pytest.mark.parametrize(("name", "f", "domain", "relative", "absolute"), APPROXIMATE, ids=[c[0] for c in APPROXIMATE])
def test_approximate(name, f, domain, relative, absolute):
    x = torch.linspace(*domain, 512)
    (out,) = evaluate(f"{name} %o0, %i0;", [("f32", x)], ["f32"])
    for v, got in zip(x.tolist(), out.tolist(), strict=True):
        want = f(v)
        assert abs(got - want) <= relative * abs(want) + absolute, (v, got, want)


def test_approximate_special_values():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1.0, 1.0, 4.0] * 4)
    body = (
        "rcp.approx.ftz.f32 %o0, %i0; rsqrt.approx.ftz.f32 %o1, %i0; lg2.approx.f32 %o2, %i0; "
        "ex2.approx.f32 %o3, %i0; sqrt.approx.f32 %o4, %i0;"
    )
    rcp, rsqrt, lg2, ex2, sqrt = (o[:8].tolist() for o in evaluate(body, [("f32", x)], ["f32"] * 5))
    inf = math.inf
    assert rcp[:4] == [inf, -inf, 0.0, -0.0]
    assert rsqrt[:3] == [inf, -inf, 0.0]
    assert math.isnan(rsqrt[3])
    assert lg2[:3] == [-inf, -inf, inf]
    assert math.isnan(lg2[5])
    assert ex2[:4] == [1.0, 1.0, inf, 0.0]
    assert math.isnan(sqrt[5])
    assert all(math.isnan(f[4]) for f in (rcp, rsqrt, lg2, ex2, sqrt))


def test_approximate_division():
    """9.7.3.8: div.approx is 0 for divisors in (2^126, 2^128); div.full is within 2 ulp everywhere else."""
    a = torch.tensor([1.0, math.inf, -4.0, 10.0] * 8)
    b = torch.tensor([2.0**127, 2.0**127, 3.0, -7.0] * 8)
    approx, full, f64 = evaluate(
        "div.approx.f32 %o0, %i0, %i1; div.full.f32 %o1, %i0, %i1;"
        "cvt.f64.f32 %o2, %i1; rcp.approx.ftz.f64 %o2, %o2;",  # 9.7.3.14
        [("f32", a), ("f32", b)],
        ["f32", "f32", "f64"],
    )
    assert approx[0] == 0
    assert math.isnan(approx[1])
    assert full[0] == 2.0**-127
    for out in (approx, full):
        assert torch.allclose(out[2:4], (a / b)[2:4], rtol=2.0**-22, atol=0)
    assert torch.allclose(f64, 1 / b.double(), rtol=2.0**-20, atol=0)
    (r,) = evaluate(
        "rsqrt.approx.ftz.f64 %o0, %i0;", [("f64", torch.linspace(0.1, 9, 32, dtype=torch.float64))], ["f64"]
    )  # 9.7.3.17
    assert torch.allclose(r, torch.linspace(0.1, 9, 32, dtype=torch.float64).rsqrt(), rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("name", "f"), [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul", lambda a, b: a * b)]
)
def test_half_binary(name, f, kind):
    """9.7.4.1 to 9.7.4.3, and the packed forms on the same data."""
    a, b = numbers(kind, 0), numbers(kind, 1)
    (out,) = evaluate(f"{name}.rn.{kind} %o0, %i0, %i1;", [(kind, a), (kind, b)], [kind], target="sm_90")
    for x, y, got in zip(a.double().tolist(), b.double().tolist(), out.double().tolist(), strict=True):
        assert got == round_fraction(f(Fraction(x), Fraction(y)), FORMATS[kind]), (x, y)
    packed = f"{kind}x2"
    pairs = [t.view(torch.uint16).view(torch.uint32) for t in (a, b)]
    (both,) = evaluate(f"{name}.{packed} %o0, %i0, %i1;", [(packed, p) for p in pairs], [packed], target="sm_90")
    assert torch.equal(both.view(torch.int16), out.view(torch.int16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_fma(kind):
    """9.7.4.4: one rounding; .relu and the packed form."""
    columns = [numbers(kind, s) for s in range(3)]
    # sums just beside a midpoint, where rounding twice goes wrong
    columns[0][:4], columns[1][:4] = (
        torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=TORCH[kind]),
        torch.tensor([1.0] * 4, dtype=TORCH[kind]),
    )
    body = f"fma.rn.{kind} %o0, %i0, %i1, %i2; fma.rn.relu.{kind} %o1, %i0, %i1, %i2;"
    out, relu = evaluate(body, [(kind, c) for c in columns], [kind] * 2, target="sm_90")
    rows = list(zip(*(c.double().tolist() for c in columns), strict=True))
    for (a, b, c), got, positive in zip(rows, out.double().tolist(), relu.double().tolist(), strict=True):
        want = round_fraction(Fraction(a) * Fraction(b) + Fraction(c), FORMATS[kind])
        assert got == want, (a, b, c)
        assert positive == max(want, 0.0)
    packed = f"{kind}x2"
    pairs = [c.view(torch.uint16).view(torch.uint32) for c in columns]
    (both,) = evaluate(f"fma.rn.{packed} %o0, %i0, %i1, %i2;", [(packed, p) for p in pairs], [packed], target="sm_90")
    assert torch.equal(both.view(torch.int16), out.view(torch.int16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_unary(kind):
    """9.7.4.5, 9.7.4.6, 9.7.4.9, 9.7.4.10"""
    x = torch.linspace(-6, 6, 64).to(TORCH[kind])
    tail = "approx.ftz" if kind == "bf16" else "approx"
    body = f"neg.{kind} %o0, %i0; abs.{kind} %o1, %i0; tanh.approx.{kind} %o2, %i0; ex2.{tail}.{kind} %o3, %i0;"
    neg, absolute, tanh, ex2 = evaluate(body, [(kind, x)], [kind] * 4, target="sm_90")
    assert torch.equal(neg, -x)
    assert torch.equal(absolute, x.abs())
    tolerance = 2.0**-10 if kind == "f16" else 2.0**-7
    assert torch.allclose(tanh.double(), x.double().tanh(), rtol=tolerance, atol=2.0**-16)
    assert torch.allclose(ex2.double(), torch.exp2(x.double()), rtol=tolerance, atol=0)
    packed = f"{kind}x2"
    pair = x.view(torch.uint16).view(torch.uint32)
    body = f"neg.{packed} %o0, %i0; abs.{packed} %o1, %i0; tanh.approx.{packed} %o2, %i0; ex2.{tail}.{packed} %o3, %i0;"
    outs = evaluate(body, [(packed, pair)], [packed] * 4, target="sm_90")
    for got, want in zip(outs, (neg, absolute, tanh, ex2), strict=True):
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    flipped = pair.view(torch.int32).flip(0).view(torch.uint32)
    low, high = evaluate(
        f"min.{packed} %o0, %i0, %i1; max.{packed} %o1, %i0, %i1;",
        [(packed, pair), (packed, flipped)],
        [packed] * 2,
        target="sm_90",
    )
    other = flipped.view(torch.int16).view(TORCH[kind])
    assert torch.equal(low.view(torch.int16).view(TORCH[kind]), torch.minimum(x, other))
    assert torch.equal(high.view(torch.int16).view(TORCH[kind]), torch.maximum(x, other))


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_packed_f32(mode):
    """add, sub, mul, fma on .f32x2 equal the scalar operations on each half."""
    columns = [numbers("f32", s) for s in range(3)]
    pairs = [("f32x2", c.view(torch.int64).view(torch.uint64)) for c in columns]
    body = (
        "".join(f"{n}.{mode}.f32x2 %o{i}, %i0, %i1;" for i, n in enumerate(("add", "sub", "mul")))
        + f"fma.{mode}.f32x2 %o3, %i0, %i1, %i2;"
    )
    scalar = body.replace("f32x2", "f32")
    packed = evaluate(body, pairs, ["f32x2"] * 4)
    for got, want in zip(packed, evaluate(scalar, [("f32", c) for c in columns], ["f32"] * 4), strict=True):
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_half_nan_is_canonical():
    x = from_ints([0x7C01, 0xFE00] * 16, "f16")
    y = from_ints(samples("b16", 0)[:32], "b16").view(torch.float16)
    (out,) = evaluate("add.f16 %o0, %i0, %i1;", [("f16", x), ("f16", y)], ["f16"])
    assert set(to_ints(out, "b16")) == {0x7FFF}
