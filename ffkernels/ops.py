"""The public ops on one layer: for each its schema, its fake kernel, its checks and its documentation, in turn.

Those that read labels are in label_ops.py, those on a whole network in network.py, the softmax head's in head_step.py.

What they compute stands in reference.py. The registered ops (``torch.ops.ffkernels.*``) take flat arguments; the
functions here take the optimizer and its state as they are, check everything, and call the backend's overload.

Throughout: x is (M, K), weight (N, K), bias (N,), all of one dtype (float64, float32, bf16, fp16) on one device. The
accumulation dtype is float32, or float64 for float64 tensors. With r_m the row scale that ``normalize`` asks for,
z = r x W^T + b and y = act(z). The keywords that all ops share:

    x_sqnorm     (M,) accumulation dtype, the squared norms of x's rows where they are known already (the goodness of
                 the layer below is just that); None computes them.
    normalize    "l2": r = 1 / (|x| + eps) (Hinton 2022, section 2); "rms": r = 1 / (|x| / sqrt(K) + eps);
                 "none": r = 1.
    eps          >= 0, added to the norm.
    activation   "relu", "leaky_relu" (slope 0.01), "gelu" (exact), "silu" or "tanh".
    precision    of float32 products, in torch's words: "highest" float32, "high" TF32 or three bf16 products, "medium"
                 bf16; None takes torch.get_float32_matmul_precision(). Other dtypes multiply in their own type.

All raise TypeError (a wrong type or dtype), ValueError (a wrong shape, device, option or value) or RuntimeError (a
tensor that requires grad while grad mode is on; a backend that cannot run the op), and then have changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import checks, reference
from .optim import Optimizer, state_dtype
from .registry import call, define

# ---------------------------------------------------------------------------------------------------------------------
# ff_forward


def fake_forward(x, weight, bias, x_sqnorm, normalize, eps, activation, precision, return_p):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    goodness = x.new_empty((x.shape[0],), dtype=state_dtype(x.dtype))
    return y, goodness, torch.empty_like(y) if return_p else x.new_empty((0,))


def _check_forward(x, weight, bias, x_sqnorm, normalize, eps, activation, precision, return_p):
    checks.layer(x, weight, bias, normalize, eps, activation)
    if x_sqnorm is not None:
        checks.per_row("x_sqnorm", x_sqnorm, x)


define(
    "ff_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? x_sqnorm, str normalize, float eps, str activation, "
    "str precision, bool return_p) -> (Tensor y, Tensor goodness, Tensor p)",
    reference.ff_forward,
    fake_forward,
    _check_forward,
)


def ff_forward(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    x_sqnorm: Tensor | None = None,  # (M,)
    normalize: str = "l2",
    eps: float = 1e-4,
    activation: str = "relu",
    precision: str | None = None,
    return_p: bool = False,
) -> tuple[Tensor, ...]:
    """A layer's forward pass with its goodness: y = act(r x W^T + b), G_m = sum_n y_mn^2.

    The goodness is always the plain sum of squares (Hinton 2022, section 2), taken before y is rounded to its dtype.

    Args:
        return_p: also return p = y act'(z), which ff_grad and ff_update_ take for activations other than relu (for relu
            p is y). The other keywords stand at the top of this module.

    Returns:
        y (M, N) in x's dtype; goodness (M,) in the accumulation dtype; with ``return_p`` also p (M, N) in x's dtype.
    """
    checks.plain_numbers(eps=eps)
    if torch.is_grad_enabled():
        checks.no_grad("ff_forward", x=x, weight=weight, bias=bias, x_sqnorm=x_sqnorm)
    wants_p = return_p and activation != "relu"
    y, goodness, p = call(
        "ff_forward", x, weight, bias, x_sqnorm, normalize, eps, activation, checks.precision(precision), wants_p
    )
    if return_p:
        return y, goodness, p if wants_p else y
    return y, goodness


# ---------------------------------------------------------------------------------------------------------------------
# ff_grad


def _fake_grad(
    x, y, coef, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision
):  # fmt: skip
    # contiguous, however the weight lies in memory
    return weight.new_empty(weight.shape), weight.new_empty(bias.shape if bias is not None else (0,))


def _check_grad(
    x, y, coef, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision
):  # fmt: skip
    checks.layer(x, weight, bias, normalize, eps, activation)
    checks.like("y", y, (x.shape[0], weight.shape[0]), "(M, N)", x.dtype, x.device)
    checks.per_row("coef", coef, x)
    if x_sqnorm is not None:
        checks.per_row("x_sqnorm", x_sqnorm, x)
    checks.peer_terms(row_term, col_term, x, weight, x.shape[0])


define(
    "ff_grad",
    "(Tensor x, Tensor y, Tensor coef, Tensor weight, Tensor? bias, Tensor? x_sqnorm, str normalize, float eps, "
    "str activation, Tensor? row_term, Tensor? col_term, str precision) -> (Tensor grad_weight, Tensor grad_bias)",
    reference.ff_grad,
    _fake_grad,
    _check_grad,
)


def ff_grad(
    x: Tensor,  # (M, K)
    y: Tensor,  # (M, N)
    coef: Tensor,  # (M,)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    x_sqnorm: Tensor | None = None,  # (M,)
    normalize: str = "l2",
    eps: float = 1e-4,
    activation: str = "relu",
    row_term: Tensor | None = None,  # (M,)
    col_term: Tensor | None = None,  # (N,)
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The local gradient of any loss on the goodness: dz = 2 c p + a d^T, dW = dz^T (r x), db = sum_m dz.

    Args:
        y: what ff_forward returned: y for relu, p (``return_p=True``) for the other activations.
        coef: c = d loss / d G in the accumulation dtype; `logistic_loss` gives it for the logistic loss.
        row_term, col_term: a and d in the accumulation dtype, given together: a rank-1 term added to dz, not gated by
            the activation (peer normalisation as in Hinton's published code).

    Returns:
        grad_weight (N, K) and grad_bias (N,), or None without a bias, in the weight's dtype.
    """
    checks.plain_numbers(eps=eps)
    if torch.is_grad_enabled():
        checks.no_grad("ff_grad", x=x, y=y, coef=coef, weight=weight, bias=bias, x_sqnorm=x_sqnorm, row_term=row_term,
                       col_term=col_term)  # fmt: skip
    grad_weight, grad_bias = call(
        "ff_grad",
        x,
        y,
        coef,
        weight,
        bias,
        x_sqnorm,
        normalize,
        eps,
        activation,
        row_term,
        col_term,
        checks.precision(precision),
    )
    return grad_weight, None if bias is None else grad_bias


