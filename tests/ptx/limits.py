"""What a multiprocessor of each target holds (CUDA C++ Programming Guide, compute capabilities), and occupancy."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Per block and per multiprocessor."""

    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536
    threads_per_block: int = 1024
    static_shared: int = 49152


_KIB = 1024
_LIMITS = {
    80: Limits(163 * _KIB, 164 * _KIB, 64, 32),
    86: Limits(99 * _KIB, 100 * _KIB, 48, 16),
    89: Limits(99 * _KIB, 100 * _KIB, 48, 24),
    90: Limits(227 * _KIB, 228 * _KIB, 64, 32),
    100: Limits(227 * _KIB, 228 * _KIB, 64, 32),
    120: Limits(99 * _KIB, 100 * _KIB, 48, 24),
}


def limits(arch: int) -> Limits:
    """The limits of sm_<arch>."""
    if arch not in _LIMITS:
        raise ValueError(f"the limits of sm_{arch} are not known here; known: {', '.join(f'sm_{a}' for a in _LIMITS)}")
    return _LIMITS[arch]


def ptxas() -> str | None:
    """The assembler: on PATH, or the one that comes with Triton."""
    found = shutil.which("ptxas")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(path) if os.access(path, os.X_OK) else None


@functools.lru_cache(maxsize=256)
def registers(ptx: str, kernel: str, target: str) -> int:
    """Registers a thread of the compiled kernel, from ptxas."""
    tool = ptxas()
    if tool is None:
        raise RuntimeError(
            "co-residency of a cooperative grid needs the kernel's registers: pass registers=, or install ptxas"
        )
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [tool, "-v", f"-arch={target}", str(source), "-o", str(Path(tmp) / "kernel.cubin")],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas failed:\n{done.stderr[-2000:]}")
    entry = re.search(rf"Compiling entry function '{re.escape(kernel)}'.*?Used (\d+) registers", done.stderr, re.S)
    if entry is None:
        raise RuntimeError(f"ptxas -v does not tell the registers of {kernel}")
    return int(entry.group(1))


def blocks_per_sm(lim: Limits, threads: int, shared: int, regs: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    warps = -(-threads // 32)
    # registers are allotted to a warp in units of 256; shared memory in units of 128 bytes, and 1 KiB a block for
    # the system
    by_registers = lim.registers_per_sm // (-(-regs * 32 // 256) * 256 * warps) if regs else lim.blocks_per_sm
    by_shared = lim.shared_per_sm // (-(-(shared + 1024) // 128) * 128)
    return min(lim.blocks_per_sm, lim.warps_per_sm // warps, by_registers, by_shared)
