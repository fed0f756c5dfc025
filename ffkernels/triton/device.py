"""Which GPU a tensor is on, as the choice of tiles sees it; and which GPU stands in for one where there is none."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from .tiles import DEVICES, Device, nearest

MIN_VERSION = (3, 4)
_stand_in: Device | None = None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """Why this installation cannot run Triton kernels on any tensor; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < MIN_VERSION:
            return f"triton {found} is installed, {'.'.join(map(str, MIN_VERSION))} or newer is needed"
    return None


@functools.cache
def no_start() -> str | None:
    """Why Triton's driver does not start on this machine; None if it does.

    It compiles a module of its own when it is first used, for which a machine with a GPU may lack what that takes.
    """
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018
    except Exception as error:  # of any kind: a subprocess's, an assertion
        needs = "it needs a C compiler, Python.h and a libcuda.so.1 that ldconfig knows"
        return f"Triton does not start ({needs}): {type(error).__name__}: {error}"
    return None


def unavailable() -> str | None:
    """Why the backend cannot run here; None if it can."""
    if (reason := missing()) is not None:
        return reason
    if torch.cuda.is_available():
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "the GPU is older than sm_80"
        return no_start()
    return None if _stand_in is not None or interpreting() else "there is no CUDA or HIP device"


def stand_ins() -> tuple[str, ...]:
    """The device types whose tensors are taken for a GPU's."""
    return ("cpu",) if _stand_in is not None or interpreting() else ()


@functools.cache
def _of_index(index: int) -> Device:
    props = torch.cuda.get_device_properties(index)
    arch = props.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{props.major}{props.minor}"
    return replace(DEVICES[nearest(arch)], sms=props.multi_processor_count)


def describe(device: torch.device) -> Device:
    """The GPU that ``device`` is, or that stands in for it on a CPU."""
    if device.type == "cuda":
        return _of_index(device.index if device.index is not None else torch.cuda.current_device())
    if _stand_in is not None:
        return _stand_in
    if device.type == "cpu" and interpreting():
        return DEVICES["sm_80"]
    raise RuntimeError(f"Triton kernels run on CUDA and HIP tensors, not on {device}")


@contextlib.contextmanager
def stand_in(device: Device | str) -> Iterator[Device]:
    """While open, CPU tensors are taken for tensors on ``device``, for whoever intercepts the launches (tests)."""
    global _stand_in
    before, _stand_in = _stand_in, DEVICES[device] if isinstance(device, str) else device
    try:
        yield _stand_in
    finally:
        _stand_in = before
