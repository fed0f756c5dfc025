"""The ops on a whole network: its training step, and its forward pass in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .labels import neutral
from .ops import ff_forward
from .optim import Optimizer, state_dtype
from .registry import call, define


@dataclass(eq=False)
class FFLayer:
    """What a layer holds, as ff_network_step_ takes it; the fields are ff_step_'s arguments."""

    weight: Tensor  # (N, K), updated
    bias: Tensor | None  # (N,), updated
    state: Mapping[str, Tensor]  # updated
    optimizer: Optimizer
    threshold: float = 2.0
    temperature: float = 1.0
    goodness: str = "mean"
    normalize: str = "l2"
    eps: float = 1e-4
    activation: str = "relu"
    precision: str | None = None
    peer: float = 0.0
    peer_mean: Tensor | None = None  # (N,), updated where peer is not 0
    dropout: float = 0.0


def _records(layers: Any) -> list[FFLayer]:
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a sequence of FFLinear or FFLayer, got {type(layers).__name__}")
    records: list[FFLayer] = []
    for i, item in enumerate(layers):
        if not (isinstance(item, FFLayer) or hasattr(item, "as_layer")):
            raise TypeError(f"layers[{i}] must be an FFLinear or FFLayer, got {type(item).__name__}")
        records.append(item if isinstance(item, FFLayer) else item.as_layer())
    if not records:
        raise ValueError("layers must hold at least one layer, got none")
    return records


# ---------------------------------------------------------------------------------------------------------------------
# ff_network_step_


def _fake_network_step_(x, sign, x_sqnorm, labels_pos, labels_neg, num_classes, strength, weights, *rest):
    acc, rows = state_dtype(x.dtype), x.shape[-2] if labels_pos is None else 2 * x.shape[-2]
    minibatches = (x.shape[0],) if x.dim() == 3 else ()
    goodness = x.new_empty((*minibatches, len(weights), rows), dtype=acc)
    return goodness, x.new_empty((*minibatches, len(weights)), dtype=acc)


def _each_layer(
    weights: Sequence[Tensor], biases: Sequence[Tensor], states: Sequence[Tensor], has_bias: Sequence[bool],
    state_sizes: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor | None, Sequence[Tensor]]]:  # fmt: skip
    """Weight, bias and state of each layer of a flat call."""
    own_bias, first = iter(biases), 0
    for weight, with_bias, size in zip(weights, has_bias, state_sizes, strict=True):
        yield weight, next(own_bias) if with_bias else None, states[first : first + size]
        first += size


def _check_network_step_(
    x, sign, x_sqnorm, labels_pos, labels_neg, num_classes, strength, weights, biases, states, has_bias, state_sizes,
    optimizers, lrs, hypers, thresholds, temperatures, goodness, normalize, eps, activations, precisions, peers,
    peer_means, dropouts, dropout_seed,
):  # fmt: skip
    checks.minibatches("x", x)
    checks.non_empty(x)
    if labels_pos is None:
        checks.per_row("sign", sign, x)
    else:
        checks.labels("labels[0]", labels_pos, x, dims=1, several=x.dim() == 3)
        checks.labels("labels[1]", labels_neg, x, dims=1, several=x.dim() == 3)
        checks.label_options(num_classes, strength, x)
    if x_sqnorm is not None:
        checks.per_row("x_sqnorm", x_sqnorm, x)
    width, rows, means = x.shape[-1], x if x.dim() == 2 else x[0], iter(peer_means)
    for i, (weight, bias, state) in enumerate(_each_layer(weights, biases, states, has_bias, state_sizes)):
        try:
            checks.layer(rows, weight, bias, normalize[i], eps[i], activations[i], width)
            checks.loss_options(thresholds[i], temperatures[i], goodness[i])
            checks.given_state(state, optimizers[i], lrs[i] if lrs else None, weight, bias)
            checks.peer_mean(peers[i], next(means) if peers[i] else None, weight)
            checks.dropout(dropouts[i])
            if dropouts[i] and i == 0:
                raise ValueError(f"dropout must be 0 in the first layer, got {dropouts[i]!r}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers[{i}]: {error}") from None
        width = weight.shape[0]
    if any(dropouts):
        checks.dropout_seed(dropout_seed, x)


