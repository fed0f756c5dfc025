"""The two halves of a layer, forward and update, with their arguments, ready to be launched; launch.py has the ops."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import plan, tune
from .device import describe
from .forward import forward_kernel
from .label_forward import label_forward_kernel
from .label_update import label_update_kernel
from .plan import Launch, Layer
from .reduce import reduce_kernel
from .tiles import Device
from .update import update_kernel

HYPER = 5  # numbers of a layer in a flat list of hyper-parameters
Prepared = Callable[[], object]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def contiguous_rows(t: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, whatever lies between them."""
    return t if t.stride(1) == 1 else t.contiguous()


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def unit_of(t: Tensor, device: Device, kind: str) -> int:
    if t.shape[0] == 0 or t.stride(0) < t.shape[1]:  # no rows, or one row that stands for all: no descriptor
        return math.gcd(t.stride(0), t.shape[1], plan.PAD)
    return plan.unit(t.stride(0), t.shape[1], t.element_size(), t.data_ptr(), device, kind)


def as_loaded(t: Tensor, unit: int, rows: int, cols: int) -> Any:
    """``t`` as `common.load_tile` takes it."""
    return t if unit else TensorDescriptor.from_tensor(t, [rows, cols])


def prepare(kernel: Any, launch: Launch, *args: Any, **constants: Any) -> Prepared:
    options = {**launch.constants, **constants, "num_warps": launch.warps, "num_stages": launch.stages}
    if launch.tile is not None and launch.tile.registers:
        options["maxnreg"] = launch.tile.registers
    return functools.partial(kernel[launch.grid], *args, **options)


@dataclass(frozen=True)
class Update:
    """What the epilogue of an update works on: the optimizer's flat arguments, or where a gradient goes."""

    weight: Tensor  # (N, K), in place
    bias: Tensor | None  # (N,), in place
    state: Sequence[Tensor] = ()  # step, the weight's slots, the bias's slots
    kind: str = "store"
    lr: Tensor | None = None
    hyper: Sequence[float] = (0.0,) * HYPER

    @property
    def slots(self) -> int:
        """Tensors like the weight in the state."""
        return (len(self.state) - 1) // (1 if self.bias is None else 2)

    @property
    def step(self) -> Tensor | None:
        return self.state[0] if self.state else None

    def targets(self) -> tuple[Tensor | None, ...]:
        """weight, bias, slot0, slot1, bias_slot0, bias_slot1, step, lr: as the kernels take them."""
        slots = [*self.state[1 : 1 + self.slots], None, None][:2]
        bias_slots = [*self.state[1 + self.slots :], None, None][:2]
        return (self.weight, self.bias, *slots, *bias_slots, self.step, self.lr)

    def numbers(self) -> tuple[float, ...]:
        """rate, h1 to h4, log_beta1, log_beta2."""
        betas = self.hyper[1:3] if self.kind in ("adam", "adamw") else (1.0, 1.0)
        return (*self.hyper, *(math.log(beta) if beta > 0 else -math.inf for beta in betas))


@dataclass(frozen=True)
class Loss:
    """The logistic loss: where its inputs come from and its results go."""

    parts: Tensor  # (tiles, M): add up to G
    sign: Tensor | None  # (M,); None: the first half of the rows is positive, the other negative
    goodness: Tensor  # (M,), written
    loss: Tensor  # (), written
    divisor: float  # E
    threshold: float
    temperature: float


def layer_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, normalize: str, activation: str, precision: str, **more: Any
) -> tuple[Layer, Device]:
    device = describe(x.device)
    name = str(x.dtype).removeprefix("torch.")
    layer = Layer(
        x.shape[0], weight.shape[1], weight.shape[0], name, precision, bias is not None, normalize, activation, **more
    )
    return replace(layer, x_unit=unit_of(x, device, layer.kind), w_unit=unit_of(weight, device, layer.kind)), device


def plan_of(op: str, layer: Layer, device: Device, x: Tensor) -> tuple[Launch, ...]:
    if tune.enabled():
        tune.ensure(layer, device, x)
    return plan.plan(op, layer, device)


def row_constants(layer: Layer, eps: float) -> tuple[float, float]:
    return eps, 1.0 / layer.depth


# ---------------------------------------------------------------------------------------------------------------------
# The two halves of a layer


@dataclass(frozen=True)
class Peer:
    """Peer normalisation of a layer: its running mean, and what the forward leaves for the update (peer.py)."""

    mean: Tensor  # (N,), in place
    strength: float
    before: Tensor  # (N,)
    sums: Tensor  # (tiles of M, N)
    counts: Tensor  # (tiles of M,)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.mean, self.before, self.sums, self.counts


NO_PEER: tuple[Tensor | None, ...] = (None, None, None, None)


@dataclass(frozen=True)
class Labels:
    """Which label stands in which row of y: input b and candidate c in row b row_b + c row_c."""

    first: Tensor  # (B, C), or of the positive rows (B,)
    second: Tensor | None  # of the negative rows (B,)
    candidates: int
    num_classes: int
    strength: float
    row_b: int
    row_c: int


