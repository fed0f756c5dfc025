"""The ops on Triton kernels: each function takes the registered op's flat arguments (see reference.py).

Every op prepares all of its launches (plan.py decides them), allocations included, before it runs the first: what fails
until then has changed nothing. Nothing here waits for the device, so every op can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dropout import drop_below
from ..optim import state_dtype
from . import plan
from .dropout import dropout_kernel
from .halves import (
    HYPER,
    Labels,
    Loss,
    Peer,
    Prepared,
    Update,
    contiguous,
    contiguous_rows,
    forward,
    layer_of,
    plan_of,
    prepare,
    run,
    unit_of,
    update_launches,
)
from .plan import Launch, Layer
from .reduce import reduce_kernel
from .rows import goodness_kernel, sqnorm_kernel
from .tiles import Device


def _outputs(x: Tensor, rows: int, cols: int, curved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, goodness, p."""
    y = x.new_empty(rows, cols)
    return y, x.new_empty(rows, dtype=state_dtype(x.dtype)), torch.empty_like(y) if curved else x.new_empty(0)


def _parts(goodness: Tensor, launch: Launch, cols: int) -> Tensor:
    """Where the forward writes its sums: (tiles of N, M); with one tile the goodness itself."""
    tiles = launch.tiles_of(cols)
    return goodness[None] if tiles == 1 else goodness.new_empty(tiles, goodness.shape[0])


