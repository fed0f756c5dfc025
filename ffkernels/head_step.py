"""The softmax head's training step as one op; draws of labels that it confuses and of inputs that it gets wrong.

`SoftmaxHead`, `HardLabels` and `HardInputs` call them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference_head
from .ops import OPTIMIZER_SCHEMA, lr_tensor
from .optim import Optimizer
from .registry import call, check_call, define


def _fake_head_step_(ys, sqnorms, labels, weights, states, optimizer, lr, hyper, eps):
    return ys[0].new_empty((ys[0].shape[0], weights[0].shape[0])), ys[0].new_empty(())


def _states_of(states: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    each = len(states) // count
    return [states[each * i : each * (i + 1)] for i in range(count)]


def _check_head_step_(ys, sqnorms, labels, weights, states, optimizer, lr, hyper, eps):
    checks.number("eps", eps, 0.0)
    checks.matrix("ys[0]", ys[0])
    first, own = ys[0], zip(ys, sqnorms, weights, _states_of(states, len(weights)), strict=True)
    for i, (y, sqnorm, weight, state) in enumerate(own):
        for name, t in ((f"ys[{i}]", y), (f"weights[{i}]", weight)):
            checks.matrix(name, t)
            if t.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must be torch.float32 or torch.float64, got {t.dtype}")
            if 0 in t.shape:
                raise ValueError(f"{name} must not be empty, got {tuple(t.shape)}")
        checks.like(f"ys[{i}]", y, (len(first), y.shape[1]), "(B, N)", first.dtype, first.device)
        checks.like(f"weights[{i}]", weight, (len(weights[0]), y.shape[1]), "(C, N)", y.dtype, y.device)
        checks.per_row(f"sqnorms[{i}]", sqnorm, y)
        checks.given_state(state, optimizer, lr, weight, None)
    checks.labels("labels", labels, first, dims=1)


def _enter_head_step_(ys, sqnorms, labels, weights, states, optimizer, lr, hyper, eps):
    written: dict[str, Tensor] = {}
    for i, (weight, state) in enumerate(zip(weights, _states_of(states, len(weights)), strict=True)):
        try:
            checks.state_tensors(state, optimizer, weight, None)
        except ValueError as error:
            raise ValueError(f"states[{i}]: {error}") from None
        written[f"weights[{i}]"] = weight
        written |= {f"states[{i}][{name!r}]": t for name, t in checks.named_state(state, optimizer, None).items()}
    read = {f"{name}[{i}]": t for name, given in (("ys", ys), ("sqnorms", sqnorms)) for i, t in enumerate(given)}
    checks.targets(written, read | {"labels": labels, "lr": lr})
    checks.label_values("labels", labels, weights[0].shape[0])


define(
    "ff_head_step_",
    f"(Tensor[] ys, Tensor[] sqnorms, Tensor labels, Tensor(a!)[] weights, Tensor(b!)[] states, {OPTIMIZER_SCHEMA}, "
    "float eps) -> (Tensor logits, Tensor loss)",
    reference_head.ff_head_step_,
    _fake_head_step_,
    _check_head_step_,
    _enter_head_step_,
)


def ff_head_step_(
    ys: Sequence[Tensor],  # of (B, N_l)
    sqnorms: Sequence[Tensor],  # of (B,)
    labels: Tensor,  # (B,)
    weights: Sequence[Tensor],  # of (C, N_l), updated
    states: Sequence[Mapping[str, Tensor]],  # updated
    optimizer: Optimizer,
    *,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """One step of a linear softmax on the normalised rows of several matrices, down its mean cross entropy.

    logits = sum_l n_l S_l^T with n_l = y_l / (|y_l| / sqrt(N_l) + eps), the softmax of Hinton 2022, section 3.3, on the
    activities of layers l = 1, 2, ... The gradient is (softmax(logits) - one_hot(label))^T n_l / B, and the optimizer
    takes its step on each S_l. Nothing but logits and loss is stored.

    Args:
        ys: y_l, float32 or float64. sqnorms: their rows' squared norms: the goodness of the layers.
        labels: integers in [0, C).
        weights: S_l, of y's dtype. states: made by ``optimizer.init_state(S_l)`` for each. Both must be contiguous and
            share memory with nothing else given.
        eps: >= 0, added to the root mean square.

    Returns:
        logits (B, C) from before the update, loss ().

    Raises:
        As the other ops (ops.py), with nothing changed.
    """
    if not len(ys) == len(sqnorms) == len(weights) == len(states) > 0:
        given = [len(t) for t in (ys, sqnorms, weights, states)]
        raise ValueError(f"ys, sqnorms, weights and states must be as many, at least one, got {given}")
    checks.plain_numbers(eps=eps)
    flat: list[Tensor] = []
    for i, state in enumerate(states):
        try:
            flat += checks.flat_state(optimizer, state, None)
        except ValueError as error:
            raise ValueError(f"states[{i}]: {error}") from None
        if torch.is_grad_enabled():
            own = {f"ys[{i}]": ys[i], f"sqnorms[{i}]": sqnorms[i], f"weights[{i}]": weights[i], "lr": optimizer.lr}
            checks.no_grad("ff_head_step_", state, **own)
    checks.matrix("ys[0]", ys[0])
    return call(
        "ff_head_step_", [*ys], [*sqnorms], checks.as_labels("labels", labels, ys[0], dims=1), [*weights], flat,
        optimizer.kind, lr_tensor(optimizer), optimizer.hyper, eps,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# draw_other_labels


def _check_draw(logits, labels, draws, dtype):
    checks.matrix("logits", logits)
    if logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, C) of C >= 2 classes, got {tuple(logits.shape)}")
    checks.labels("labels", labels, logits, dims=1)
    checks.like("draws", draws, (len(logits),), "(B,)", dtype, logits.device)


def _check_draw_other_labels(logits, labels, draws):
    _check_draw(logits, labels, draws, torch.float32)


def _enter_draw(logits, labels, draws, *rest):
    checks.label_values("labels", labels, logits.shape[1])
    checks.draw_values(draws)


define(
    "draw_other_labels",
    "(Tensor logits, Tensor labels, Tensor draws) -> Tensor",
    reference_head.draw_other_labels,
    lambda logits, labels, draws: torch.empty_like(labels, memory_format=torch.contiguous_format),
    _check_draw_other_labels,
    _enter_draw,
)


def _draw(op: str, logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    """On a backend without such a kernel too: the reference runs on any device."""
    checks.matrix("logits", logits)
    labels = checks.as_labels("labels", labels, logits, dims=1)
    if backends.has_kernel(op, logits):
        return call(op, logits, labels, *rest)
    check_call(op, logits, labels, *rest)
    drawn: Tensor = getattr(reference_head, op)(logits, labels, *rest)
    return drawn


def draw_other_labels(
    logits: Tensor,  # (B, C)
    labels: Tensor,  # (B,)
    draws: Tensor,  # (B,)
) -> Tensor:  # (B,) int64
    """For each row another label than its own, with the probability that softmax gives it once its own is left out.

    The label at which the cumulated probabilities, in float64, exceed the draw.

    Args:
        logits: float32 or float64, of C >= 2 classes. labels: integers in [0, C).
        draws: float32, uniform in [0, 1).
    """
    return _draw("draw_other_labels", logits, labels, draws)


# ---------------------------------------------------------------------------------------------------------------------
# draw_hard_inputs


def _check_draw_hard_inputs(logits, labels, draws, floor, count):
    _check_draw(logits, labels, draws, torch.float64)
    checks.number("floor", floor, 0.0, above=True)
    checks.count("count", count, 0, len(logits), "rows of logits (B, C)")


define(
    "draw_hard_inputs",
    "(Tensor logits, Tensor labels, Tensor draws, float floor, int count) -> Tensor",
    reference_head.draw_hard_inputs,
    lambda logits, labels, draws, floor, count: labels.new_empty((count,), dtype=torch.int64),
    _check_draw_hard_inputs,
    _enter_draw,
)


def draw_hard_inputs(
    logits: Tensor,  # (B, C)
    labels: Tensor,  # (B,)
    draws: Tensor,  # (B,)
    floor: float,
    count: int,
) -> Tensor:  # (count,) int64, ascending
    """Different rows, drawn one after the other with probabilities proportional to floor + 1 - softmax(logits)[label].

    Those with the largest log(draw) / (floor + 1 - p), computed in float64 (Efraimidis & Spirakis 2006).

    Args:
        logits: float32 or float64, of C >= 2 classes. labels: integers in [0, C).
        draws: float64, uniform in [0, 1). floor: > 0. count: in [0, B].
    """
    return _draw("draw_hard_inputs", logits, labels, draws, floor, count)