# ---------------------------------------------------------------------------------------------------------------------
# ff_update_

# the optimizer in flat form: Optimizer.kind, lr if it is a tensor, Optimizer.hyper
OPTIMIZER_SCHEMA = "str optimizer, Tensor? lr, float[] hyper"


def lr_tensor(optimizer: Optimizer) -> Tensor | None:
    return optimizer.lr if isinstance(optimizer.lr, Tensor) else None


def check_targets(
    weight: Tensor, bias: Tensor | None, state: list[Tensor], optimizer: str, **read: Tensor | None
) -> None:
    checks.state_tensors(state, optimizer, weight, bias)
    checks.targets(checks.updated(weight, bias, state, optimizer), read)


def _fake_update_(*args):
    return None


def _check_update_(
    x, y, coef, weight, bias, state, optimizer, lr, hyper, x_sqnorm, normalize, eps, activation, row_term, col_term,
    precision,
):  # fmt: skip
    _check_grad(
        x, y, coef, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision
    )  # fmt: skip
    checks.given_state(state, optimizer, lr, weight, bias)


def _enter_update_(
    x, y, coef, weight, bias, state, optimizer, lr, hyper, x_sqnorm, normalize, eps, activation, row_term, col_term,
    precision,
):  # fmt: skip
    check_targets(
        weight, bias, state, optimizer, lr=lr, x=x, y=y, coef=coef, x_sqnorm=x_sqnorm, row_term=row_term,
        col_term=col_term,
    )  # fmt: skip


define(
    "ff_update_",
    "(Tensor x, Tensor y, Tensor coef, Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)[] state, "
    f"{OPTIMIZER_SCHEMA}, Tensor? x_sqnorm, str normalize, float eps, str activation, Tensor? row_term, "
    "Tensor? col_term, str precision) -> ()",
    reference.ff_update_,
    _fake_update_,
    _check_update_,
    _enter_update_,
)


