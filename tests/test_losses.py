"""Losses for fit: their values and derivatives, at any goodness."""

import math

import pytest
import torch

import ffkernels as ff

SIGN = torch.cat([torch.ones(6), -torch.ones(6)]).double()
GOODNESS = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4


def softplus(u):
    return math.log1p(math.exp(u))


def over_rows(f):  # of s (g - theta)
    return lambda g: sum(f(a - 1.5) for a in g[:6]) / 12 + sum(f(1.5 - a) for a in g[6:]) / 12


def over_pairs(f):  # of g_pos - g_neg
    return lambda g: sum(f(a - b) for a, b in zip(g[:6], g[6:], strict=True)) / 6


LOSSES = {
    "logistic": (ff.Logistic(1.5, 0.5), over_rows(lambda d: 0.5 * softplus(-d / 0.5))),
    "hinge": (ff.Hinge(0.75, 1.5), over_rows(lambda d: max(0.0, 0.75 - d))),
    "symba": (ff.SymBa(3.0), over_pairs(lambda d: softplus(-3 * d))),
    "pair": (ff.PairSoftplus(3.0, 0.5), over_pairs(lambda d: softplus(3 * (0.5 - d)) / 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_derivative(name):
    loss, formula = LOSSES[name]
    found, coef = loss(GOODNESS, SIGN)
    assert found.item() == pytest.approx(formula(GOODNESS.tolist()), rel=1e-12)
    assert found.shape == ()
    for i in range(12):
        g = GOODNESS.tolist()
        above, below = ([*g[:i], g[i] + h, *g[i + 1 :]] for h in (1e-6, -1e-6))
        slope = (formula(above) - formula(below)) / 2e-6
        assert coef[i].item() == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("right", [True, False])
def test_huge_goodness_does_not_overflow(name, right):
    loss, _ = LOSSES[name]
    g = torch.tensor([1e30] * 6 + [0.0] * 6 if right else [0.0] * 6 + [1e30] * 6)
    found, coef = loss(g, SIGN.float())
    assert coef.isfinite().all()
    assert found.isfinite()
    assert (coef[:6] == 0).all() if right else (coef[6:] > 0).all()
    assert found < 2 if right else found > 1e29


def test_arguments():
    for kind, bad, name in (
        (ff.Logistic, {"temperature": 0.0}, "temperature"),
        (ff.Logistic, {"threshold": -1.0}, "threshold"),
        (ff.Hinge, {"margin": -1.0}, "margin"),
        (ff.Hinge, {"threshold": math.nan}, "threshold"),
        (ff.SymBa, {"alpha": 0.0}, "alpha"),
        (ff.PairSoftplus, {"alpha": math.inf}, "alpha"),
        (ff.PairSoftplus, {"margin": -0.5}, "margin"),
    ):
        with pytest.raises(ValueError, match=name):
            kind(**bad)
    for goodness in (torch.ones(3), torch.ones(0), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"shape \(2 B,\)"):
            ff.SymBa()(goodness, goodness)
