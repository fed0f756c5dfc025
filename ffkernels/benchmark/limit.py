"""What the machine allows: the time that a case takes at the measured peak of arithmetic and of memory."""

from __future__ import annotations

import torch

from .. import backends
from ..checks import PRECISIONS


def require_extension() -> None:
    """Load the compiled kernels; RuntimeError says why there are none."""
    reason = backends.unavailable("cpu")
    if reason is not None:
        raise RuntimeError(f"the benchmarks need the CPU kernels: {reason}")


def peaks() -> dict[str, float]:
    """Floating-point operations a second of each precision's products: all threads, operands in registers."""
    return {p: torch.ops.ffkernels.cpu_peak(p, torch.get_num_threads()) for p in PRECISIONS}


def bandwidth(size: int) -> float:
    """Bytes a second to and from ``size`` bytes of memory, swept again and again by all threads."""
    return torch.ops.ffkernels.cpu_bandwidth(max(size, 4096), torch.get_num_threads())


def limit(flops: int, moved: int, peak: float, bandwidth: float) -> float:
    """Seconds that ``flops`` operations and ``moved`` bytes take at least."""
    return max(flops / peak, moved / bandwidth)
