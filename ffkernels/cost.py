"""What an op costs on a GPU: flops, bytes and launches, the least possible and as planned, and the time they predict.

Plain arithmetic, for choosing kernels and for tables. Every time that this module gives is predicted: it follows from
rates in datasheets and from the assumptions named below, and from no measurement.

    limit     = max(flops / peak, bytes / memory bandwidth), of the least flops and bytes: nothing can be faster
    predicted = sum over launches of
                launch_seconds + barriers barrier_seconds + waves fill_seconds
                + max(flops on the busiest multiprocessor / its peak, bytes / memory bandwidth, loads / L2 bandwidth)

A launch's bytes are distinct bytes, all of them charged to memory, although what a launch has just written may still
lie in L2; its loads are what its blocks ask for together. Blocks are dealt to the multiprocessors as evenly as they go,
so the last wave of tiles costs as much as a full one where it touches a multiprocessor at all (wave quantisation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .optim import state_dtype

FILL_SECONDS = 1e-6  # assumption: a wave of tiles waits this long for its first operands and for its last stores
BARRIER_SECONDS = 1.5e-6  # assumption: one barrier of a whole grid, through L2


@dataclass(frozen=True)
class Device:
    """A GPU as its datasheet has it. Rates are dense, with float32 accumulation, in flops a second."""

    name: str
    arch: str  # sm_<n> or gfx<n>
    multiprocessors: int  # SMs or compute units
    bandwidth: float  # of memory, bytes a second
    l2_bytes: int
    l2_bandwidth: float  # bytes a second; an assumption where the source does not name it
    rates: dict[str, float]  # of "bf16", "fp16", "tf32" and "fp32" products
    launch_seconds: float  # assumption: from the end of a kernel to the first block of the next in its stream
    source: str


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bf16": half * 1e12, "fp16": half * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


_MIB = 1 << 20
DEVICES = {
    d.name: d
    for d in (
        Device(
            "A100", "sm_80", 108, 2.039e12, 40 * _MIB, 5120 * 1.41e9, _rates(312, 156, 19.5), 3e-6,
            "NVIDIA A100 80GB SXM datasheet; SMs, L2 and its 5,120 bytes a clock: A100 architecture whitepaper",
        ),
        Device(
            "H100", "sm_90", 132, 3.35e12, 50 * _MIB, 5120 * 1.83e9, _rates(989.4, 494.7, 66.9), 3e-6,
            "NVIDIA H100 SXM5 datasheet and Hopper architecture whitepaper; L2 bandwidth: assumed as wide as A100's",
        ),
        Device(
            "H200", "sm_90", 132, 4.8e12, 50 * _MIB, 5120 * 1.83e9, _rates(989.4, 494.7, 66.9), 3e-6,
            "NVIDIA H200 SXM datasheet; SMs and L2 as H100",
        ),
        Device(
            "RTX 4090", "sm_89", 128, 1.008e12, 72 * _MIB, 5.0e12, _rates(165.2, 82.6, 82.6), 3e-6,
            "NVIDIA Ada GPU architecture whitepaper, appendix A; L2 bandwidth: assumed",
        ),
        Device(
            "B200", "sm_100", 148, 8.0e12, 126 * _MIB, 2 * 5120 * 1.86e9, _rates(2250, 1100, 80), 3e-6,
            "NVIDIA Blackwell architecture technical brief, HGX B200; SMs and L2 as the driver reports them; L2 "
            "bandwidth: assumed twice H100's width, one for each die",
        ),
        Device(
            "MI300X", "gfx942", 304, 5.3e12, 256 * _MIB, 17.2e12, _rates(1307.4, 653.7, 163.4), 5e-6,
            "AMD Instinct MI300X data sheet; L2 here is the Infinity Cache with its peak bandwidth",
        ),
    )
}  # fmt: skip


def rate_name(dtype: torch.dtype, precision: str) -> str:
    """Which of a device's rates products of ``dtype`` run at: "bf16", "fp16", "tf32" or "fp32"."""
    if dtype == torch.float32:
        return {"highest": "fp32", "high": "tf32", "medium": "bf16"}[precision]
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic. flops are those of matrix products, a multiply and an add each."""

    flops: int
    bytes_read: int
    bytes_written: int
    launches: int = 1

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.launches + other.launches,
        )


@dataclass(frozen=True)
class Launch(Work):
    """One launch of a kernel: what all its blocks do together, padding of tiles included in flops.

    bytes_read and bytes_written are distinct bytes: each counts once however many blocks touch it.
    """

    kernel: str = ""
    grid: tuple[int, ...] = ()  # (): not known, as for kernels that are not ours; nothing is then quantised
    rate: str = "bf16"  # of the matrix products: a key of Device.rates
    bytes_requested: int = 0  # loads of all blocks together, which L2 has to deliver; 0: not known
    resident: int = 1  # blocks that share a multiprocessor
    barriers: int = 0  # of the whole grid


@dataclass(frozen=True)
class Layer:
    """One layer of an op, by its sizes."""

    rows: int  # M, of y
    inputs: int  # K
    outputs: int  # N
    dtype: torch.dtype = torch.bfloat16
    slots: int = 2  # tensors like the weight in the optimizer's state
    bias: bool = True
    images: int | None = None  # rows of x where each stands under several labels; None: M
    sqnorm_given: bool = False  # the squared norms of x's rows are an argument

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs

    @property
    def depth_rows(self) -> int:
        """Rows of x, and of the products."""
        return self.rows if self.images is None else self.images

    @property
    def product_flops(self) -> int:
        """Of one matrix product."""
        return 2 * self.depth_rows * self.weights


def _forward(la: Layer) -> Work:
    e, acc = la.dtype.itemsize, state_dtype(la.dtype).itemsize
    read = e * (la.depth_rows * la.inputs + la.weights + la.bias * la.outputs)
    read += acc * la.rows * la.sqnorm_given + (0 if la.images is None else 8 * la.rows)
    return Work(la.product_flops, read, e * la.rows * la.outputs + acc * la.rows)


def _gradient_operands(la: Layer) -> int:
    """Bytes of x, y, coefficients, and of squared norms or labels: what the second product reads."""
    e, acc = la.dtype.itemsize, state_dtype(la.dtype).itemsize
    read = e * (la.depth_rows * la.inputs + la.rows * la.outputs) + acc * la.rows
    return read + (acc * la.rows if la.images is None else 8 * la.rows)


def _parameters(la: Layer) -> int:
    """Bytes of weight, bias and the optimizer's state."""
    acc = state_dtype(la.dtype).itemsize
    count = la.weights + la.bias * la.outputs
    return count * (la.dtype.itemsize + acc * la.slots) + acc