def forward(
    launch: Launch,
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    y: Tensor,  # (M, N), written
    p: Tensor | None,  # (M, N), written
    parts: Tensor,  # (tiles of N, M), written
    sqnorm: Tensor | None,  # (Q, M): add up to the squared norms
    scale_out: Tensor | None,  # (M,), written
    step: Tensor | None,
    labels: Labels | None,
    device: Device,
    sign: Tensor | None = None,
    peer: Peer | None = None,
) -> Prepared:
    tile = launch.tile
    assert tile is not None
    a = as_loaded(x, layer.x_unit, tile.m, tile.k)
    b = as_loaded(weight, layer.w_unit, tile.n, tile.k)
    again = plan.loads_again(layer, device)
    y_unit = math.gcd(y.stride(0), layer.cols, plan.PAD)
    strides = (x.stride(0), weight.stride(0), y.stride(0))
    peers = NO_PEER if peer is None else peer.tensors()
    if labels is None:
        return prepare(
            forward_kernel, launch, a, x if again else None, b, bias, sqnorm, y, p, parts, scale_out, step, sign,
            *peers, layer.rows, layer.depth, layer.cols, *strides, 0 if sqnorm is None else sqnorm.shape[0],
            *row_constants(layer, eps), Y_UNIT=y_unit,
        )  # fmt: skip
    return prepare(
        label_forward_kernel, launch, a, x, b, weight, bias, labels.first, labels.second, y, p, parts, scale_out, step,
        *peers, layer.inputs, layer.depth, layer.cols, labels.candidates, labels.num_classes, labels.row_b,
        labels.row_c, *strides, labels.strength, *row_constants(layer, eps), Y_UNIT=y_unit, AGAIN=again,
    )  # fmt: skip


def update_launches(
    launches: Sequence[Launch],
    layer: Layer,
    x: Tensor,
    y: Tensor,
    coef: Tensor | None,
    loss: Loss | None,
    norm: Tensor | None,  # (M,): row scales beside a loss, squared norms beside coefficients
    row_term: Tensor | None,
    col_term: Tensor | None,
    eps: float,
    update: Update,
    labels: Labels | None = None,
    peer: Peer | None = None,
) -> list[Prepared]:
    first, tile, splits = launches[0], launches[0].tile, launches[0].splits
    assert tile is not None
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    target = update
    loss_out = None if loss is None else loss.loss
    if splits > 1:  # parts of the gradient and of the loss, which reduce_kernel adds
        parts_bias = None if update.bias is None else new(splits, layer.cols)
        target = Update(new(splits, layer.cols, layer.depth), parts_bias)
        loss_out = None if loss is None else new(splits)
    a, b = as_loaded(x, layer.x_unit, tile.k, tile.n), as_loaded(y, layer.y_unit, tile.k, tile.m)
    eps_width = row_constants(layer, eps)
    if loss is None:
        scales = (0.0, 0.0, 1.0, 1.0, 2.0, 0.0)
        sums, out = None, None
    else:
        mean = 1.0 / layer.rows
        temperatures = (loss.temperature, 1.0 / loss.temperature)
        scales = (1.0 / loss.divisor, loss.threshold, *temperatures, 2.0 / loss.divisor * mean, mean)
        sums = loss.parts
        out = None if sums.data_ptr() == loss.goodness.data_ptr() else loss.goodness
    parts = 0 if sums is None else sums.shape[0]
    peers, peer_numbers = NO_PEER, (0.0, 0.0, 0)
    if peer is not None:
        peers, peer_numbers = peer.tensors(), (peer.strength, scales[4], peer.counts.shape[0])
    tail = (*scales, *peer_numbers, *target.numbers())
    if labels is None:
        sign = None if loss is None else loss.sign
        prepared = prepare(
            update_kernel, first, a, b, coef, sign, sums, norm, row_term, col_term, *peers,
            *target.targets(), out, loss_out, layer.rows, layer.depth, layer.cols, x.stride(0), y.stride(0), parts,
            first.split_rows, *eps_width, *tail,
        )  # fmt: skip
    else:
        prepared = prepare(
            label_update_kernel, first, a, x, b, labels.first, labels.second, sums, norm, row_term, col_term,
            *peers, *target.targets(), out, loss_out, layer.inputs, layer.depth, layer.cols, labels.num_classes,
            x.stride(0), y.stride(0), parts, first.split_rows, labels.strength, *tail,
        )  # fmt: skip
    if splits == 1:
        return [prepared]
    final = None if loss is None else loss.loss
    reduce = prepare(
        reduce_kernel, launches[1], target.weight, target.bias, loss_out, *update.targets(), final, splits,
        layer.cols * layer.depth, layer.cols, *update.numbers(),
    )  # fmt: skip
    return [prepared, reduce]


def run(prepared: Sequence[Prepared], x: Tensor) -> None:
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for launch in prepared:
            launch()
