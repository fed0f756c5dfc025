"""Triton kernels without a GPU: compiled ahead of time, run singly or wherever code launches them."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from .driver import In, Out, load_kernel, run
from .report import Report
from .tensormap import TensorMap


@dataclass
class TritonKernel:
    """A compiled Triton kernel: what `run_compiled` needs to launch it."""

    name: str
    ptx: str
    shared: int
    num_warps: int
    global_scratch: int
    cooperative: bool
    parameters: list[int]  # indices into the arguments that reach the kernel
    descriptors: list[dict]  # how the tensor maps among them are made; empty where the target has none


_TRITON_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


def _unwrap(arg):
    return arg.tensor if isinstance(arg, (In, Out)) else arg


def _is_descriptor(arg) -> bool:
    """Whether this is Triton's TensorDescriptor, made on the host."""
    return hasattr(arg, "block_shape") and hasattr(arg, "base")


def _specialise(arg) -> tuple[str, list, Any]:
    """Triton's type of an argument, its attributes, and its value if it becomes a constant: as the JIT does it."""
    divisible = [["tt.divisibility", 16]]
    arg = _unwrap(arg)
    if isinstance(arg, torch.Tensor):
        return "*" + _TRITON_TYPES[arg.dtype], divisible if arg.data_ptr() % 16 == 0 else [], None
    if arg is None:
        return "constexpr", [], None
    if _is_descriptor(arg):
        return f"tensordesc<{_TRITON_TYPES[arg.base.dtype]}{list(arg.block_shape)}>".replace(" ", ""), [], None
    if isinstance(arg, bool):
        return "i1", [], None
    if isinstance(arg, int):
        if arg == 1:
            return "constexpr", [], 1
        return "i32" if -(1 << 31) <= arg < 1 << 31 else "i64", divisible if arg % 16 == 0 else [], None
    if isinstance(arg, float):
        return "fp32", [], None
    raise TypeError(f"no Triton type for {type(arg).__name__}")


def compile_triton(
    fn, args, constexprs: dict, arch: int = 80, num_warps: int = 4, num_stages: int = 3, **options
) -> TritonKernel:
    """Compiles a @triton.jit function for these arguments, specialised as its JIT would, for sm_<arch>.

    args are the positional arguments in order; constexprs names those that are tl.constexpr.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [n for n in fn.arg_names if n not in constexprs]
    if len(names) != len(args):
        raise TypeError(f"{fn.__name__} takes {', '.join(names)} besides its constants; {len(args)} arguments given")
    signature, attrs, constants, parameters = {}, {}, dict(constexprs), []
    values = dict(zip(names, args, strict=True))
    constexpr_params = {p.name for p in fn.params if p.is_constexpr}
    for index, name in enumerate(fn.arg_names):
        if name in constexprs or name in constexpr_params:
            signature[name] = "constexpr"
            if name not in constants:
                constants[name] = _unwrap(values[name])
            continue
        kind, attributes, value = _specialise(values[name])
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
            continue
        parameters.append(names.index(name))
        if attributes:
            attrs[(index,)] = attributes
    source = ASTSource(fn, signature, constexprs=constants, attrs=attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, **options},
        )
    meta = built.metadata
    return TritonKernel(
        meta.name, built.asm["ptx"], meta.shared, meta.num_warps, getattr(meta, "global_scratch_size", 0) or 0,
        bool(getattr(meta, "launch_cooperative_grid", False)), parameters, list(meta.tensordesc_meta),
    )  # fmt: skip


def _expand_descriptor(descriptor, meta: dict | None) -> list:
    """The parameters that Triton makes of a descriptor: a tensor map, or a pointer, then sizes and strides."""
    sizes, strides = list(descriptor.shape), list(descriptor.strides)
    if meta is None:
        flags = [descriptor.padding == "nan", descriptor.round_f32_to_tf32]
        return [descriptor.base, *sizes, *strides, *flags, *sizes, *strides]
    if meta["fp4_padded"] or meta.get("is_im2col") or descriptor.round_f32_to_tf32 or descriptor.padding != "zero":
        raise NotImplementedError("tensor descriptors are implemented for tiles padded with zeros")
    tensor = torch.as_strided(descriptor.base, sizes, strides)
    return [TensorMap(tensor, tuple(meta["block_size"]), (0, 32, 64, 128)[meta["swizzle"]]), *sizes, *strides]


def run_compiled(kernel: TritonKernel, grid, args, **kwargs) -> Report:
    """Runs a compiled Triton kernel; the two scratch pointers that Triton appends are added here."""
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    given: list[Any] = []
    descriptors = iter(kernel.descriptors)
    for index in kernel.parameters:
        arg = args[index]
        given += _expand_descriptor(arg, next(descriptors, None)) if _is_descriptor(arg) else [arg]
    size = kernel.global_scratch * math.prod(grid)
    scratch = Out(torch.empty(size, dtype=torch.uint8)) if size else None
    dynamic = max(kernel.shared - load_kernel(kernel.ptx, kernel.name).static_shared, 0)
    kwargs.setdefault("cooperative", kernel.cooperative)
    return run(kernel.ptx, kernel.name, grid, 32 * kernel.num_warps, dynamic, [*given, scratch, None], **kwargs)


def run_triton(
    fn, grid, args, constexprs: dict, *, arch: int = 80, num_warps: int = 4, num_stages: int = 3, options=None, **kwargs
) -> Report:
    """Compiles and runs a Triton kernel; further keywords are those of run()."""
    kernel = compile_triton(fn, args, constexprs, arch, num_warps, num_stages, **(options or {}))
    return run_compiled(kernel, grid, args, **kwargs)


@contextlib.contextmanager
def triton_launches(arch: int = 80, **run_options):
    """While open, launches of @triton.jit functions compile for sm_<arch> and run here; yields the list of their
    reports.

    The code around the kernels (grids, options, scratch tensors) runs as it is, on CPU tensors. run_options go to
    run().
    """
    from triton.runtime.jit import JITFunction

    reports: list[Report] = []

    def launch(self, *args, grid, warmup=False, **kwargs):
        names = self.arg_names
        given = dict(zip(names, args, strict=False))
        given.update((key, kwargs.pop(key)) for key in list(kwargs) if key in names)
        for param in self.params:
            if param.name not in given and param.has_default:
                given[param.name] = param.default
        constants = {p.name: given[p.name] for p in self.params if p.is_constexpr}
        rest = [given[name] for name in names if name not in constants]
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        kernel = compile_triton(self, rest, constants, arch, **options, **kwargs)
        size = grid({**given, **options}) if callable(grid) else grid
        reports.append(run_compiled(kernel, size, rest, **run_options))

    original = JITFunction.run
    JITFunction.run = launch
    try:
        yield reports
    finally:
        JITFunction.run = original
