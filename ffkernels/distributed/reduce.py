"""Gradients that several ranks share: summed over micro-batches, all-reduced in flat buckets, then applied.

A layer's gradient is complete as soon as the layer has run, so its reduction runs while the layers above compute; and a
layer needs its new weights only when its next minibatch comes, so the last reductions run into the next minibatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..layer import FFLinear
from ..optim import Optimizer, state_dtype
from ..peer import DECAY
from .group import watch

BUCKET_BYTES = 4 << 20  # consecutive layers share a bucket up to this size


def frozen_rate(optimizer: Optimizer) -> Optimizer:
    """The optimizer with the learning rate of this moment, for an update that runs later."""
    if isinstance(optimizer.lr, Tensor):
        return dataclasses.replace(optimizer, lr=optimizer.lr.clone())
    return optimizer


class Bucket:
    """The gradients of some layers in one flat buffer of the accumulation dtype.

    The weight's gradient of a layer that has a bucket to itself stays where `ff_grad` has put it: it is large, and a
    copy would cost as much as the optimizer.
    """

    def __init__(self, layers: Sequence[FFLinear], group: Any, compress: bool) -> None:
        self.layers, self.group, self.compress = list(layers), group, compress
        self._alone = len(self.layers) == 1
        weight = self.layers[0].weight
        copied = [_params(layer)[1:] if self._alone else _params(layer) for layer in self.layers]
        sizes = [t.numel() for params in copied for t in params]
        self.flat = torch.empty(sum(sizes), dtype=state_dtype(weight.dtype), device=weight.device)
        views = iter(self.flat.split(sizes))
        self.views = [[next(views).view_as(t) for t in params] for params in copied]
        self._large: Tensor | None = None  # the gradient that is not copied
        self._fresh = [True] * len(self.layers)  # nothing of the present minibatch is in the buffer yet
        self._missing = len(self.layers)
        self._optimizers = [layer.optimizer for layer in self.layers]
        self._reductions: list[tuple[Any, Tensor, Tensor]] = []  # what runs, what it sums, where that belongs

    @property
    def full(self) -> bool:
        """Whether the gradients of a minibatch are complete and not applied yet."""
        return self._missing == 0

    def add(self, layer: FFLinear, grads: Sequence[Tensor], optimizer: Optimizer, complete: bool) -> None:
        """Add a micro-batch's gradient, which is the bucket's from then on; [] where it had no rows.

        ``complete``: it was the minibatch's last one.
        """
        at = next(i for i, own in enumerate(self.layers) if own is layer)
        if self._alone:
            if self._fresh[at]:
                self._large = grads[0] if grads else torch.zeros_like(layer.weight, dtype=self.flat.dtype)
            elif grads and self._large is not None:
                self._large.add_(grads[0])
            grads = grads[1:]
        for i, view in enumerate(self.views[at]):
            if self._fresh[at]:
                view.copy_(grads[i]) if grads else view.zero_()
            elif grads:
                view.add_(grads[i])
        self._fresh[at] = complete
        if not complete:
            return
        self._missing -= 1
        self._optimizers[at] = frozen_rate(optimizer)
        if self.full and self.group is not None:
            for t in (self._large, self.flat):
                if t is not None and t.numel():
                    sent = t.bfloat16() if self.compress else t
                    work = watch().run(dist.all_reduce, sent, group=self.group, async_op=True)
                    self._reductions.append((work, sent, t))

    def apply(self) -> None:
        """Wait for the reduction, if there is one under way, and run the optimizers."""
        if not self.full:
            return
        for work, sent, t in self._reductions:
            watch().wait(work)
            if sent is not t:
                t.copy_(sent)
        self._reductions.clear()
        for layer, views, optimizer in zip(self.layers, self.views, self._optimizers, strict=True):
            grads = views if self._large is None else [self._large, *views]
            grad_bias = grads[1] if layer.bias is not None else None
            ops.apply_gradient_(grads[0], grad_bias, layer.weight, layer.bias, layer.state, optimizer)
            if layer.peer_mean is not None:
                layer.peer_mean.mul_(DECAY).add_(grads[-1], alpha=1 - DECAY)
        self._large = None
        self._missing = len(self.layers)


def _params(layer: FFLinear) -> list[Tensor]:
    """What a sum over ranks is made of: the gradients' shapes, and with peer normalisation the mean activities'."""
    return [t for t in (layer.weight, layer.bias, layer.peer_mean) if t is not None]


def buckets(layers: Sequence[FFLinear], group: Any, compress: bool, limit: int = BUCKET_BYTES) -> list[Bucket]:
    """Consecutive layers together, up to ``limit`` bytes a bucket; a larger layer has its own."""
    found: list[list[FFLinear]] = []
    size = 0
    for layer in layers:
        own = sum(t.numel() for t in _params(layer)) * state_dtype(layer.weight.dtype).itemsize
        if not found or size + own > limit or layer.weight.device != found[-1][0].weight.device:
            found.append([])
            size = 0
        found[-1].append(layer)
        size += own
    return [Bucket(part, group, compress) for part in found]
