"""A PTX interpreter for tests: runs what nvcc and Triton compile, on the CPU, with every access checked."""

from .compilers import TritonKernel, compile_cuda, compile_triton, kernels, run_compiled, run_triton
from .decode import Unsupported
from .driver import In, LaunchError, Out, PtxFault, run
from .report import Report

__all__ = [
    "In", "LaunchError", "Out", "PtxFault", "Report", "TritonKernel", "Unsupported", "compile_cuda", "compile_triton", "kernels",
    "run", "run_compiled", "run_triton",
]  # fmt: skip
