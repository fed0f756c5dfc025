"""From source to PTX without a GPU: nvcc for CUDA C++, Triton's ahead-of-time compiler for Triton kernels."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .driver import In, Out, load, load_kernel, run
from .engine import cache_dir
from .report import Report


def nvcc() -> str | None:
    """The CUDA compiler, on PATH or in its usual place."""
    usual = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (usual if Path(usual).exists() else None)


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compile_cuda(source: str | Path, arch: str = "sm_80", includes=(), flags=()) -> str:
    """The PTX of a CUDA source, given as text or as a path.

    Cached by content: of the source, the flags, the compiler, and every included file outside the toolkit and the
    system.
    """
    if nvcc() is None:
        raise RuntimeError("nvcc is needed to compile CUDA kernels; it is neither on PATH nor in /usr/local/cuda/bin")
    is_path = isinstance(source, Path)
    text = source.read_text() if is_path else source
    options = ["-ptx", f"-arch={arch}", "-lineinfo", "-std=c++17", *(f"-I{i}" for i in includes), *flags]
    if is_path:
        options.append(f"-I{source.parent}")
    key = _digest("\0".join([text, *options, _nvcc_version()]).encode())[:32]
    stored = cache_dir() / f"{key}.json"
    if stored.exists():
        entry = json.loads(stored.read_text())
        if all(Path(p).exists() and _digest(Path(p).read_bytes()) == d for p, d in entry["depends"].items()):
            return entry["ptx"]
    with tempfile.TemporaryDirectory() as tmp:
        # a stable name keeps positions in messages readable
        path = source.resolve() if is_path else Path(tmp) / "kernel.cu"
        if not is_path:
            path.write_text(text)
        name = str(path) if is_path else path.name
        ptx, deps = Path(tmp) / "kernel.ptx", Path(tmp) / "kernel.d"
        done = subprocess.run(
            [nvcc(), *options, "-MD", "-MF", str(deps), "-o", str(ptx), name],
            capture_output=True,
            text=True,
            cwd=tmp,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr[-4000:]}")
        names = deps.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        own = [
            n
            for n in names
            if not n.startswith(("/usr/", str(Path(nvcc()).resolve().parents[1]))) and Path(tmp, n) != path
        ]
        entry = {
            "ptx": ptx.read_text().replace(f"{tmp}/", ""),
            "depends": {n: _digest(Path(n).read_bytes()) for n in own},
        }
    part = stored.with_suffix(f".{_digest(text.encode())[:8]}.tmp")
    part.write_text(json.dumps(entry))
    part.replace(stored)
    return entry["ptx"]


def kernels(ptx: str) -> list[str]:
    """The names of a module's kernels (C++ names are mangled)."""
    return [f.name for f in load(ptx).functions.values() if f.entry]


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


_TRITON_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}  # fmt: skip


def _unwrap(arg):
    return arg.tensor if isinstance(arg, (In, Out)) else arg


def _specialise(arg) -> tuple[str, list, Any]:
    """Triton's type of an argument, its attributes, and its value if it becomes a constant: as the JIT does it."""
    divisible = [["tt.divisibility", 16]]
    arg = _unwrap(arg)
    if isinstance(arg, torch.Tensor):
        return "*" + _TRITON_TYPES[arg.dtype], divisible if arg.data_ptr() % 16 == 0 else [], None
    if arg is None:
        return "constexpr", [], None
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
        bool(getattr(meta, "launch_cooperative_grid", False)), parameters,
    )  # fmt: skip


def run_compiled(kernel: TritonKernel, grid, args, **kwargs) -> Report:
    """Runs a compiled Triton kernel. The two pointers that Triton appends (global and profiling scratch) are added
    here.
    """
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    blocks = 1
    for n in grid:
        blocks *= n
    given = [args[i] for i in kernel.parameters]
    scratch = (
        Out(torch.empty(max(kernel.global_scratch * blocks, 1), dtype=torch.uint8)) if kernel.global_scratch else None
    )
    static = load_kernel(kernel.ptx, kernel.name).static_shared
    kwargs.setdefault("cooperative", kernel.cooperative)
    return run(
        kernel.ptx,
        kernel.name,
        grid,
        32 * kernel.num_warps,
        max(kernel.shared - static, 0),
        [*given, scratch, None],
        **kwargs,
    )


def run_triton(
    fn, grid, args, constexprs: dict, *, arch: int = 80, num_warps: int = 4, num_stages: int = 3, options=None, **kwargs
) -> Report:
    """Compiles and runs a Triton kernel; further keywords are those of run()."""
    kernel = compile_triton(fn, args, constexprs, arch, num_warps, num_stages, **(options or {}))
    return run_compiled(kernel, grid, args, **kwargs)
