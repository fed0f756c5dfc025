"""Losses on the goodness: each gives the loss and its derivative by the goodness, which is all that ff_grad needs.

`logistic_loss` is the one that the fused steps have built in. The others are for `fit`, which takes any `Loss`: one of
these, or a function of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import checks, reference


def logistic_loss(
    goodness: Tensor,  # (M,)
    sign: Tensor,  # (M,)
    *,
    divisor: float = 1.0,
    threshold: float = 2.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """mean_m T softplus(-s_m (G_m / E - theta) / T), and its derivative by G (Hinton 2022, section 2, equation 1).

    The loss that ff_step_ has built in, for a training loop of one's own around ff_grad or ff_update_.

    Args:
        goodness: G as ff_forward returns it, float32 or float64.
        sign: +1 for positive rows, -1 for negative ones, same dtype.
        divisor: E > 0: 1 for the sum of squares, N for their mean. threshold: theta >= 0. temperature: T > 0.

    Returns:
        loss (), coef (M,) = d loss / d G, both in goodness's dtype; finite for every finite goodness.

    Raises:
        TypeError, ValueError: as the ops do.
    """
    if not isinstance(goodness, Tensor) or goodness.dtype not in (torch.float32, torch.float64):
        given = goodness.dtype if isinstance(goodness, Tensor) else type(goodness).__name__
        raise TypeError(f"goodness must be a float32 or float64 tensor, got {given}")
    if goodness.dim() != 1 or goodness.shape[0] == 0:
        raise ValueError(f"goodness must have shape (M,) with M >= 1, got {tuple(goodness.shape)}")
    checks.like("sign", sign, tuple(goodness.shape), "(M,)", goodness.dtype, goodness.device)
    checks.number("divisor", divisor, 0.0, above=True)
    checks.loss_options(threshold, temperature, "sum")
    if not torch.compiler.is_compiling():
        checks.sign_values(sign)
    return reference.logistic_loss(goodness, sign, divisor, threshold, temperature)


class Loss(Protocol):
    """A loss on the goodness of a layer, and its derivative."""

    def __call__(
        self,
        goodness: Tensor,  # (2 B,): g = G / E of the rows that are to rise, then of those that are to fall
        sign: Tensor,  # (2 B,): +1 for the first half, -1 for the second
    ) -> tuple[Tensor, Tensor]:  # loss (), d loss / d g (2 B,)
        """Rows i and B + i are of one image."""
        ...


def evaluate(
    loss: Loss,
    goodness: Tensor,  # (2 B,)
    sign: Tensor,  # (2 B,)
) -> tuple[Tensor, Tensor]:  # loss (), d loss / d g (2 B,)
    """What the loss gives; TypeError or ValueError where a function of one's own gives something else."""
    given = loss(goodness, sign)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"loss must return two tensors, itself () and d loss / d g (2 B,), got {type(given).__name__}")
    value, slope = given
    checks.like("what loss returns first", value, (), "()", goodness.dtype, goodness.device)
    checks.like("d loss / d g", slope, tuple(goodness.shape), "(2 B,)", goodness.dtype, goodness.device)
    return value, slope


@dataclass(frozen=True)
class Logistic:
    """mean_m T softplus(-s_m (g_m - theta) / T) (Hinton 2022, section 2, equation 1), as a `Loss`.

    fit without a loss of its own computes the same inside the fused step, from the layers' threshold and temperature.
    With alpha = 1 / T it is the alpha-softplus of each row.
    """

    threshold: float = 2.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.loss_options(self.threshold, self.temperature, "sum")

    def __call__(self, goodness: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        return logistic_loss(goodness, sign, threshold=self.threshold, temperature=self.temperature)


@dataclass(frozen=True)
class Hinge:
    """mean_m max(0, margin - s_m (g_m - theta)): rows on the right side by the margin are left alone.

    The margin loss of support vector machines (Cortes & Vapnik 1995) in the place of the logistic one.
    """

    margin: float = 1.0
    threshold: float = 2.0

    def __post_init__(self) -> None:
        checks.number("margin", self.margin, 0.0)
        checks.number("threshold", self.threshold, 0.0)

    def __call__(self, goodness: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        short = self.margin - sign * (goodness - self.threshold)
        return short.relu().mean(), torch.where(short > 0, -sign, 0.0) / len(goodness)


@dataclass(frozen=True)
class SymBa:
    """mean over pairs of softplus(-alpha (g_pos - g_neg)): no threshold, both rows pull alike (Lee & Song 2023, SymBa).

    The Trifecta (Dooms, Tsang & Oramas 2023) trains deep networks with it.
    """

    alpha: float = 4.0

    def __post_init__(self) -> None:
        checks.number("alpha", self.alpha, 0.0, above=True)

    def __call__(self, goodness: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        loss, slope = _softplus(-self.alpha * _difference(goodness))
        coef = self.alpha * slope / len(slope)
        return loss.mean(), torch.cat([-coef, coef])


@dataclass(frozen=True)
class PairSoftplus:
    """mean over pairs of softplus(alpha (margin - (g_pos - g_neg))) / alpha: SymBa's with a margin and a slope of 1.

    The alpha-softplus of the pair's difference: alpha sets how soft the corner is and, unlike SymBa's, not the size of
    the steps; the larger it is, the closer to a hinge.
    """

    alpha: float = 1.0
    margin: float = 0.0

    def __post_init__(self) -> None:
        checks.number("alpha", self.alpha, 0.0, above=True)
        checks.number("margin", self.margin, 0.0)

    def __call__(self, goodness: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        loss, slope = _softplus(self.alpha * (self.margin - _difference(goodness)))
        coef = slope / len(slope)
        return loss.mean() / self.alpha, torch.cat([-coef, coef])


def _difference(
    goodness: Tensor,  # (2 B,)
) -> Tensor:  # (B,): g_pos - g_neg
    if goodness.dim() != 1 or len(goodness) == 0 or len(goodness) % 2:
        raise ValueError(f"a loss on pairs takes goodness of shape (2 B,) with B >= 1, got {tuple(goodness.shape)}")
    up, down = goodness.chunk(2)
    return up - down


def _softplus(u: Tensor) -> tuple[Tensor, Tensor]:  # log(1 + exp(u)) without overflow, and its derivative
    return -torch.nn.functional.logsigmoid(-u), torch.sigmoid(u)
