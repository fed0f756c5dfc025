"""Whether a GPU runs an op on the CUDA C++ kernels or on Triton's, by shape: what the cost model predicts to be faster.

The CUDA kernels do an op in one launch, with a barrier between stages, on tiles of 64 x 64. Triton takes a launch or
more for each product, on larger tiles, which ask L2 for less. So the first win where launches cost more than
arithmetic, the second where a product is large. Every time here is predicted (cost.py), and none was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import cost
from . import minibatches as several
from .triton import plan as triton_plan
from .triton.plan import Layer
from .triton.tiles import DEVICES, nearest

TILE = 64
# Assumption: the part of the datasheet's tensor rate that mma.sync reaches, which the CUDA kernels use everywhere.
# From sm_90 on the full rate asks for instructions of the architecture's own (wgmma, tcgen05), which Triton emits.
MMA_SYNC_SHARE = {90: 0.6, 100: 0.3}
BLOCKS = 3  # that share a multiprocessor: what the kernels are compiled for
MOST_LAYERS = 8  # of a launch
BEHIND = 2  # stages from one minibatch of a launch to the next


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one call."""

    cuda: float
    triton: float

    @property
    def faster(self) -> str:
        return "cuda" if self.cuda <= self.triton else "triton"


def _tiles(n: int) -> int:
    return -(-n // TILE)


def cuda_launches(op: str, layers: Sequence[Layer], minibatches: int = 1) -> tuple[cost.Launch, ...]:
    """The stages of the one launch as the cost model takes them; those after the first cost a barrier, not a launch.

    Each of several minibatches has these stages, a few behind the one before: what falls together is one stage.
    """
    one = _stages_of_one(op, layers)
    if len(layers) > MOST_LAYERS or len({triton_plan._rate(la) for la in layers}) > 1:  # several launches, in turn
        return one * minibatches
    together: list[list[cost.Launch]] = [[] for _ in range(len(one) + BEHIND * (minibatches - 1))]
    for i in range(minibatches):
        for at, stage in enumerate(one, BEHIND * i):
            together[at].append(stage)
    first, *rest = (_beside(stages) for stages in together)
    return (first, *(replace(stage, launches=0, barriers=1) for stage in rest))


def _beside(stages: Sequence[cost.Launch]) -> cost.Launch:
    """The work of several stages as one."""
    total = {
        name: sum(getattr(s, name) for s in stages)
        for name in ("flops", "bytes_read", "bytes_written", "bytes_requested")
    }
    return replace(stages[0], grid=(sum(s.grid[0] for s in stages),), **total)


def _stages_of_one(op: str, layers: Sequence[Layer]) -> tuple[cost.Launch, ...]:
    stages = [cost.Launch(0, 0, 0, launches=0, barriers=1, kernel="ff_stages", resident=BLOCKS) for _ in layers]
    stages.append(stages[0])

    def add(i: int, tiles: int, depth: int, layer: Layer, read: int, written: int) -> None:
        s = stages[i]
        stages[i] = replace(
            s, flops=s.flops + 2 * tiles * TILE * TILE * _tiles(depth) * TILE, bytes_read=s.bytes_read + read,
            bytes_written=s.bytes_written + written, grid=((s.grid[0] if s.grid else 0) + tiles,),
            bytes_requested=s.bytes_requested + tiles * 2 * TILE * depth * layer.item, rate=triton_plan._rate(layer),
        )  # fmt: skip

    for i, la in enumerate(layers):
        x, y, w = la.inputs * la.depth * la.item, la.rows * la.cols * la.item, la.depth * la.cols * la.item
        if op not in ("ff_grad", "ff_update_"):
            add(i, _tiles(la.inputs) * _tiles(la.cols), la.depth, la, x + w, y)
        if op not in ("ff_forward", "ff_label_forward"):
            state = w if op == "ff_grad" else la.parameters()
            read = x + (0 if op == "ff_grad" else state)
            if i + 1 == len(layers):  # otherwise the next layer's forward reads y in the same stage
                read += y
            add(i + 1, _tiles(la.cols) * _tiles(la.depth), la.inputs, la, read, state)
    used = [s for s in stages if s.grid]
    return (replace(used[0], launches=1, barriers=0), *used[1:])


def _triton_launches(op: str, layers: Sequence[Layer], arch: str) -> list[cost.Launch]:
    return [
        cost.Launch(
            launch.flops,
            launch.bytes_read,
            launch.bytes_written,
            kernel=launch.kernel,
            grid=launch.multiplying,
            rate=launch.rate,
            bytes_requested=launch.bytes_requested,
            resident=launch.resident,
        )
        for launch in triton_plan.plan(op, tuple(layers), DEVICES[nearest(arch)])
    ]


def _datasheet(arch: str, multiprocessors: int) -> cost.Device:
    """The GPU of the cost model that is most like this one."""
    number = int(arch.removeprefix("sm_"))
    consumer = number in (86, 87, 88, 89) or number >= 120
    like = "sm_89" if consumer else "sm_80" if number < 90 else "sm_90" if number < 100 else "sm_100"
    device = next(d for d in cost.DEVICES.values() if d.arch == like)
    share = multiprocessors / device.multiprocessors
    return replace(
        device, multiprocessors=multiprocessors, rates={name: rate * share for name, rate in device.rates.items()}
    )


@functools.lru_cache(maxsize=4096)
def predict(op: str, layers: tuple[Layer, ...], arch: str, multiprocessors: int, minibatches: int = 1) -> Prediction:
    """Both backends' predicted times for ``op`` on a GPU of ``arch`` ("sm_90") with so many multiprocessors."""
    device = _datasheet(arch, multiprocessors)
    number = int(arch.removeprefix("sm_"))
    share = MMA_SYNC_SHARE.get(number // 10 * 10, 1.0)
    rates = {name: rate * (share if name != "fp32" else 1) for name, rate in device.rates.items()}
    return Prediction(
        cost.predicted(cuda_launches(op, layers, minibatches), replace(device, rates=rates)),
        minibatches * cost.predicted(_triton_launches(op, layers, arch), device),
    )


@functools.cache
def _positions(op: str) -> tuple[int, int]:
    """Where the flat arguments behind x hold the weight (or the list of weights) and the precision."""
    names = [argument.name for argument in getattr(torch.ops.ffkernels, op).default._schema.arguments[1:]]
    plural = "s" if "weights" in names else ""
    return names.index(f"weight{plural}"), names.index(f"precision{plural}")


def layers_of(
    x: Tensor,
    weights: Sequence[Tensor],
    precisions: Sequence[str],
    candidates: int,  # rows of y that share a row of x; 0: no labels
) -> tuple[Layer, ...]:
    """The layers of a call by their sizes."""
    rows, dtype = x.shape[-2] * max(candidates, 1), str(x.dtype).removeprefix("torch.")
    return tuple(
        Layer(rows, w.shape[1], w.shape[0], dtype, precision, candidates=candidates if i == 0 else 0)
        for i, (w, precision) in enumerate(zip(weights, precisions, strict=True))
    )


def layers_of_call(op: str, x: Tensor, args: Sequence[Any]) -> tuple[Layer, ...]:
    """The layers of a call of the registered op, from its flat arguments behind x."""
    at, precision_at = _positions(op)
    candidates = 0
    if op == "ff_network_step_":
        return layers_of(x, args[at], args[precision_at], 0 if args[2] is None else 2)
    if op == "ff_label_forward":
        candidates = args[0].shape[1]
    elif op == "ff_label_step_":
        candidates = 2
    return layers_of(x, [args[at]], [args[precision_at]], candidates)


@functools.cache
def _gpu(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def predict_on(x: Tensor, op: str, layers: tuple[Layer, ...]) -> Prediction:
    """`predict` for the GPU that holds x."""
    return predict(op, layers, *_gpu(x.device.index), several.count(x))
