"""How an op is registered with torch, and how the public functions call it.

An op is registered once a backend, as an overload of its name. Its definition is its schema, its fake kernel and two
checks of its arguments; ops.py, label_ops.py, network.py and head_step.py hold one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks

_LIBRARY = torch.library.Library("ffkernels", "DEF")

_CHECKS: dict[str, Callable] = {}
ENTRY_CHECKS: dict[str, Callable] = {}
_WRITTEN: dict[str, list[int]] = {}  # the arguments that an op changes in place


def define(
    op: str,
    schema: str,
    compute: Callable,
    fake: Callable,
    check: Callable,
    entry_check: Callable = lambda *args: None,
) -> None:
    """Register ``op``: its schema for every backend, the fake kernel, ``compute`` as its reference, and the choice
    at run time.

    ``check`` and ``entry_check`` take the flat arguments. The first looks at shapes, dtypes, devices and options, the
    second at what a traced call cannot see or a GPU is not asked for: overlaps and values.
    """
    _CHECKS[op], ENTRY_CHECKS[op] = check, entry_check

    def run_reference(*args: Any) -> Any:
        check_call(op, *args)
        device = _first(args[0]).device.type
        if not torch.is_autocast_enabled(device):
            return compute(*args)
        with torch.autocast(device, enabled=False):  # else the products below would take it for theirs
            return compute(*args)

    def run_triton(*args: Any) -> Any:
        from .triton import launch  # imports triton

        if _first(args[0]).is_cpu:  # interpreted; call() has looked at those of a GPU
            check(*args)
        entry_check(*args)
        return getattr(launch, op)(*args)

    def run_fake(*args: Any) -> Any:
        _check_one_device(args)
        return fake(*args)

    for overload in ("", *(f".{b}" for b in backends.BACKENDS)):
        _LIBRARY.define(f"{op}{overload}{schema}", tags=torch.Tag.needs_fixed_stride_order)
        torch.library.register_fake(f"ffkernels::{op}{overload}", run_fake, lib=_LIBRARY)
    arguments = getattr(torch.ops.ffkernels, op).default._schema.arguments
    _WRITTEN[op] = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    _LIBRARY.impl(f"{op}.reference", run_reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{op}.triton", run_triton, "CompositeExplicitAutograd")
    _LIBRARY.impl(op, lambda *args: backends.kernel(op, _first(args[0]))(*args), "CompositeExplicitAutograd")
    backends.register("reference", op, devices=None, dtypes=backends.ALL_DTYPES)


def check_call(op: str, *args: Any) -> None:
    _CHECKS[op](*args)
    ENTRY_CHECKS[op](*args)


def _check_one_device(args: Sequence[Any]) -> None:
    """One tensor on "meta" among others makes torch run the fake kernel instead of the real one."""
    lists = [a if isinstance(a, (list, tuple)) else (a,) for a in args]
    devices = {t.device for each in lists for t in each if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


def _first(x: Tensor | list[Tensor]) -> Tensor:
    """The tensor whose device and dtype decide which backend runs."""
    return x[0] if isinstance(x, list) else x


def call(op: str, x: Tensor | list[Tensor], *args: Any) -> Any:
    """Run ``op`` on the chosen backend; under torch.compile the choice is left to the moment when it runs.

    Arguments are checked here only where the kernel does not do it. Kernels for CPU tensors see for themselves whether
    they can run, at no cost, but refuse in few words: then the checks say in full what is wrong.
    """
    if torch.compiler.is_compiling():
        _CHECKS[op](x, *args)
        return getattr(torch.ops.ffkernels, op).default(x, *args)
    first = _first(x)
    if type(first) not in checks.PLAIN or not first.is_cpu:
        _CHECKS[op](x, *args)
    try:
        result = backends.kernel(op, first)(x, *args)
    except (RuntimeError, TypeError) as error:
        refusal = error
    else:
        for i in _WRITTEN[op]:  # the kernels write past autograd, which must know when what it saved has changed
            written = args[i - 1] if i else x
            if written is not None:
                torch._C._increment_version(written if isinstance(written, list) else (written,))
        return result
    try:
        check_call(op, x, *args)
        raise refusal
    finally:
        del refusal  # through its traceback it would keep this frame, and with it all arguments, alive
