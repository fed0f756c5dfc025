"""Which backend runs an op, and why.

Every op is registered once a backend, as an overload of the same name (``ffkernels::ff_forward.reference``, ``.cpu``,
...). The ``default`` overload chooses when it runs; the public functions choose before the call, which is cheaper.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from . import _extension, minibatches
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


def _cpu_unavailable() -> str | None:
    reason = _extension.unavailable()
    if reason is not None:
        return reason
    return _out_of_date("cpu", "CPU")


def _out_of_date(backend: str, key: str) -> str | None:
    """An extension left over from an older version beside newer Python files."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op, b in _KERNELS if b == backend and not has_kernel(f"ffkernels::{op}.{backend}", key)]
    if missing:
        return f"the compiled extension is out of date: it lacks {', '.join(missing)}; build it again"
    return None


def _cuda_unavailable() -> str | None:
    reason = _extension.unavailable()
    if reason is not None:
        return reason
    build, seen = _extension.build_info() or {}, _extension.cuda_devices() or {}
    if build["cuda"] is None:
        return "the compiled extension was built without CUDA (FFKERNELS_BUILD=cuda builds it, or says why not)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if seen["driver"] is None:
        return "there is no NVIDIA driver"
    if seen["error"] is not None:
        return f"the CUDA driver {seen['driver']} cannot be used: {seen['error']}"
    if not seen["devices"]:
        return "there is no CUDA device"
    capability = seen["devices"][0]["capability"]
    if float(capability) < 8:
        return f"the GPU has compute capability {capability}, its kernels need 8.0 or newer"
    if seen["kernel_error"] is not None:
        archs = ", ".join(build["cuda_archs"])
        return f"the extension was compiled for {archs}, not for the GPU's {capability}: {seen['kernel_error']}"
    return _out_of_date("cuda", "CUDA")


_KERNELS: dict[tuple[str, str], Kernel] = {}
_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": _cpu_unavailable,
    "triton": triton_device.unavailable,
    "cuda": functools.cache(_cuda_unavailable),
}
_chosen: dict[tuple[str, str, torch.dtype], Callable] = {}  # what kernel() has found under the present setting
_possible: dict[tuple[str, str, torch.dtype], bool] = {}  # likewise of has_kernel()


def register(backend: str, op: str, *, devices: tuple[str, ...] | None, dtypes: tuple[torch.dtype, ...]) -> None:
    """Say that ``ffkernels::<op>.<backend>`` is implemented, for which device types and dtypes."""
    _KERNELS[op, backend] = Kernel(devices, dtypes)


_OPS = (
    "ff_forward",
    "ff_grad",
    "ff_update_",
    "ff_step_",
    "ff_network_step_",
    "ff_label_forward",
    "ff_label_step_",
    "apply_gradient_",
)
for _op in _OPS:
    register("cpu", _op, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))
    # Triton's interpreter multiplies the bit patterns of bf16
    bf16 = () if triton_device.interpreting() else (torch.bfloat16,)
    register("triton", _op, devices=("cuda",), dtypes=(torch.float32, torch.float16, *bf16))
    register("cuda", _op, devices=("cuda",), dtypes=(torch.float32, torch.bfloat16, torch.float16))
register("cpu", "ff_network_forward", devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))
for _op in ("ff_head_step_", "draw_other_labels", "draw_hard_inputs"):
    register("cpu", _op, devices=("cpu",), dtypes=(torch.float32,))


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
    if (reason := _elsewhere(backend, op, device)) is not None:
        return reason
    if dtype not in found.dtypes:
        return f"its {op} takes {', '.join(str(d) for d in found.dtypes)}, not {dtype}"
    return None


def _elsewhere(backend: str, op: str, device: str) -> str | None:
    """Whether the kernel that ``backend`` has for ``op`` is for other devices; None if not, or if there is none."""
    found = _KERNELS.get((op, backend))
    if found is None or found.devices is None or device in found.devices:
        return None
    if backend == "triton" and device in triton_device.stand_ins():
        return None
    return f"its {op} runs on {'/'.join(found.devices)} tensors, not on {device}"


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
        if current_backend() != self.name:  # it was made before, and another setting has followed
            self._before = current_backend()
            _switch(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._before)


def _switch(name: str) -> None:
    global _current
    _current = name
    _chosen.clear()
    _possible.clear()


