"""Which backend runs an op, and why.

Every op is registered once a backend, as an overload of the same name (``ffkernels::ff_forward.reference``, ``.cpu``,
...). The ``default`` overload chooses when it runs; the public functions choose before the call, which is cheaper.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from . import _extension
from .triton import device as triton_device

BACKENDS = ("reference", "cpu", "triton", "cuda")
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# the order in which "auto" asks, fastest first; reference is always there
_AUTO_ORDER = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Kernel:
    """What one backend can do for one op."""

    devices: tuple[str, ...] | None  # device types; None: any
    dtypes: tuple[torch.dtype, ...]


def _no_kernels(name: str) -> Callable[[], str | None]:
    return lambda: None if any(backend == name for _, backend in _KERNELS) else "this version has no kernels for it"


def _cpu_unavailable() -> str | None:
    reason = _extension.unavailable()
    if reason is not None:
        return reason
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in _CPU_OPS if not has_kernel(f"ffkernels::{op}.cpu", "CPU")]
    if missing:  # an extension left over from an older version beside newer Python files
        return f"the compiled extension is out of date: it lacks {', '.join(missing)}; build it again"
    return None


_KERNELS: dict[tuple[str, str], Kernel] = {}
_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": _cpu_unavailable,
    "triton": triton_device.unavailable,
    "cuda": _no_kernels("cuda"),
}
_chosen: dict[tuple[str, str, torch.dtype], Callable] = {}  # what kernel() has found under the present setting


def register(backend: str, op: str, *, devices: tuple[str, ...] | None, dtypes: tuple[torch.dtype, ...]) -> None:
    """Say that ``ffkernels::<op>.<backend>`` is implemented, for which device types and dtypes."""
    _KERNELS[op, backend] = Kernel(devices, dtypes)


_CPU_OPS = (
    "ff_forward",
    "ff_grad",
    "ff_update_",
    "ff_step_",
    "ff_network_step_",
    "ff_label_forward",
    "ff_label_step_",
    "apply_gradient_",
)
for _op in _CPU_OPS:
    register("cpu", _op, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))
    # Triton's interpreter multiplies the bit patterns of bf16
    bf16 = () if triton_device.interpreting() else (torch.bfloat16,)
    register("triton", _op, devices=("cuda",), dtypes=(torch.float32, torch.float16, *bf16))


def unavailable(backend: str) -> str | None:
    """Why this machine or build cannot run ``backend``; None if it can."""
    return _UNAVAILABLE[backend]()


def refusal(backend: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on such tensors; None if it can."""
    reason = unavailable(backend)
    if reason is not None:
        return reason
    found = _KERNELS.get((op, backend))
    if found is None:
        return f"it has no kernel for {op}"
    if (
        found.devices is not None
        and device not in found.devices
        and not (backend == "triton" and device in triton_device.stand_ins())
    ):
        return f"its {op} runs on {'/'.join(found.devices)} tensors, not on {device}"
    if dtype not in found.dtypes:
        return f"its {op} takes {', '.join(str(d) for d in found.dtypes)}, not {dtype}"
    return None


def _setting(name: object, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {['auto', *BACKENDS]}, got {name!r}")
    return str(name)


_current: str | None = None  # None until first needed: FFKERNELS_BACKEND, then "auto"


def current_backend() -> str:
    """The present setting: "auto" or a backend's name."""
    global _current
    if _current is None:
        _current = _setting(os.environ.get("FFKERNELS_BACKEND") or "auto", "environment variable FFKERNELS_BACKEND")
    return _current


class use_backend:
    """Choose the backend of all ops, from now on or for a ``with`` block. The setting is one a process.

    Args:
        name: "auto" (the fastest that can run, never an error), "reference", "cpu", "triton" or "cuda". The environment
            variable FFKERNELS_BACKEND sets the initial value.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that this machine or build cannot run; the message says why. The setting is unchanged.
    """

    def __init__(self, name: str) -> None:
        _setting(name, "backend")
        if name != "auto" and (reason := unavailable(name)) is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
        self.name = name
        self._before = current_backend()
        _switch(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._before)


def _switch(name: str) -> None:
    global _current
    _current = name
    _chosen.clear()


def _select(op: str, device: str, dtype: torch.dtype, setting: str | None = None) -> tuple[str, list[str]]:
    """The backend that runs ``op`` under ``setting`` (None: the present one), and what spoke against others."""
    setting = setting or current_backend()
    order = _AUTO_ORDER if setting == "auto" else (setting,)
    against: list[str] = []
    for backend in order:
        reason = refusal(backend, op, device, dtype)
        if reason is None and setting == "auto" and backend == "triton" and device == "cpu":
            reason = "interpreted kernels are for tests"
        if reason is None:
            return backend, against
        against.append(f"{backend}: {reason}")
    raise RuntimeError(f"{op}: backend {setting!r} cannot run it: {against[0].split(': ', 1)[1]}")


def kernel(op: str, x: Tensor) -> Callable:
    """The registered overload of ``op`` that runs for tensors like ``x``."""
    key = (op, x.device.type, x.dtype)
    found = _chosen.get(key)
    if found is None:
        backend, _ = _select(*key)
        found = _chosen[key] = getattr(getattr(torch.ops.ffkernels, op), backend)
    return found


def explain(op: str, x: Tensor) -> str:
    """A sentence that says which backend runs ``op`` for tensors like ``x``, and why not another one."""
    backend, against = _select(op, x.device.type, x.dtype)
    why = f"setting {current_backend()!r}" + (f"; not {', not '.join(against)}" if against else "")
    return f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')} runs on {backend!r} ({why})"


def has_matrix_units(device: torch.device) -> bool:
    """Whether bf16 products run on units of their own there: AMX on a CPU, tensor cores (sm_80 on) on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    isa = _extension.cpu_isa()
    return device.type == "cpu" and isa is not None and isa["used"] == "amx"


def ops_of(backend: str) -> list[str]:
    """Names of the ops that ``backend`` implements."""
    return sorted(op for op, b in _KERNELS if b == backend)


def info() -> dict[str, object]:
    """What was built, what this machine can run and what "auto" would choose: plain values, as JSON holds them."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    setting = current_backend()

    def automatic(device: str) -> dict[str, str]:
        return {op: _select(op, device, torch.float32, "auto")[0] for op in ops_of("reference")}

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": setting,
        "build": _extension.build_info(),
        "cpu_isa": _extension.cpu_isa(),
        "cuda": _extension.cuda_devices(),
        "backends": {
            name: {"available": unavailable(name) is None, "reason": unavailable(name), "ops": ops_of(name)}
            for name in BACKENDS
        },
        "auto": {device: automatic(device) for device in devices},
    }
