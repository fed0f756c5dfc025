"""Tensors of a module that stay at least float32 when the module is cast, as optimizer state has to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .optim import state_dtype


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What Module._apply is given, changed so that a cast to bf16 or fp16 follows the device only."""

    def apply(t: Tensor) -> Tensor:
        moved = fn(t)
        dtype = state_dtype(moved.dtype)
        if moved.dtype == dtype:
            return moved
        return torch.empty_like(moved, dtype=dtype) if t.is_meta else t.to(moved.device, dtype)

    return apply


class OptimizerState(nn.Module):
    """Optimizer state as buffers: part of state_dict, follows .to(device), never below float32."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizerState:
        return super()._apply(at_least_float32(fn), recurse)

    def tensors(self) -> dict[str, Tensor]:
        return self._buffers  # type: ignore[return-value]  # none of them is None