def _select(op: str, device: str, dtype: torch.dtype, setting: str | None = None) -> tuple[str, list[str]]:
    """The backend that runs ``op`` under ``setting`` (None: the present one), and what spoke against others."""
    setting = setting or current_backend()
    order = _AUTO_ORDER if setting == "auto" else (setting,)
    against: list[str] = []
    for backend in order:
        # first what needs no look at the machine: to look at a GPU takes memory there, and spoils it for forks
        reason = _elsewhere(backend, op, device) if setting == "auto" else None
        reason = reason or refusal(backend, op, device, dtype)
        if reason is None and setting == "auto" and backend == "triton" and device == "cpu":
            reason = "interpreted kernels are for tests"
        if reason is None:
            return backend, against
        against.append(f"{backend}: {reason}")
    raise RuntimeError(f"{op}: backend {setting!r} cannot run it: {against[0].split(': ', 1)[1]}")


def kernel(op: str, x: Tensor) -> Callable:
    """What runs ``op`` on tensors like ``x``: a registered overload, or what chooses one by the arguments' shapes."""
    key = (op, x.device.type, x.dtype)
    found = _chosen.get(key)
    if found is None:
        backend, _ = _select(*key)
        found = _by_shape(op) if backend == "cuda" and _shape_decides(*key) else _overload(op, backend)
        _chosen[key] = found
    return found


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether the backend that runs ff_forward on tensors like ``x`` can run ``op`` too."""
    key = (op, x.device.type, x.dtype)
    found = _possible.get(key)
    if found is None:
        backend, _ = _select("ff_forward", *key[1:])
        found = _possible[key] = refusal(backend, *key) is None
    return found


def _overload(op: str, backend: str) -> Callable:
    from .registry import ENTRY_CHECKS, check_call

    overload = getattr(getattr(torch.ops.ffkernels, op), backend)
    if op == "ff_network_step_" and backend != "cuda":
        return minibatches.one_by_one(overload, functools.partial(check_call, op))
    if backend != "cuda" or os.environ.get("FFKERNELS_CHECK") != "1":
        return overload

    def checked(*args):  # the kernels of a GPU look at no value; the checks wait for it to do so
        ENTRY_CHECKS[op](*args)
        return overload(*args)

    return checked


def _shape_decides(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether both of a GPU's backends could run ``op``, none is asked for, and one may be faster than the other."""
    if current_backend() != "auto" or op == "apply_gradient_":  # which is one pass over the same memory on both
        return False
    return all(refusal(b, op, device, dtype) is None for b in ("cuda", "triton"))


def _by_shape(op: str) -> Callable:
    from . import choice

    overloads = {backend: _overload(op, backend) for backend in ("cuda", "triton")}

    def call(x, *args):
        return overloads[choice.predict_on(x, op, choice.layers_of_call(op, x, args)).faster](x, *args)

    return call


def explain(op: str, x: Tensor, *weights: Tensor, labelled: bool = False) -> str:
    """A sentence that says which backend runs ``op`` for tensors like ``x``, and why not another one.

    Args:
        x: of ff_network_step_ also (S, M, K), several minibatches.
        weights: of the layers, from the input on: where a GPU has two backends, their shapes decide. Labels count as a
            positive and a negative for each row of x.
        labelled: whether ff_network_step_ is given labels.
    """
    backend, against = _select(op, x.device.type, x.dtype)
    if backend == "cuda" and _shape_decides(op, x.device.type, x.dtype):
        if not weights:
            against.append("triton: unless it is predicted to be faster, which depends on the shapes of the weights")
        else:
            backend, reason = _explain_shapes(op, x, weights, labelled)
            against.append(reason)
    why = f"setting {current_backend()!r}" + (f"; not {', not '.join(against)}" if against else "")
    return f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')} runs on {backend!r} ({why})"


def _explain_shapes(op: str, x: Tensor, weights: tuple[Tensor, ...], labelled: bool) -> tuple[str, str]:
    from . import checks, choice

    candidates = 2 if labelled or "label" in op else 0
    layers = choice.layers_of(x, weights, [checks.precision(None)] * len(weights), candidates)
    predicted = choice.predict_on(x, op, layers)
    times = {"cuda": predicted.cuda * 1e6, "triton": predicted.triton * 1e6}
    slower = max(times, key=lambda name: times[name])
    return predicted.faster, (
        f"{slower}: for these shapes it is predicted to take {times[slower]:.0f} us, "
        f"{predicted.faster} {times[predicted.faster]:.0f} us"
    )


def has_bf16_products(device: torch.device) -> bool:
    """Whether precision "medium" multiplies bf16 there, at twice float32's rate or more.

    On a GPU on tensor cores (sm_80 on); on a CPU with AMX or AVX512-BF16, which shows in what the kernels compute:
    those for lesser instruction sets take float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or _extension.unavailable():
        return False
    x, one = (torch.tensor([[t]], dtype=torch.float32, device="cpu") for t in (1 + 2.0**-10, 1.0))
    y, _, _ = torch.ops.ffkernels.ff_forward.cpu(x, one, None, None, "none", 0.0, "relu", "medium", False)
    return y.item() != x.item()  # 1 + 2^-10 is no bf16


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
