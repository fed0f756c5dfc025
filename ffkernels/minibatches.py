"""Several minibatches in one call of ff_network_step_, on backends whose kernels take one: one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def count(x: Tensor) -> int:
    """How many minibatches x (M, K) or (S, M, K) holds."""
    return x.shape[0] if x.dim() == 3 else 1


def one_by_one(step: Callable[..., tuple[Tensor, Tensor]], check: Callable[..., None]) -> Callable:
    """The flat ff_network_step_ for any number of minibatches, made of ``step`` for one.

    ``check`` takes all arguments before the first step, so that a call which raises has changed nothing.
    """

    def call(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        if x.dim() == 2:
            return step(x, *args)
        check(x, *args)
        *rows, seed = (x, *args[:4], args[-1])  # x, sign, x_sqnorm, labels_pos, labels_neg; dropout_seed
        parts = [[None] * len(x) if t is None else t.unbind(0) for t in rows]
        seeds = [None] * len(x) if seed is None else seed.split(1)
        each = list(zip(*parts, seeds, strict=True))  # before the first step: an error here changes nothing
        results = [step(*own, *args[4:-1], own_seed) for *own, own_seed in each]
        goodness, loss = zip(*results, strict=True)
        return torch.stack(goodness), torch.stack(loss)

    return call