def _enter_network_step_(
    x, sign, x_sqnorm, labels_pos, labels_neg, num_classes, strength, weights, biases, states, has_bias, state_sizes,
    optimizers, lrs, hypers, thresholds, temperatures, goodness, normalize, eps, activations, precisions, peers,
    peer_means, dropouts, dropout_seed,
):  # fmt: skip
    written: dict[str, Tensor] = {}
    own_mean = iter(peer_means)
    for i, (weight, bias, state) in enumerate(_each_layer(weights, biases, states, has_bias, state_sizes)):
        try:
            checks.state_tensors(state, optimizers[i], weight, bias)
        except ValueError as error:
            raise ValueError(f"layers[{i}]: {error}") from None
        written |= checks.updated(weight, bias, state, optimizers[i], f"layers[{i}].")
        if peers[i]:
            written[f"layers[{i}].peer_mean"] = next(own_mean)
    read = {"x": x, "sign": sign, "x_sqnorm": x_sqnorm, "labels[0]": labels_pos, "labels[1]": labels_neg}
    checks.targets(
        written, read | {"dropout_seed": dropout_seed} | {f"lr of layers[{i}]": lr for i, lr in enumerate(lrs)}
    )
    if labels_pos is None:
        checks.sign_values(sign)
    else:
        checks.label_values("labels_pos", labels_pos, num_classes)
        checks.label_values("labels_neg", labels_neg, num_classes)


define(
    "ff_network_step_",
    "(Tensor x, Tensor? sign, Tensor? x_sqnorm, Tensor? labels_pos, Tensor? labels_neg, int num_classes, "
    "float strength, Tensor(a!)[] weights, Tensor(b!)[] biases, Tensor(c!)[] states, "
    "bool[] has_bias, int[] state_sizes, str[] optimizers, Tensor[] lrs, float[] hypers, float[] thresholds, "
    "float[] temperatures, str[] goodness, str[] normalize, float[] eps, str[] activations, str[] precisions, "
    "float[] peers, Tensor(d!)[] peer_means, float[] dropouts, Tensor? dropout_seed) "
    "-> (Tensor goodness, Tensor loss)",
    reference.ff_network_step_,
    _fake_network_step_,
    _check_network_step_,
    _enter_network_step_,
)


