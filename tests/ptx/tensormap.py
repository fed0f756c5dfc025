"""Tensor maps for bulk tensor copies: what cuTensorMapEncodeTiled makes on a machine with a driver."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
# the numbering of tensormap.replace's elemtype
ELEMENT_TYPES = {
    torch.uint8: 0, torch.int8: 0, torch.float8_e4m3fn: 0, torch.float8_e5m2: 0, torch.uint16: 1, torch.int16: 1,
    torch.uint32: 2,
    torch.int32: 3, torch.uint64: 4, torch.int64: 5, torch.float16: 6, torch.float32: 7, torch.float64: 9,
    torch.bfloat16: 10,
}  # fmt: skip


@dataclass
class TensorMap:
    """An argument of type CUtensorMap: boxes of a tensor.

    box has the tensor's order of dimensions, as Python writes it; the innermost must have stride 1.
    swizzle is the span in bytes: 0, 32, 64 or 128. output marks contents as uninitialised, as Out does.
    """

    tensor: torch.Tensor
    box: tuple[int, ...]
    swizzle: int = 0
    output: bool = False

    def encode(self, address: int) -> bytes:
        """The engine's 128 bytes (bulk.cpp has the same struct)."""
        t = self.tensor
        rank = t.dim()
        if len(self.box) != rank or not 1 <= rank <= 5 or t.stride(-1) != 1:
            raise ValueError("a tensor map needs 1 to 5 dimensions, a box of as many, and an innermost stride of 1")
        pad = [0] * (5 - rank)
        sizes, boxes = [*reversed(t.shape), *pad], [*reversed(self.box), *pad]
        strides = [s * t.element_size() for s in reversed(t.stride()[:-1])]
        strides += [0] * (4 - len(strides))
        head = struct.pack("<QBBBBB3x", address, rank - 1, ELEMENT_TYPES[t.dtype], 0, SWIZZLES[self.swizzle], 0)
        return (head + struct.pack("<5I5I5I4x4Q", *boxes, *sizes, *([1] * rank + pad), *strides)).ljust(128, b"\0")