def _grad(la: Layer) -> Work:
    written = la.dtype.itemsize * (la.weights + la.bias * la.outputs)
    return Work(la.product_flops, _gradient_operands(la), written)


def _update(la: Layer) -> Work:
    return Work(la.product_flops, _gradient_operands(la) + _parameters(la), _parameters(la))


def _step(la: Layer) -> Work:
    acc = state_dtype(la.dtype).itemsize
    sign_and_loss = Work(0, acc * la.rows, acc, 0)
    return _forward(la) + _update(la) + sign_and_loss


_TWO_PASSES = {
    "ff_forward": _forward,
    "ff_label_forward": _forward,
    "ff_grad": _grad,
    "ff_update_": _update,
    "ff_step_": _step,
    "ff_label_step_": _step,
    "ff_network_step_": _step,
}


def _as_list(layers: Layer | Sequence[Layer]) -> Sequence[Layer]:
    return [layers] if isinstance(layers, Layer) else layers


def minimum(op: str, layers: Layer | Sequence[Layer]) -> Work:
    """The least that ``op`` takes: each of its matrix products reads every operand once, every result is written once.

    A step has two products a layer, and the second needs what the whole first gives (c needs whole rows of y), so it
    reads x, y and the weight again. `once` is the count without that.
    """
    total = Work(0, 0, 0, 0)
    for la in _as_list(layers):
        total += _TWO_PASSES[op](la)
    return total


def once(op: str, layers: Layer | Sequence[Layer]) -> Work:
    """As `minimum`, but for a chip that keeps all it has ever read or made: no kernel can do with less."""
    if _TWO_PASSES[op] is not _step:
        return minimum(op, layers)
    total = Work(0, 0, 0)
    for i, la in enumerate(_as_list(layers)):
        e, acc = la.dtype.itemsize, state_dtype(la.dtype).itemsize
        read, written = _parameters(la), _parameters(la) + acc * la.rows + acc
        if i == 0:  # further layers are fed by the one before; signs, or labels, serve them all
            read += e * la.depth_rows * la.inputs + (acc if la.images is None else 8) * la.rows
        if op != "ff_network_step_":  # which does not return y
            written += e * la.rows * la.outputs
        total += Work(2 * la.product_flops, read, written, 0)
    return total


def limit(work: Work, device: Device, rate: str) -> float:
    """Seconds below which the datasheet's rates allow nothing."""
    return max(work.flops / device.rates[rate], work.bytes / device.bandwidth)


def _waves(blocks: int, at_once: int) -> int:
    return math.ceil(blocks / at_once)


def predicted(launches: Launch | Iterable[Launch], device: Device) -> float:
    """Predicted seconds of launches, one after the other."""
    total = 0.0
    for launch in [launches] if isinstance(launches, Launch) else launches:
        arithmetic, fill = launch.flops / device.rates[launch.rate], 0.0
        if launch.grid:
            blocks = math.prod(launch.grid)
            if blocks == 0:
                continue
            # the busiest multiprocessor's share of the blocks, over the mean share
            arithmetic *= _waves(blocks, device.multiprocessors) * device.multiprocessors / blocks
            fill = FILL_SECONDS * _waves(blocks, device.multiprocessors * launch.resident)
        memory = max(launch.bytes / device.bandwidth, launch.bytes_requested / device.l2_bandwidth)
        total += launch.launches * device.launch_seconds + launch.barriers * BARRIER_SECONDS
        total += fill + max(arithmetic, memory)
    return total