def ff_network_step_(
    x: Tensor,  # (M, K), or (B, K) with labels; (S, M, K) or (S, B, K) for S minibatches
    sign: Tensor | None,  # (M,) or (S, M), or None with labels
    layers: Sequence[Any],
    *,
    x_sqnorm: Tensor | None = None,  # (M,) or (S, M)
    labels: tuple[Tensor, Tensor] | None = None,  # two of (B,) or (S, B)
    num_classes: int | None = None,
    strength: float = 1.0,
    dropout_seed: Tensor | None = None,  # (1,) or (S,)
) -> tuple[Tensor, Tensor]:
    """A whole network's training step: ff_step_ for each layer, every layer fed by y from before its own update.

    Layer l + 1 takes y of layer l, and its goodness as the squared norm of that input.

    A layer's ``peer`` is the strength lambda of peer normalisation (Hinton's published code): with m its ``peer_mean``
    (N,) as it was before the step, a_m = 2 / (E M) on positive rows and 0 on others, and d = lambda (m - mean(m)), the
    update's dz has a d^T added to it; then m <- 0.9 m + 0.1 mean of y over the positive rows. Hinton's code takes the
    mean that includes the batch at hand; with the one before, the update need not wait for the columns' sums.

    A layer's ``dropout`` p zeroes each of its inputs with probability p and divides the others by 1 - p
    (`ffkernels.dropout.dropout`, the same bits on every backend). The layer below is not affected.

    Several minibatches of one size, x (S, M, K), are as many steps: the same bits as S calls one after the other, with
    step counts S higher. lr is the same for all. On "cuda" they are one launch, in which a minibatch enters the network
    while those before it are still in higher layers (docs/cuda.md); other backends take them in turn.

    Args:
        layers: `FFLinear` modules or `FFLayer` records, from the input on; each has its own keywords and optimizer. lr
            must be a tensor in all of them or in none. The first one's dropout must be 0.
        x_sqnorm: of the network's input.
        dropout_seed: int64, must be another one for every step; needed where a layer has dropout.
        labels: (labels_pos, labels_neg), instead of ``sign``: the first layer then does what ff_label_step_ does, with
            M = 2 B rows, the positive before the negative. num_classes, strength: as for ff_label_step_.

    Returns:
        goodness (L, M), the plain sums G, and loss (L,), in the accumulation dtype; (S, L, M) and (S, L) where x has S
        minibatches.
    """
    records = _records(layers)
    checks.minibatches("x", x)
    several = x.dim() == 3
    if (labels is None) == (sign is None):
        raise ValueError(f"either sign or labels must be given, got {'neither' if sign is None else 'both'}")
    labels_pos = labels_neg = None
    if sign is not None:
        sign = checks.as_sign(sign, x)
    if labels is not None:
        if not isinstance(labels, (tuple, list)) or len(labels) != 2:
            raise TypeError(f"labels must be (labels_pos, labels_neg), got {type(labels).__name__}")
        labels_pos = checks.as_labels("labels[0]", labels[0], x, dims=1, several=several)
        labels_neg = checks.as_labels("labels[1]", labels[1], x, dims=1, several=several)
        checks.plain_label_options(num_classes, strength, x)
        if x_sqnorm is not None:
            raise ValueError("x_sqnorm must be None with labels: they change the rows of x")
    grad_mode = torch.is_grad_enabled()
    if grad_mode:
        checks.no_grad("ff_network_step_", x=x, sign=sign, x_sqnorm=x_sqnorm)
    biases, states, lrs, hypers, means, rows = [], [], [], [], [], []
    for i, r in enumerate(records):
        try:
            state = checks.flat_state(r.optimizer, r.state, r.bias)
            checks.plain_numbers(
                eps=r.eps, threshold=r.threshold, temperature=r.temperature, peer=r.peer, dropout=r.dropout
            )
            precision = checks.precision(r.precision)
            if grad_mode:
                checks.no_grad(
                    "ff_network_step_", r.state, weight=r.weight, bias=r.bias, peer_mean=r.peer_mean, lr=r.optimizer.lr
                )
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"layers[{i}]: {error}") from None
        if r.bias is not None:
            biases.append(r.bias)
        states += state
        if isinstance(r.optimizer.lr, Tensor):
            lrs.append(r.optimizer.lr)
        hypers += r.optimizer.hyper
        if r.peer:
            means.append(r.peer_mean)
        rows.append((
            r.weight, r.bias is not None, len(state), r.optimizer.kind, r.threshold, r.temperature, r.goodness,
            r.normalize, r.eps, r.activation, precision, r.peer, r.dropout,
        ))  # fmt: skip
    if lrs and len(lrs) != len(records):
        raise ValueError(f"lr must be a tensor in all layers or in none, got tensors in {len(lrs)} of {len(records)}")
    (
        weights, has_bias, sizes, optimizers, thresholds, temperatures, goodness, normalize, eps, activations,
        precisions, peers, dropouts,
    ) = map(list, zip(*rows, strict=True))  # fmt: skip
    return call(
        "ff_network_step_", x, sign, x_sqnorm, labels_pos, labels_neg, num_classes or 0, strength, weights, biases,
        states, has_bias, sizes, optimizers, lrs, hypers, thresholds, temperatures, goodness, normalize, eps,
        activations, precisions, peers, means, dropouts, dropout_seed if any(dropouts) else None,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# ff_network_forward


def _fake_network_forward(x, x_sqnorm, num_classes, strength, weights, *rest):
    ys = [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]
    return ys, x.new_empty((len(weights), x.shape[0]), dtype=state_dtype(x.dtype))


def _check_network_forward(
    x, x_sqnorm, num_classes, strength, weights, biases, has_bias, normalize, eps, activations, precisions
):  # fmt: skip
    checks.matrix("x", x)
    if x_sqnorm is not None:
        checks.per_row("x_sqnorm", x_sqnorm, x)
    if num_classes:
        checks.label_options(num_classes, strength, x)
    width, own_bias = x.shape[1], iter(biases)
    for i, weight in enumerate(weights):
        try:
            bias = next(own_bias) if has_bias[i] else None
            checks.layer(x, weight, bias, normalize[i], eps[i], activations[i], width)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers[{i}]: {error}") from None
        width = weight.shape[0]


define(
    "ff_network_forward",
    "(Tensor x, Tensor? x_sqnorm, int num_classes, float strength, Tensor[] weights, Tensor[] biases, bool[] has_bias, "
    "str[] normalize, float[] eps, str[] activations, str[] precisions) -> (Tensor[] ys, Tensor goodness)",
    reference.ff_network_forward,
    _fake_network_forward,
    _check_network_forward,
)


def ff_network_forward(
    x: Tensor,  # (M, K)
    layers: Sequence[Any],
    *,
    x_sqnorm: Tensor | None = None,  # (M,)
    num_classes: int = 0,
    strength: float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """A whole network's forward pass: ff_forward for each layer, whose goodness is the squared norm of the next input.

    Args:
        layers: as for ff_network_step_; dropout is not for the forward pass.
        x_sqnorm: of the network's input.
        num_classes: not 0: read x as if it carried the neutral label, strength / num_classes in each of its first
            num_classes columns (`neutral`; Hinton 2022, section 3.3).

    Returns:
        y of each layer, (M, N_l) in x's dtype; goodness (L, M), the plain sums G, in the accumulation dtype.
    """
    records = _records(layers)
    checks.matrix("x", x)
    checks.plain_label_options(num_classes, strength, x)
    if num_classes and x_sqnorm is not None:
        raise ValueError("x_sqnorm must be None with labels: they change the rows of x")
    grad_mode = torch.is_grad_enabled()
    if grad_mode:
        checks.no_grad("ff_network_forward", x=x, x_sqnorm=x_sqnorm)
    biases, rows = [], []
    for i, r in enumerate(records):
        try:
            checks.plain_numbers(eps=r.eps)
            precision = checks.precision(r.precision)
            if grad_mode:
                checks.no_grad("ff_network_forward", weight=r.weight, bias=r.bias)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"layers[{i}]: {error}") from None
        if r.bias is not None:
            biases.append(r.bias)
        rows.append((r.weight, r.bias is not None, r.normalize, r.eps, r.activation, precision))
    if backends.has_kernel("ff_network_forward", x):
        weights, has_bias, normalize, eps, activations, precisions = map(list, zip(*rows, strict=True))
        return call(
            "ff_network_forward", x, x_sqnorm, num_classes, strength, weights, biases, has_bias, normalize, eps,
            activations, precisions,
        )  # fmt: skip
    y, ys, totals = neutral(x, num_classes, strength) if num_classes else x, [], []
    for r in records:
        y, x_sqnorm = ff_forward(
            y, r.weight, r.bias, x_sqnorm=x_sqnorm, normalize=r.normalize, eps=r.eps, activation=r.activation,
            precision=r.precision,
        )  # fmt: skip
        ys.append(y)
        totals.append(x_sqnorm)
    return ys, torch.stack(totals)
