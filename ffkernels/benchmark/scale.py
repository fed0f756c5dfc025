"""Step times of many devices, predicted: data parallel, layer pipelines and both, for FF and for backpropagation.

Plain arithmetic on counted flops and bytes (`ffkernels.cost`), datasheet rates and the assumptions below; nothing here
is measured. A product runs at EFFICIENCY of its peak; a layer's time is the longer of its arithmetic and its memory
traffic. A link's time is latency + bytes / rate. An all-reduce of n devices sends each byte 2 (n - 1) / n times over
the slowest link that it needs, and has 2 log2(n) latencies: the rate of a ring, the latency of a tree.

FF trains on two rows for each image, with two products a layer: 4 units of work. Backpropagation trains on one row with
three products (two in the first layer). Neither counts its loss, its normalisation or its input pipeline.

    data parallel   a layer's all-reduce follows its gradient, one after the other beside the computation. FF: the
                    first layer's gradient is there first, and each layer must be reduced when its next step comes.
                    Backpropagation: the last layer's is there first; the first one's all-reduce is seen in full.
    pipeline        FF: stages never wait for what comes back: a step takes as long as its slowest stage.
                    Backpropagation with GPipe or 1F1B: (m + p - 1) / m of that, for m micro-batches and p stages;
                    the two differ in the activations that they keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cost import DEVICES, Device, Layer, minimum

EFFICIENCY = 0.5  # assumption: of the peak rate of products
DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Link:
    """What a device sends in one direction. latency is an assumption."""

    rate: float  # bytes a second
    latency: float  # seconds
    source: str


NODE = Link(450e9, 3e-6, "NVLink 4: 900 GB/s a GPU, both directions together (NVIDIA H100 datasheet)")
NETWORK = Link(50e9, 8e-6, "InfiniBand NDR: 400 Gb/s a port, one a GPU (NVIDIA DGX H100 datasheet)")


@dataclass(frozen=True)
class Net:
    """A network and its global minibatch."""

    sizes: tuple[int, ...]  # the input's width, then the layers'
    images: int  # of a global minibatch
    dtype: torch.dtype = torch.bfloat16
    slots: int = 2

    @property
    def layers(self) -> int:
        return len(self.sizes) - 1

    def layer(self, index: int, rows: int) -> Layer:
        return Layer(rows, self.sizes[index], self.sizes[index + 1], dtype=self.dtype, slots=self.slots)

    def gradient_bytes(self, index: int) -> int:
        return 2 * self.sizes[index] * self.sizes[index + 1]  # sent in bf16


def link(devices: int) -> Link:
    """The slowest link among so many devices."""
    return NODE if devices <= DEVICES_PER_NODE else NETWORK


def all_reduce(size: float, devices: int) -> float:
    """Seconds; none for one device."""
    slowest = link(devices)
    return 2 * (devices - 1) / devices * size / slowest.rate + 2 * math.log2(devices) * slowest.latency


def seconds(flops: float, moved: float, launches: int, device: Device) -> float:
    return max(flops / (EFFICIENCY * device.rates["bf16"]), moved / device.bandwidth) + launches * device.launch_seconds


def layer_times(net: Net, kind: str, images: float, device: Device) -> list[tuple[float, float]]:
    """(forward, rest of the step) of each layer on ``images`` images; the rest has the gradients and the optimizer."""
    times = []
    for i in range(net.layers):
        rows = max(1, math.ceil(images * (2 if kind == "ff" else 1)))
        layer = net.layer(i, rows)
        forward, update = minimum("ff_forward", layer), minimum("ff_update_", layer)
        products = 1 if kind == "ff" or i == 0 else 2  # backpropagation also has the gradient of its input
        rest = seconds(products * update.flops, update.bytes, 1 + products, device)
        times.append((seconds(forward.flops, forward.bytes, 1, device), rest))
    return times


def data_parallel(net: Net, kind: str, devices: int, device: Device, steps: int = 8) -> float:
    """Seconds a step, after the first ones."""
    times = layer_times(net, kind, net.images / devices, device)
    reduces = [all_reduce(net.gradient_bytes(i), devices) for i in range(net.layers)]
    reduced = [0.0] * net.layers  # when each layer's gradient of the step before is there
    compute = wire = 0.0
    ends = []
    for _ in range(steps):
        if kind == "ff":
            for i, (forward, rest) in enumerate(times):
                compute = max(compute, reduced[i]) + forward + rest
                wire = reduced[i] = max(wire, compute) + reduces[i]
        else:
            for i, (forward, _) in enumerate(times):
                compute = max(compute, reduced[i]) + forward
            for i in reversed(range(net.layers)):
                compute += times[i][1]
                wire = reduced[i] = max(wire, compute) + reduces[i]
        ends.append(compute)
    return (ends[-1] - ends[1]) / (steps - 2)


def stage_times(net: Net, kind: str, stages: int, images: float, device: Device) -> list[float]:
    """Seconds of each stage for ``images`` images, layers divided evenly by cost (a layer may be cut)."""
    total = sum(f + r for f, r in layer_times(net, kind, images, device))
    return [total / stages] * stages


def pipeline(net: Net, kind: str, stages: int, micro_batches: int, device: Device, *, replicas: int = 1) -> float:
    """Seconds a step of ``replicas`` pipelines that share every minibatch.

    For "ff" minibatches stream through and stages reduce as data parallel ranks do; for "bp" a step ends when its last
    micro-batch has come back, and its reductions follow.
    """
    images = net.images / replicas / micro_batches
    slowest = max(stage_times(net, kind, stages, images, device))
    rows = math.ceil(images * (2 if kind == "ff" else 1))
    width = max(net.sizes[1:])
    sent = rows * width * net.dtype.itemsize
    hop = sent / link(stages * replicas).rate + link(stages * replicas).latency if stages > 1 else 0.0
    gradients = sum(net.gradient_bytes(i) for i in range(net.layers)) / stages
    reduce = all_reduce(gradients, replicas)
    if kind == "ff":
        return max(micro_batches * max(slowest, hop), reduce)
    return (micro_batches + stages - 1) * (slowest + 2 * hop * (stages > 1)) + reduce


def activations(kind: str, stages: int, micro_batches: int, schedule: str = "1f1b") -> int:
    """Micro-batches whose activations the first stage keeps at once."""
    if kind == "ff":
        return 1
    return micro_batches if schedule == "gpipe" else min(stages, micro_batches)


def best_of_both(net: Net, kind: str, devices: int, device: Device, micro_batches: int = 8) -> tuple[float, int]:
    """(seconds a step, stages) of the best division of ``devices`` into pipelines."""
    found = []
    for stages in (2**i for i in range(int(math.log2(devices)) + 1)):
        if stages <= net.layers and net.images >= devices // stages:
            replicas = devices // stages
            time = (
                data_parallel(net, kind, devices, device)
                if stages == 1
                else pipeline(net, kind, stages, micro_batches, device, replicas=replicas)
            )
            found.append((time, stages))
    return min(found)


def table(net: Net, counts: Sequence[int], device: str = "H100", micro_batches: int = 8) -> list[dict[str, float]]:
    """A row for each number of devices: seconds a step of every division, of FF and of backpropagation."""
    chip, rows = DEVICES[device], []
    for devices in counts:
        row: dict[str, float] = {"devices": devices}
        for kind in ("ff", "bp"):
            if net.images >= devices:
                row[f"{kind} data"] = data_parallel(net, kind, devices, chip)
            if devices <= net.layers:
                row[f"{kind} pipeline"] = pipeline(net, kind, devices, micro_batches, chip)
            row[f"{kind} both"], row[f"{kind} both, stages"] = best_of_both(net, kind, devices, chip, micro_batches)
        rows.append(row)
    return rows


def pipeline_on_cores(shares: Sequence[float], cores: int, minibatches: int) -> float:
    """How many times the throughput of one process an FF pipeline has whose stages, a thread each, share ``cores``.

    The first of the minibatches goes through all stages in turn; then the slowest stage, or the cores, set the pace.
    Messages cost nothing here: on one machine they are copies in memory.

    Args:
        shares: of the work of one process, by stage.
    """
    pace = max(*shares, sum(shares) / min(cores, len(shares))) if len(shares) > 1 else shares[0]
    return minibatches * sum(shares) / ((minibatches - 1) * pace + sum(shares))
