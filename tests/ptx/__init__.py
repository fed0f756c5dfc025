"""A PTX interpreter for tests: runs what nvcc and Triton compile, on the CPU, with every access checked."""

from .driver import In, LaunchError, Out, PtxFault, Struct, run
from .modifiers import Unsupported
from .nvcc import compile_cuda, kernels
from .report import Report
from .tensormap import TensorMap
from .triton_kernels import TritonKernel, compile_triton, run_compiled, run_triton, triton_launches

__all__ = [
    "In", "LaunchError", "Out", "PtxFault", "Report", "Struct", "TensorMap", "TritonKernel", "Unsupported",
    "compile_cuda", "compile_triton", "kernels", "run", "run_compiled", "run_triton", "triton_launches",
]  # fmt: skip