def _forward_op(
    op: str, layer: Layer, device: Device, x: Tensor, weight: Tensor, bias: Tensor | None, sqnorm: Tensor | None,
    eps: float, return_p: bool, labels: Labels | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, goodness, p = _outputs(x, layer.rows, layer.cols, return_p)
    if layer.rows == 0:
        return y, goodness, p
    first, *rest = plan_of(op, layer, device, x)
    parts = _parts(goodness, first, layer.cols)
    prepared = [
        forward(first, layer, x, weight, bias, eps, y, p if return_p else None, parts, sqnorm, None, None, labels,
                 device)
    ]  # fmt: skip
    prepared += [prepare(goodness_kernel, launch, parts, goodness, parts.shape[0], layer.rows) for launch in rest]
    run(prepared, x)
    return y, goodness, p


def ff_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_sqnorm: Tensor | None, normalize: str, eps: float,
    activation: str, precision: str, return_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, weight, bias = contiguous_rows(x), contiguous_rows(weight), contiguous(bias)
    sqnorm = None if x_sqnorm is None or normalize == "none" else x_sqnorm.contiguous()[None]
    layer, device = layer_of(x, weight, bias, normalize, activation, precision, sqnorm_parts=int(sqnorm is not None))
    return _forward_op("ff_forward", layer, device, x, weight, bias, sqnorm, eps, return_p, None)


def _stored(t: float, x: Tensor) -> float:
    """A number as a tensor of x's dtype would hold it."""
    return torch.tensor(t, dtype=x.dtype, device="cpu").item()  # torch's default device may be a GPU: it would wait


def ff_label_forward(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int, strength: float, normalize: str,
    eps: float, activation: str, precision: str, return_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, weight, bias = contiguous_rows(x), contiguous_rows(weight), contiguous(bias)
    count = labels.shape[1]
    given = Labels(labels.contiguous(), None, count, num_classes, _stored(strength, x), count, 1)
    layer, device = layer_of(
        x, weight, bias, normalize, activation, precision, candidates=count, num_classes=num_classes
    )
    layer = replace(layer, rows=x.shape[0] * count)
    return _forward_op("ff_label_forward", layer, device, x, weight, bias, None, eps, return_p, given)


def _given_update(
    op: str, x: Tensor, y: Tensor, coef: Tensor, weight: Tensor, bias: Tensor | None, x_sqnorm: Tensor | None,
    normalize: str, eps: float, activation: str, row_term: Tensor | None, col_term: Tensor | None, precision: str,
    update: Update,
) -> list[Prepared]:  # fmt: skip
    """The launches of ff_grad and ff_update_, where the coefficients are given."""
    x, y = contiguous_rows(x), contiguous_rows(y)
    layer, device = layer_of(
        x, weight, bias, normalize, activation, precision, optimizer=update.kind, slots=update.slots,
        sqnorm_parts=int(x_sqnorm is not None), peer=row_term is not None,
    )  # fmt: skip
    layer = replace(layer, y_unit=unit_of(y, device, layer.kind))
    launches = plan_of(op, layer, device, x)
    prepared, sqnorm = [], None
    if normalize != "none":
        if x_sqnorm is not None:
            sqnorm = x_sqnorm.contiguous()
        else:
            sqnorm = torch.empty(layer.rows, dtype=torch.float32, device=x.device)
        if launches[0].kernel == "sqnorm_kernel":
            first, launches = launches[0], launches[1:]
            unit = math.gcd(x.stride(0), layer.depth, plan.PAD)
            args = (x, sqnorm, layer.rows, layer.depth, x.stride(0))
            prepared.append(prepare(sqnorm_kernel, first, *args, X_UNIT=unit))
    return prepared + update_launches(
        launches, layer, x, y, coef.contiguous(), None, sqnorm, contiguous(row_term), contiguous(col_term), eps, update
    )


def ff_grad(
    x: Tensor, y: Tensor, coef: Tensor, weight: Tensor, bias: Tensor | None, x_sqnorm: Tensor | None, normalize: str,
    eps: float, activation: str, row_term: Tensor | None, col_term: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_weight = weight.new_empty(weight.shape)
    grad_bias = weight.new_empty(0 if bias is None else bias.shape)
    out = Update(grad_weight, None if bias is None else grad_bias)
    prepared = _given_update(
        "ff_grad",
        x,
        y,
        coef,
        grad_weight,
        bias,
        x_sqnorm,
        normalize,
        eps,
        activation,
        row_term,
        col_term,
        precision,
        out,
    )
    run(prepared, x)
    return grad_weight, grad_bias


def ff_update_(
    x: Tensor, y: Tensor, coef: Tensor, weight: Tensor, bias: Tensor | None, state: list[Tensor], optimizer: str,
    lr: Tensor | None, hyper: list[float], x_sqnorm: Tensor | None, normalize: str, eps: float, activation: str,
    row_term: Tensor | None, col_term: Tensor | None, precision: str,
) -> None:  # fmt: skip
    update = Update(weight, bias, state, optimizer, lr, hyper)
    prepared = _given_update(
        "ff_update_", x, y, coef, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision,
        update,
    )  # fmt: skip
    state[0].add_(1)  # the kernels read the step count: it must not change while they run
    run(prepared, x)


def apply_gradient_(
    weight: Tensor, bias: Tensor | None, state: list[Tensor], optimizer: str, lr: Tensor | None, hyper: list[float],
    grad_weight: Tensor, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    n, k = weight.shape
    update = Update(weight, bias, state, optimizer, lr, hyper)
    launch = plan.reduce(Layer(1, k, n, bias=bias is not None), 1, optimizer)
    prepared = prepare(
        reduce_kernel, launch, grad_weight, grad_bias, None, *update.targets(), None, 1, n * k, n, *update.numbers()
    )
    state[0].add_(1)
    run([prepared], weight)


@dataclass(frozen=True)
class _Step:
    """A layer's step, ready to run: forward, then the update's one or two launches."""

    forward: Prepared
    update: list[Prepared]
    y: Tensor
    parts: Tensor  # (tiles of N, M): add up to the goodness
    kept: tuple[Tensor | None, ...]  # what the launches use and nobody else holds


def _step(
    x: Tensor, sign: Tensor | None, update: Update, threshold: float, temperature: float, reduction: str,
    sqnorm: Tensor | None, normalize: str, eps: float, activation: str, row_term: Tensor | None,
    col_term: Tensor | None, precision: str, labels: Labels | None, y: Tensor, goodness: Tensor, loss: Tensor,
    peer_mean: Tensor | None = None, peer_strength: float = 0.0,
) -> _Step:  # fmt: skip
    weight, bias = update.weight, update.bias
    layer, device = layer_of(
        x, weight, bias, normalize, activation, precision, optimizer=update.kind, slots=update.slots,
        sqnorm_parts=0 if sqnorm is None else sqnorm.shape[0], peer=row_term is not None or peer_mean is not None,
        candidates=0 if labels is None else labels.candidates, num_classes=0 if labels is None else labels.num_classes,
    )  # fmt: skip
    layer = replace(layer, rows=y.shape[0], y_unit=unit_of(y, device, layer.kind))
    first, *rest = plan_of("ff_step_", layer, device, x)
    parts = _parts(goodness, first, layer.cols)
    p = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device) if activation != "relu" else None
    scale = None
    if normalize != "none":
        scale = torch.empty(layer.inputs, dtype=torch.float32, device=x.device)
    divisor = float(layer.cols) if reduction == "mean" else 1.0
    peer = None
    if peer_mean is not None and first.tile is not None:
        tiles = plan.ceil_div(layer.inputs, first.tile.m)
        new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
        peer = Peer(peer_mean, peer_strength, new(layer.cols), new(tiles, layer.cols), new(tiles))
    first_half = forward(
        first, layer, x, weight, bias, eps, y, p, parts, sqnorm, scale, update.step, labels, device,
        None if peer is None else sign, peer,
    )  # fmt: skip
    logistic = Loss(parts, sign, goodness, loss, divisor, threshold, temperature)
    second = update_launches(
        rest, layer, x, y if p is None else p, None, logistic, scale, row_term, col_term, eps, update, labels, peer,
    )  # fmt: skip
    return _Step(first_half, second, y, parts, (p, scale))


def _step_op(
    x: Tensor, sign: Tensor | None, update: Update, threshold: float, temperature: float, reduction: str,
    x_sqnorm: Tensor | None, normalize: str, eps: float, activation: str, row_term: Tensor | None,
    col_term: Tensor | None, precision: str, labels: Labels | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, goodness, _ = _outputs(x, x.shape[0] * (2 if labels else 1), update.weight.shape[0], False)
    loss = goodness.new_empty(())
    step = _step(
        x, sign, update, threshold, temperature, reduction, None if x_sqnorm is None else x_sqnorm.contiguous()[None],
        normalize, eps, activation, contiguous(row_term), contiguous(col_term), precision, labels, y, goodness, loss,
    )  # fmt: skip
    run([step.forward, *step.update], x)
    return y, goodness, loss


def ff_step_(
    x: Tensor, sign: Tensor, weight: Tensor, bias: Tensor | None, state: list[Tensor], optimizer: str,
    lr: Tensor | None, hyper: list[float], threshold: float, temperature: float, goodness: str,
    x_sqnorm: Tensor | None, normalize: str, eps: float, activation: str, row_term: Tensor | None,
    col_term: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _step_op(
        contiguous_rows(x), sign.contiguous(), Update(weight, bias, state, optimizer, lr, hyper), threshold,
        temperature, goodness, x_sqnorm, normalize, eps, activation, row_term, col_term, precision, None,
    )  # fmt: skip


def _pair(x: Tensor, labels_pos: Tensor, labels_neg: Tensor, num_classes: int, strength: float) -> Labels:
    """Positive rows, then negative ones."""
    return Labels(labels_pos.contiguous(), labels_neg.contiguous(), 2, num_classes, _stored(strength, x), 1, x.shape[0])


def ff_label_step_(
    x: Tensor, labels_pos: Tensor, labels_neg: Tensor, weight: Tensor, bias: Tensor | None, state: list[Tensor],
    optimizer: str, lr: Tensor | None, hyper: list[float], num_classes: int, strength: float, threshold: float,
    temperature: float, goodness: str, normalize: str, eps: float, activation: str, row_term: Tensor | None,
    col_term: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _step_op(
        contiguous_rows(x), None, Update(weight, bias, state, optimizer, lr, hyper), threshold, temperature, goodness,
        None, normalize, eps, activation, row_term, col_term, precision,
        _pair(x, labels_pos, labels_neg, num_classes, strength),
    )  # fmt: skip


_of_thread = threading.local()


def _side_stream(index: int) -> torch.cuda.Stream:
    """The thread's own: with one for all, a graph that one thread captures would take in what another one launches."""
    streams: dict[int, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if index not in streams:
        streams[index] = torch.cuda.Stream(index)
    return streams[index]


@contextlib.contextmanager
def _beside(x: Tensor) -> Iterator[Callable[[Sequence[Prepared]], None]]:
    """Gives a function that runs launches after all that was launched so far, and beside what is launched from now on.

    A CUDA graph that is being captured gets a branch. At the end everything is one stream again. On a CPU (tests) the
    launches run at once.
    """
    if not x.is_cuda:
        yield lambda launches: run(launches, x)
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device.index)

    def beside(launches: Sequence[Prepared]) -> None:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            run(launches, x)

    try:
        yield beside
    finally:
        main.wait_stream(side)


def _dropout(y: Tensor, p: float, seed: Tensor, layer: int) -> tuple[Prepared, Tensor, Tensor]:
    """The launch of a layer's dropout, its result (M, K) and the squared norms of that (1, M)."""
    m, k = y.shape
    launch = plan.dropout(m, k, y.element_size())
    x, sqnorm = y.new_empty(m, plan.padded(k))[:, :k], torch.empty(1, m, dtype=torch.float32, device=y.device)
    prepared = prepare(
        dropout_kernel, launch, y, seed, x, sqnorm, m, k, y.stride(0), x.stride(0), layer, drop_below(p), 1 / (1 - p)
    )
    return prepared, x, sqnorm


def ff_network_step_(
    x: Tensor, sign: Tensor | None, x_sqnorm: Tensor | None, labels_pos: Tensor | None, labels_neg: Tensor | None,
    num_classes: int, strength: float, weights: list[Tensor], biases: list[Tensor], states: list[Tensor],
    has_bias: list[bool], state_sizes: list[int], optimizers: list[str], lrs: list[Tensor], hypers: list[float],
    thresholds: list[float], temperatures: list[float], goodness: list[str], normalize: list[str], eps: list[float],
    activations: list[str], precisions: list[str], peers: list[float], peer_means: list[Tensor],
    dropouts: list[float], dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = contiguous_rows(x)
    labels = None
    if labels_pos is not None and labels_neg is not None:
        labels = _pair(x, labels_pos, labels_neg, num_classes, strength)
    sign = contiguous(sign)
    rows = x.shape[0] * (1 if labels is None else 2)
    totals = torch.empty(len(weights), rows, dtype=torch.float32, device=x.device)
    losses = torch.empty(len(weights), dtype=torch.float32, device=x.device)
    sqnorm = None if x_sqnorm is None else x_sqnorm.contiguous()[None]
    steps: list[_Step] = []
    dropped: list[Prepared | None] = []
    own_bias, own_state, own_mean, given = iter(biases), iter(states), iter(peer_means), x
    for i, weight in enumerate(weights):
        bias = next(own_bias) if has_bias[i] else None
        state = [next(own_state) for _ in range(state_sizes[i])]
        hyper = hypers[HYPER * i : HYPER * (i + 1)]
        update = Update(weight, bias, state, optimizers[i], lrs[i] if lrs else None, hyper)
        cols = weight.shape[0]
        y = x.new_empty(rows, plan.padded(cols))[:, :cols]
        drop = None
        if dropouts[i] and dropout_seed is not None:
            drop, given, sqnorm = _dropout(given, dropouts[i], dropout_seed, i)
        dropped.append(drop)
        step = _step(
            given, sign, update, thresholds[i], temperatures[i], goodness[i], sqnorm, normalize[i], eps[i],
            activations[i], None, None, precisions[i], None if i else labels, y, totals[i], losses[i],
            next(own_mean) if peers[i] else None, peers[i],
        )  # fmt: skip
        steps.append(step)
        given, sqnorm = step.y, step.parts  # G of this layer is the squared norm of the next one's input
    with _beside(x) as beside:
        for drop, step in zip(dropped, steps, strict=True):
            run([step.forward] if drop is None else [drop, step.forward], x)
            beside(step.update)  # waits for this forward; the next forward does not wait for it
    return totals, losses
