"""Optimizer state inside modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .optim import state_dtype


class OptimizerState(nn.Module):
    """Optimizer state as buffers: part of state_dict, follows .to(device), never below float32."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizerState:
        for name, t in self._buffers.items():
            assert t is not None
            moved = fn(t)
            dtype = state_dtype(moved.dtype)
            if moved.dtype != dtype:  # a cast of the weights to bf16 or fp16: the state follows the device only
                moved = torch.empty_like(moved, dtype=dtype) if t.is_meta else t.to(moved.device, dtype)
            self._buffers[name] = moved
        return self

    def tensors(self) -> dict[str, Tensor]:
        return self._buffers  # type: ignore[return-value]  # none of them is None
