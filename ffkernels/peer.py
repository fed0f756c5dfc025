"""Peer normalisation: a layer's units are drawn towards the mean activity of all of them (Hinton's published code).

It keeps units from being always or never active. m (N,) is the running mean of y's columns over the positive rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

DECAY = 0.9  # of m
START = 0.5  # m before the first step


def terms(
    sign: Tensor,  # (M,) acc
    mean: Tensor,  # (N,) acc: m
    strength: float,
    divisor: float,  # E
) -> tuple[Tensor, Tensor]:  # a (M,), d (N,)
    """What a step adds to dz = 2 c y as a d^T: a = 2 / (E M) on positive rows, d = strength (m - mean(m)).

    The scale is that of the loss, where dz of a positive row is -2 (1 - p) y / (E M): so the strength has the units of
    Hinton's code, which adds strength (mean(m) - m) to the ascent's (1 - p) y.
    """
    return (sign > 0).to(sign.dtype) * (2 / (divisor * sign.shape[0])), strength * (mean - mean.mean())


def new_mean(
    mean: Tensor,  # (N,) acc: m
    y: Tensor,  # (M, N)
    sign: Tensor,  # (M,) acc
) -> Tensor:  # (N,) acc
    """0.9 m + 0.1 mean of y over the positive rows; m where there are none."""
    positive = sign > 0
    now = torch.where(positive[:, None], y.to(mean.dtype), 0).sum(0) / positive.sum()
    return torch.where(positive.any(), DECAY * mean + (1 - DECAY) * now, mean)
