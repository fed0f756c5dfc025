"""A running average of a net's weights, which labels better than the last weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import checks
from .optim import state_dtype
from .state import at_least_float32


class WeightAverage(nn.Module):
    """Exponential moving average of a module's parameters (Polyak & Juditsky 1992; Tarvainen & Valpola 2017).

    Every ``every`` steps average <- d average + (1 - d) weights, with d = min(decay, (1 + k) / (10 + k)) at the k-th
    time, so that the first averages follow the weights closely. It is a module whose buffers are the averages: assigned
    to a net it is part of the net's state_dict. Averages are float32 (float64 of float64) whatever the weights are: in
    bf16 most of what a step adds would be lost.

    Args:
        module: whose parameters are averaged, from what they are now. It is not kept: each method takes it anew.
        decay: the largest d, in [0, 1). every: steps between two updates, at least 1.
    """

    def __init__(self, module: nn.Module, *, decay: float = 0.98, every: int = 10) -> None:
        super().__init__()
        checks.number("decay", decay, 0.0)
        if decay >= 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        checks.count("every", every, 1, 2**31, "steps between two updates")
        self.decay, self.every = decay, every
        for name, parameter in module.named_parameters():
            self.register_buffer(name.replace(".", "_"), parameter.detach().to(state_dtype(parameter.dtype), copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightAverage:
        return super()._apply(at_least_float32(fn), recurse)

    def check_fits(self, module: nn.Module) -> None:
        """ValueError if the average was made for a module with other parameters."""
        own, its = ([tuple(t.shape) for t in of] for of in (self.buffers(), module.parameters()))
        if own != its:
            raise ValueError(f"average must be made for the net: it holds tensors of shapes {own}, the net has {its}")

    def update(self, module: nn.Module, step: int) -> None:
        """To be called after every step, with its number from 1 on."""
        k, rest = divmod(step, self.every)
        if rest == 0:
            averages = list(self.buffers())
            weights = [p.detach().to(a.dtype) for a, p in zip(averages, module.parameters(), strict=True)]
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + k) / (10 + k)))

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with their averages."""
        for average, weight in zip(self.buffers(), module.parameters(), strict=True):
            weight.copy_(average)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module has the averages for its parameters meanwhile."""
        parameters = list(module.parameters())
        own = [p.data for p in parameters]
        try:
            for p, average in zip(parameters, self.buffers(), strict=True):
                p.data = average.to(p.dtype)
            yield
        finally:
            for p, data in zip(parameters, own, strict=True):
                p.data = data
