"""The types of tensors and products in which the suite runs on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import cost


@dataclass(frozen=True)
class Format:
    """Tensors and products of a run."""

    name: str
    dtype: torch.dtype
    precision: str  # of float32 products

    @property
    def rate(self) -> str:
        return cost.rate_name(self.dtype, self.precision)

    @property
    def tolerance(self) -> str:
        """Which of check.TOLERANCE applies."""
        return self.precision if self.dtype == torch.float32 else "medium"


FORMATS = {
    f.name: f
    for f in (
        Format("bf16", torch.bfloat16, "highest"),
        Format("fp16", torch.float16, "highest"),
        Format("medium", torch.float32, "medium"),
        Format("high", torch.float32, "high"),
        Format("highest", torch.float32, "highest"),
    )
}
