"""From CUDA C++ to PTX, without a GPU."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from .driver import load
from .engine import cache_dir


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
