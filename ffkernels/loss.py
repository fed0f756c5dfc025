"""Losses on the goodness: each gives the loss and its derivative by the goodness, which is all that ff_grad needs."""

from __future__ import annotations

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
