"""The learning rate while fit runs: set before every step, put back at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import checks
from .head import SoftmaxHead
from .layer import FFLinear


class LearningRate:
    """Sets the learning rate of whatever optimizes: the layers' and the head's fused optimizers, or torch.optim's.

    Without a rate or a schedule it leaves alone what there is, which a scheduler of torch's may then change.
    """

    def __init__(
        self,
        layers: Sequence[FFLinear],
        head: SoftmaxHead | None,
        lr: float | None,
        schedule: Callable[[float], float] | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.schedule, self.optimizer = schedule, optimizer
        self.first = layers[0]
        sets = lr is not None or schedule is not None
        fused: list[Any] = [] if optimizer is not None else [*layers]
        self.fused = [] if not sets else fused if head is None else [*fused, head]
        self.before = [owner.optimizer for owner in self.fused]
        self.groups = [] if optimizer is None or not sets else optimizer.param_groups
        self.groups_before = [group["lr"] for group in self.groups]
        own = [float(each.lr) for each in self.before]
        self.base = own if lr is None else [own[i] if owner is head else lr for i, owner in enumerate(self.fused)]
        self.group_base = [group_lr if lr is None else lr for group_lr in self.groups_before]
        device = self.first.weight.device  # tensors, so that a change costs no recompilation
        self.rates = {base: torch.zeros((), dtype=torch.float32, device=device) for base in self.base}
        for owner, base in zip(self.fused, self.base, strict=True):
            owner.optimizer = dataclasses.replace(owner.optimizer, lr=self.rates[base])
        self.factor = -1.0

    def set(self, progress: float) -> None:
        factor = 1.0 if self.schedule is None else self.schedule(progress)
        if factor == self.factor:
            return
        checks.number("the schedule's factor", factor, 0.0)
        self.factor = factor
        for base, rate in self.rates.items():
            rate.fill_(base * factor)
        for group, base in zip(self.groups, self.group_base, strict=True):
            group["lr"] = base * factor

    def value(self) -> float:
        return float(self.first.optimizer.lr if self.optimizer is None else self.optimizer.param_groups[0]["lr"])

    def restore(self) -> None:
        for owner, optimizer in zip(self.fused, self.before, strict=True):
            owner.optimizer = optimizer
        for group, rate in zip(self.groups, self.groups_before, strict=True):
            group["lr"] = rate
