"""A PTX interpreter for tests: runs what nvcc and Triton compile, on the CPU, with every access checked."""

from .compilers import TritonKernel, compile_cuda, compile_triton, kernels, run_compiled, run_triton
from .decode import Unsupported
from .driver import In, LaunchError, Out, PtxFault, run
from .launches import triton_launches
from .report import Report
from .tensormap import TensorMap

__all__ = [
    "In", "LaunchError", "Out", "PtxFault", "Report", "TensorMap", "TritonKernel", "Unsupported", "compile_cuda",
    "compile_triton", "kernels",
    "run", "run_compiled", "run_triton", "triton_launches",
]  # fmt: skip
