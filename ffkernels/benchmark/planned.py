"""A case's launches as the kernels' own planners lay them out, as the cost model takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from .. import choice
from ..cost import Device, Launch
from ..triton import plan, tiles
from .cases import CLASSES, Case, op_of
from .formats import Format


def _launch(found: plan.Launch) -> Launch:
    return Launch(
        found.flops, found.bytes_read, found.bytes_written, 1, found.kernel, found.multiplying, found.rate,
        found.bytes_requested, found.resident,
    )  # fmt: skip


def _unit(width: int, fmt: Format, gpu: tiles.Device, kind: str) -> int:
    """Of matrices whose rows follow on one another, and start where memory is allocated."""
    return plan.unit(width, width, fmt.dtype.itemsize, 0, gpu, kind)


def triton_layers(case: Case, fmt: Format, gpu: tiles.Device) -> tuple[plan.Layer, ...]:
    """The case's layers as the Triton kernels' planner takes them."""
    dtype = str(fmt.dtype).removeprefix("torch.")
    kind = tiles.operands(dtype, fmt.precision)
    rows = case.batch * (CLASSES if case.kind == "predict" else 2)
    found = []
    for i, (k, n) in enumerate(pairwise(case.sizes)):
        labelled = case.labelled and i == 0
        found.append(
            plan.Layer(
                rows, k, n, dtype, fmt.precision, slots=case.slots, sqnorm_parts=int(i > 0),
                candidates=rows // case.batch if labelled else 0, num_classes=CLASSES if labelled else 0,
                x_unit=_unit(k, fmt, gpu, kind), w_unit=_unit(k, fmt, gpu, kind), y_unit=_unit(n, fmt, gpu, kind),
            )
        )  # fmt: skip
    return tuple(found)


def triton(case: Case, fmt: Format, device: Device) -> list[Launch] | None:
    """What the Triton kernels launch; a prediction is one pass, all images at once."""
    gpu = tiles.DEVICES[device.arch]
    layers = triton_layers(case, fmt, gpu)
    if case.kind != "predict":
        return [_launch(found) for found in plan.plan(op_of(case), layers, gpu)]
    ops = [op_of(case), *["ff_forward"] * (len(layers) - 1)]
    return [_launch(found) for op, layer in zip(ops, layers, strict=True) for found in plan.plan(op, layer, gpu)]


def cuda(case: Case, fmt: Format, device: Device) -> list[Launch] | None:
    """The stages of the CUDA kernels' one launch; None where they do not run. A prediction's passes are launches."""
    if not device.arch.startswith("sm_"):
        return None
    layers = triton_layers(case, fmt, tiles.DEVICES[device.arch])
    if case.kind != "predict":
        return list(choice.cuda_launches(op_of(case), layers))
    ops = [op_of(case), *["ff_forward"] * (len(layers) - 1)]
    return [found for op, layer in zip(ops, layers, strict=True) for found in choice.cuda_launches(op, [layer])]


PLANNERS: dict[str, Callable[[Case, Format, Device], list[Launch] | None]] = {"triton": triton, "cuda": cuda}


def as_used_by(backend: str, device: Device) -> Device:
    """The device with the rates that the backend's instructions can reach (choice.MMA_SYNC_SHARE)."""
    if backend != "cuda":
        return device
    share = choice.MMA_SYNC_SHARE.get(int(device.arch.removeprefix("sm_")) // 10 * 10, 1.0)
    rates = {name: rate * (1 if name == "fp32" else share) for name, rate in device.rates.items()}
    return replace(device, rates=rates)