def ff_update_(
    x: Tensor,  # (M, K)
    y: Tensor,  # (M, N)
    coef: Tensor,  # (M,)
    weight: Tensor,  # (N, K), updated
    bias: Tensor | None,  # (N,), updated
    state: Mapping[str, Tensor],  # updated
    optimizer: Optimizer,
    *,
    x_sqnorm: Tensor | None = None,  # (M,)
    normalize: str = "l2",
    eps: float = 1e-4,
    activation: str = "relu",
    row_term: Tensor | None = None,  # (M,)
    col_term: Tensor | None = None,  # (N,)
    precision: str | None = None,
) -> None:
    """ff_grad and the optimizer's step in one: weight, bias and state are updated in place, the gradient never stored.

    Args:
        state: made by ``optimizer.init_state(weight, bias)``.
        optimizer: ffkernels.SGD, Adam, AdamW or HintonSGD.
        The others as for ff_grad. weight, bias and state must be contiguous and share memory with nothing else given.
    """
    checks.plain_numbers(eps=eps)
    tensors = checks.flat_state(optimizer, state, bias)
    if torch.is_grad_enabled():
        checks.no_grad("ff_update_", state, x=x, y=y, coef=coef, weight=weight, bias=bias, x_sqnorm=x_sqnorm,
                       row_term=row_term, col_term=col_term, lr=optimizer.lr)  # fmt: skip
    call(
        "ff_update_", x, y, coef, weight, bias, tensors, optimizer.kind, lr_tensor(optimizer), optimizer.hyper,
        x_sqnorm, normalize, eps, activation, row_term, col_term, checks.precision(precision),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# apply_gradient_


def _check_apply_gradient_(weight, bias, state, optimizer, lr, hyper, grad_weight, grad_bias):
    checks.matrix("weight", weight)
    if weight.dtype not in checks.DTYPES or 0 in weight.shape:
        allowed = [str(d) for d in checks.DTYPES]
        raise ValueError(f"weight must be (N, K) with N, K >= 1 of {allowed}, got {tuple(weight.shape)} {weight.dtype}")
    (n, k), acc = weight.shape, state_dtype(weight.dtype)
    checks.like("grad_weight", grad_weight, (n, k), "(N, K)", acc, weight.device)
    if bias is not None:
        checks.like("bias", bias, (n,), "(N,)", weight.dtype, weight.device)
    if (bias is None) != (grad_bias is None):
        raise ValueError(f"grad_bias must be given with a bias and only then, got {type(grad_bias).__name__}")
    if grad_bias is not None:
        checks.like("grad_bias", grad_bias, (n,), "(N,)", acc, weight.device)
    for name, t in (("grad_weight", grad_weight), ("grad_bias", grad_bias)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
    checks.given_state(state, optimizer, lr, weight, bias)


def _enter_apply_gradient_(weight, bias, state, optimizer, lr, hyper, grad_weight, grad_bias):
    check_targets(weight, bias, state, optimizer, lr=lr, grad_weight=grad_weight, grad_bias=grad_bias)


define(
    "apply_gradient_",
    f"(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)[] state, {OPTIMIZER_SCHEMA}, Tensor grad_weight, "
    "Tensor? grad_bias) -> ()",
    reference.apply_gradient_,
    _fake_update_,
    _check_apply_gradient_,
    _enter_apply_gradient_,
)


def apply_gradient_(
    grad_weight: Tensor,  # (N, K)
    grad_bias: Tensor | None,  # (N,)
    weight: Tensor,  # (N, K), updated
    bias: Tensor | None,  # (N,), updated
    state: Mapping[str, Tensor],  # updated
    optimizer: Optimizer,
) -> None:
    """The optimizer's step from a gradient that is already there, in one pass over memory: ff_update_ without ff_grad.

    For gradients that are summed over micro-batches or processes before they are used (`ffkernels.distributed`).

    Args:
        grad_weight, grad_bias: contiguous, in the accumulation dtype whatever the weight's dtype is.
        The others as for ff_update_.
    """
    tensors = checks.flat_state(optimizer, state, bias)
    if torch.is_grad_enabled():
        checks.no_grad("apply_gradient_", state, weight=weight, bias=bias, grad_weight=grad_weight, grad_bias=grad_bias,
                       lr=optimizer.lr)  # fmt: skip
    call(
        "apply_gradient_", weight, bias, tensors, optimizer.kind, lr_tensor(optimizer), optimizer.hyper, grad_weight,
        grad_bias,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# ff_step_


def _fake_step_(
    x, sign, weight, bias, state, optimizer, lr, hyper, threshold, temperature, goodness, x_sqnorm, normalize, eps,
    activation, row_term, col_term, precision,
):  # fmt: skip
    y, total, _ = fake_forward(x, weight, bias, x_sqnorm, normalize, eps, activation, precision, False)
    return y, total, total.new_empty(())


def _check_step_(
    x, sign, weight, bias, state, optimizer, lr, hyper, threshold, temperature, goodness, x_sqnorm, normalize, eps,
    activation, row_term, col_term, precision,
):  # fmt: skip
    checks.layer(x, weight, bias, normalize, eps, activation)
    checks.non_empty(x)
    checks.per_row("sign", sign, x)
    checks.loss_options(threshold, temperature, goodness)
    if x_sqnorm is not None:
        checks.per_row("x_sqnorm", x_sqnorm, x)
    checks.peer_terms(row_term, col_term, x, weight, x.shape[0])
    checks.given_state(state, optimizer, lr, weight, bias)


def _enter_step_(
    x, sign, weight, bias, state, optimizer, lr, hyper, threshold, temperature, goodness, x_sqnorm, normalize, eps,
    activation, row_term, col_term, precision,
):  # fmt: skip
    check_targets(
        weight, bias, state, optimizer, lr=lr, x=x, sign=sign, x_sqnorm=x_sqnorm, row_term=row_term, col_term=col_term
    )
    checks.sign_values(sign)


define(
    "ff_step_",
    "(Tensor x, Tensor sign, Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)[] state, "
    f"{OPTIMIZER_SCHEMA}, float threshold, float temperature, str goodness, Tensor? x_sqnorm, str normalize, "
    "float eps, str activation, Tensor? row_term, Tensor? col_term, str precision) "
    "-> (Tensor y, Tensor goodness, Tensor loss)",
    reference.ff_step_,
    _fake_step_,
    _check_step_,
    _enter_step_,
)


def ff_step_(
    x: Tensor,  # (M, K)
    sign: Tensor,  # (M,)
    weight: Tensor,  # (N, K), updated
    bias: Tensor | None,  # (N,), updated
    state: Mapping[str, Tensor],  # updated
    optimizer: Optimizer,
    *,
    threshold: float = 2.0,
    temperature: float = 1.0,
    goodness: str = "mean",
    x_sqnorm: Tensor | None = None,  # (M,)
    normalize: str = "l2",
    eps: float = 1e-4,
    activation: str = "relu",
    row_term: Tensor | None = None,  # (M,)
    col_term: Tensor | None = None,  # (N,)
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's whole training step: forward, goodness, logistic loss, gradient, optimizer.

    The loss is mean_m T softplus(-s_m (g_m - theta) / T) with g = G / E (Hinton 2022, section 2, equation 1, whose
    negative log likelihood it is): finite for every finite goodness.

    Args:
        sign: +1 for positive rows, -1 for negative ones, in any order and any real dtype.
        threshold: theta >= 0, in the units of g. temperature: T > 0.
        goodness: "sum" (E = 1) or "mean" (E = N).
        The others as for ff_update_.

    Returns:
        y (M, N) in x's dtype, from before the update; goodness (M,), the plain sum G; loss (), both in the accumulation
        dtype.
    """
    checks.matrix("x", x)
    sign = checks.as_sign(sign, x)
    checks.plain_numbers(eps=eps, threshold=threshold, temperature=temperature)
    tensors = checks.flat_state(optimizer, state, bias)
    if torch.is_grad_enabled():
        checks.no_grad("ff_step_", state, x=x, sign=sign, weight=weight, bias=bias, x_sqnorm=x_sqnorm,
                       row_term=row_term, col_term=col_term, lr=optimizer.lr)  # fmt: skip
    return call(
        "ff_step_", x, sign, weight, bias, tensors, optimizer.kind, lr_tensor(optimizer), optimizer.hyper, threshold,
        temperature, goodness, x_sqnorm, normalize, eps, activation, row_term, col_term, checks.precision(precision),
    )  # fmt: skip
