"""The public ops that read labels (Hinton 2022, section 3.3): a layer's forward pass and its step, without an overlay.

With x0 = x but for zeros in the label columns, x W^T = x0 W^T + strength W[:, label]: all labels of an input share one
product. Arguments and errors as in ops.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import checks, reference
from .ops import OPTIMIZER_SCHEMA, check_targets, fake_forward, lr_tensor
from .optim import Optimizer
from .registry import call, define

# ---------------------------------------------------------------------------------------------------------------------
# ff_label_forward


def _fake_label_forward(
    x, labels, weight, bias, num_classes, strength, normalize, eps, activation, precision, return_p
):  # fmt: skip
    rows = x.new_empty((labels.shape[0] * labels.shape[1], x.shape[1]))
    return fake_forward(rows, weight, bias, None, normalize, eps, activation, precision, return_p)


def _check_label_forward(
    x, labels, weight, bias, num_classes, strength, normalize, eps, activation, precision, return_p
):  # fmt: skip
    checks.layer(x, weight, bias, normalize, eps, activation)
    checks.label_options(num_classes, strength, x)
    checks.labels("labels", labels, x, dims=2)


define(
    "ff_label_forward",
    "(Tensor x, Tensor labels, Tensor weight, Tensor? bias, int num_classes, float strength, str normalize, float eps, "
    "str activation, str precision, bool return_p) -> (Tensor y, Tensor goodness, Tensor p)",
    reference.ff_label_forward,
    _fake_label_forward,
    _check_label_forward,
    lambda x, labels, weight, bias, num_classes, *_: checks.label_values("labels", labels, num_classes),
)


def ff_label_forward(
    x: Tensor,  # (B, K)
    labels: Tensor,  # (B, C)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    num_classes: int,
    strength: float = 1.0,
    normalize: str = "l2",
    eps: float = 1e-4,
    activation: str = "relu",
    precision: str | None = None,
    return_p: bool = False,
) -> tuple[Tensor, ...]:
    """ff_forward of each input under each of its C candidate labels, the label written over the first columns.

    The same as ff_forward on `overlay`: in row (b, c) the first ``num_classes`` columns are 0 but for ``strength`` in
    column labels[b, c] (Hinton 2022, section 3.3). All candidates share x's other columns, so a kernel pays the big
    product once.

    Args:
        labels: integers in [0, num_classes). num_classes: in [1, K]. strength: finite.
        The keywords as for ff_forward.

    Returns:
        y (B C, N), the rows of one input together; goodness (B C,); with ``return_p`` also p (B C, N).
    """
    checks.matrix("x", x)
    labels = checks.as_labels("labels", labels, x, dims=2)
    checks.plain_label_options(num_classes, strength, x)
    checks.plain_numbers(eps=eps)
    if torch.is_grad_enabled():
        checks.no_grad("ff_label_forward", x=x, weight=weight, bias=bias)
    wants_p = return_p and activation != "relu"
    y, goodness, p = call(
        "ff_label_forward", x, labels, weight, bias, num_classes, strength, normalize, eps, activation,
        checks.precision(precision), wants_p,
    )  # fmt: skip
    if return_p:
        return y, goodness, p if wants_p else y
    return y, goodness


# ---------------------------------------------------------------------------------------------------------------------
# ff_label_step_


def _fake_label_step_(
    x, labels_pos, labels_neg, weight, bias, state, optimizer, lr, hyper, num_classes, strength, threshold, temperature,
    goodness, normalize, eps, activation, row_term, col_term, precision,
):  # fmt: skip
    rows = x.new_empty((2 * x.shape[0], x.shape[1]))
    y, total, _ = fake_forward(rows, weight, bias, None, normalize, eps, activation, precision, False)
    return y, total, total.new_empty(())


def _check_label_step_(
    x, labels_pos, labels_neg, weight, bias, state, optimizer, lr, hyper, num_classes, strength, threshold, temperature,
    goodness, normalize, eps, activation, row_term, col_term, precision,
):  # fmt: skip
    checks.layer(x, weight, bias, normalize, eps, activation)
    checks.label_options(num_classes, strength, x)
    checks.non_empty(x)
    checks.labels("labels_pos", labels_pos, x, dims=1)
    checks.labels("labels_neg", labels_neg, x, dims=1)
    checks.loss_options(threshold, temperature, goodness)
    checks.peer_terms(row_term, col_term, x, weight, 2 * x.shape[0])
    checks.given_state(state, optimizer, lr, weight, bias)


def _enter_label_step_(
    x, labels_pos, labels_neg, weight, bias, state, optimizer, lr, hyper, num_classes, strength, threshold, temperature,
    goodness, normalize, eps, activation, row_term, col_term, precision,
):  # fmt: skip
    check_targets(
        weight, bias, state, optimizer, lr=lr, x=x, labels_pos=labels_pos, labels_neg=labels_neg, row_term=row_term,
        col_term=col_term,
    )  # fmt: skip
    checks.label_values("labels_pos", labels_pos, num_classes)
    checks.label_values("labels_neg", labels_neg, num_classes)


define(
    "ff_label_step_",
    "(Tensor x, Tensor labels_pos, Tensor labels_neg, Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)[] state, "
    f"{OPTIMIZER_SCHEMA}, int num_classes, float strength, float threshold, float temperature, str goodness, "
    "str normalize, float eps, str activation, Tensor? row_term, Tensor? col_term, str precision) "
    "-> (Tensor y, Tensor goodness, Tensor loss)",
    reference.ff_label_step_,
    _fake_label_step_,
    _check_label_step_,
    _enter_label_step_,
)


def ff_label_step_(
    x: Tensor,  # (B, K)
    labels_pos: Tensor,  # (B,)
    labels_neg: Tensor,  # (B,)
    weight: Tensor,  # (N, K), updated
    bias: Tensor | None,  # (N,), updated
    state: Mapping[str, Tensor],  # updated
    optimizer: Optimizer,
    *,
    num_classes: int,
    strength: float = 1.0,
    threshold: float = 2.0,
    temperature: float = 1.0,
    goodness: str = "mean",
    normalize: str = "l2",
    eps: float = 1e-4,
    activation: str = "relu",
    row_term: Tensor | None = None,  # (2 B,)
    col_term: Tensor | None = None,  # (N,)
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ff_step_ on each input twice: under its true label (positive) and under a wrong one (negative).

    The same as ff_step_ on the `overlay` of both, in one go: the two rows differ in the label's columns only.

    Args:
        labels_pos, labels_neg: integers in [0, num_classes).
        The others as for ff_label_forward and ff_step_; row_term's rows are the positives, then the negatives.

    Returns:
        y (2 B, N), goodness (2 B,), loss (): the positive rows first, then the negative ones.
    """
    checks.matrix("x", x)
    labels_pos = checks.as_labels("labels_pos", labels_pos, x, dims=1)
    labels_neg = checks.as_labels("labels_neg", labels_neg, x, dims=1)
    checks.plain_label_options(num_classes, strength, x)
    checks.plain_numbers(eps=eps, threshold=threshold, temperature=temperature)
    tensors = checks.flat_state(optimizer, state, bias)
    if torch.is_grad_enabled():
        checks.no_grad("ff_label_step_", state, x=x, weight=weight, bias=bias, row_term=row_term, col_term=col_term,
                       lr=optimizer.lr)  # fmt: skip
    return call(
        "ff_label_step_", x, labels_pos, labels_neg, weight, bias, tensors, optimizer.kind,
        lr_tensor(optimizer), optimizer.hyper, num_classes, strength, threshold, temperature, goodness, normalize, eps,
        activation, row_term, col_term, checks.precision(precision),
    )  # fmt: skip
