"""The softmax head's ops in plain torch, as reference.py has those of the layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import scale_of
from .reference_optim import optimized, write


def cross_entropy(
    logits: Tensor,  # (B, C)
    labels: Tensor,  # (B,) int64
) -> tuple[Tensor, Tensor]:  # loss (), its derivative by the logits (B, C)
    """The mean of -log softmax(logits) at the labels."""
    log_p, columns = logits.log_softmax(1), labels[:, None]
    error = log_p.exp()
    return -log_p.gather(1, columns).mean(), (error - torch.zeros_like(error).scatter(1, columns, 1.0)) / len(labels)


def ff_head_step_(
    ys: list[Tensor],  # of (B, N_l) acc
    sqnorms: list[Tensor],  # of (B,) acc
    labels: Tensor,  # (B,) int64
    weights: list[Tensor],  # of (C, N_l) acc, in place
    states: list[Tensor],  # all weights' states, one after the other, in place
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
    eps: float,
) -> tuple[Tensor, Tensor]:  # logits (B, C) acc from before the update, loss () acc
    rows = [y * scale_of(q, y.shape[1], eps)[:, None] for y, q in zip(ys, sqnorms, strict=True)]
    logits = torch.stack([row @ w.T for row, w in zip(rows, weights, strict=True)]).sum(0)
    loss, error = cross_entropy(logits, labels)
    each, writes = len(states) // len(weights), []
    for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        writes += optimized([weight], [error.T @ row], states[each * i : each * (i + 1)], optimizer, lr, hyper)
    write(writes)
    return logits, loss


def draw_hard_inputs(
    logits: Tensor,  # (B, C)
    labels: Tensor,  # (B,) int64
    draws: Tensor,  # (B,) float64 in [0, 1)
    floor: float,
    count: int,
) -> Tensor:  # (count,) int64, ascending
    p = logits.double().softmax(1).gather(1, labels[:, None])[:, 0]
    return (draws.log() / (floor + 1 - p)).topk(count).indices.sort().values


def draw_other_labels(
    logits: Tensor,  # (B, C)
    labels: Tensor,  # (B,) int64
    draws: Tensor,  # (B,) float32 in [0, 1)
) -> Tensor:  # (B,) int64
    others = logits.to(torch.float64, copy=True).scatter_(1, labels[:, None], -torch.inf)
    cumulated = others.softmax(1).cumsum(1)
    # float32 draws are at most 1 - 2^-24: times the total in float64 they stay below it, whatever the rounding
    return (cumulated <= (draws * cumulated[:, -1])[:, None]).sum(1)
