"""The compiled extension: loading it, what it was built from, and why it is not there where it is not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


@functools.cache
def unavailable() -> str | None:
    """Loads the extension at the first call, so that torch.ops holds its kernels. None, or why it cannot be used."""
    if not _LIBRARY.exists():
        return "the compiled extension is not built (FFKERNELS_BUILD=cpu at installation builds it, or says why not)"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the compiled extension does not load: {error}"
    return None


@functools.cache
def cpu_isa() -> dict[str, Any] | None:
    """The instruction sets that the CPU kernels can use here, from the lowest on, and the one that they use."""
    if unavailable():
        return None
    available, used = torch.ops.ffkernels.cpu_isa().split()
    return {"available": available.split(","), "used": used}


@functools.cache
def build_info() -> dict[str, Any] | None:
    """What the extension was built with: version, compiler, CUDA version and architectures, torch, sources."""
    return None if unavailable() else json.loads(torch.ops.ffkernels.build_info())


@functools.cache
def cuda_devices() -> dict[str, Any] | None:
    """What the CUDA runtime in the extension sees: driver, runtime, devices, and an error where they cannot be used."""
    return None if unavailable() else json.loads(torch.ops.ffkernels.cuda_devices())
