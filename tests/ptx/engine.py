"""Builds the C++ engine with g++ and loads it. The build is cached by a hash of its sources, compiler and CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SOURCES = Path(__file__).parent / "engine"
# The library is built where it runs, so -march=native is safe here; contraction would turn a * b + c into an fma.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall"]


class Region(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("data", ctypes.c_void_p), ("initial_state",
        ctypes.c_void_p),
        ("space", ctypes.c_uint32), ("writable", ctypes.c_uint32), ("track", ctypes.c_uint32), ("name",
        ctypes.c_char_p),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3)]
    _fields_ += [(name, ctypes.c_uint32) for name in (
        "file_bytes", "nregs", "local_bytes", "static_shared", "total_shared", "shift_shared", "shift_global",
        "sms", "resident",
        "cooperative", "uses_wgmma", "uses_async", "envreg1", "envreg2")]  # fmt: skip
    _fields_ += [("seed", ctypes.c_uint64)]


class FaultRecord(ctypes.Structure):
    _fields_ = [
        ("pc", ctypes.c_uint32), ("block", ctypes.c_uint32 * 3), ("thread", ctypes.c_uint32 * 3),
        ("kind", ctypes.c_char * 64), ("text", ctypes.c_char * 4000),
    ]  # fmt: skip


def cache_dir() -> Path:
    """Where compiled things are kept between runs: FFKERNELS_TEST_CACHE, or the user's cache directory."""
    root = os.environ.get("FFKERNELS_TEST_CACHE")
    path = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ffkernels-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _key(files: list[Path], gxx: str) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(FLAGS).encode())
    digest.update(subprocess.run([gxx, "--version"], capture_output=True, check=True).stdout)
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    digest.update(flags.encode())
    return digest.hexdigest()[:24]


@functools.cache
def library() -> ctypes.CDLL:
    """The engine, built if need be."""
    gxx = compiler()
    if gxx is None:
        raise RuntimeError("the PTX interpreter needs a C++17 compiler: g++, or the one that CXX names")
    files = sorted(SOURCES.glob("*.cpp"))
    path = cache_dir() / f"ptx_engine_{_key(files + sorted(SOURCES.glob('*.h')), gxx)}.so"
    if not path.exists():
        _build(gxx, files, path)
    lib = ctypes.CDLL(str(path))
    lib.ptx_create.restype = ctypes.c_void_p
    lib.ptx_same_value_writes.restype = lib.ptx_lane_conflicts.restype = ctypes.c_uint32
    return lib


def _build(gxx: str, files: list[Path], path: Path):
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        objects = [Path(tmp) / (f.stem + ".o") for f in files]

        def compile_one(job):
            source, target = job
            done = subprocess.run([gxx, *FLAGS, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ failed on {source.name}:\n{done.stderr[-4000:]}")

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(files, objects, strict=True)))
        shared = Path(tmp) / "engine.so"
        subprocess.run([gxx, "-shared", "-o", str(shared), *map(str, objects)], check=True)
        os.replace(shared, path)  # atomic: parallel test processes may build at once


@functools.cache
def handler(name: str) -> int:
    """The number of an engine handler, or -1."""
    return library().ptx_handler(name.encode())


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
