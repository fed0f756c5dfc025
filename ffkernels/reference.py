"""The ops in plain torch: what every kernel must compute, for float64, float32, bf16 and fp16 on any device.

Each function takes the flat arguments of the registered op of its name (see ops.py for what they mean). ``acc`` is the
accumulation dtype: float64 for float64 tensors, float32 for all others. In-place functions compute everything before
they write anything. The optimizers' steps are in reference_optim.py, the softmax head in reference_head.py.

Products run through torch's own matmul: with ``torch.set_float32_matmul_precision`` below "highest" that matmul may
itself round float32, whatever ``precision`` says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import peer
from .dropout import dropout
from .optim import state_dtype
from .reference_optim import OPTIMIZER_FLOATS, optimized, write

LEAKY_SLOPE = 0.01  # torch.nn.LeakyReLU's default


def _operand(
    t: Tensor,
    precision: str,
) -> Tensor:
    """A GEMM operand in the accumulation dtype: "medium" rounds float32 to bf16, "high" may and here does not."""
    if precision == "medium" and t.dtype == torch.float32:
        t = t.bfloat16()
    return t.to(state_dtype(t.dtype))


def _row_scale(
    x: Tensor,  # (M, K)
    x_sqnorm: Tensor | None,  # (M,)
    normalize: str,
    eps: float,
) -> Tensor | None:  # (M,), or None where no scale applies
    """r_m = 1 / (sqrt(q_m / D) + eps), with D = 1 ("l2") or K ("rms")."""
    if normalize == "none":
        return None
    q = x.to(state_dtype(x.dtype)).square().sum(1) if x_sqnorm is None else x_sqnorm
    return scale_of(q, x.shape[1] if normalize == "rms" else 1, eps)


def scale_of(
    sqnorm: Tensor,  # (M,)
    divisor: int,
    eps: float,
) -> Tensor:  # (M,)
    return 1 / ((sqnorm / divisor).sqrt() + eps)


def _activate(
    z: Tensor,  # (M, N)
    activation: str,
) -> tuple[Tensor, Tensor]:  # y = act(z), act'(z)
    if activation == "relu":
        return z.relu(), (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        return torch.where(z > 0, z, LEAKY_SLOPE * z), torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE)
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        return z * cdf, cdf + z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    if activation == "silu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    y = torch.tanh(z)
    return y, 1 - y.square()


def ff_forward(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    x_sqnorm: Tensor | None,  # (M,) acc
    normalize: str,
    eps: float,
    activation: str,
    precision: str,
    return_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # y (M, N), goodness (M,) acc, p (M, N) or (0,)
    acc = state_dtype(x.dtype)
    z = _operand(x, precision) @ _operand(weight, precision).T
    r = _row_scale(x, x_sqnorm, normalize, eps)
    if r is not None:
        z = r[:, None] * z
    if bias is not None:
        z = z + bias.to(acc)
    y, slope = _activate(z, activation)
    p = (y * slope).to(x.dtype) if return_p else x.new_empty(0)
    return y.to(x.dtype), y.square().sum(1), p


def logistic_loss(
    goodness: Tensor,  # (M,) acc: G, the plain sum of squares
    sign: Tensor,  # (M,) acc: +1 or -1
    divisor: float,  # E: 1 for "sum", N for "mean"
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # loss (), coef (M,) = d loss / d G
    """mean_m T softplus(-s_m (G_m / E - theta) / T) and its derivative by G (Hinton 2022, section 2, equation 1)."""
    v = -sign * (goodness / divisor - threshold)
    u = v / temperature
    loss = (v.relu() + temperature * torch.log1p(torch.exp(-u.abs()))).mean()  # v may be finite where u is not
    return loss, -sign * torch.sigmoid(u) / (divisor * goodness.shape[0])


def _gradient(
    x: Tensor,  # (M, K)
    p: Tensor,  # (M, N): y act'(z), which is y itself for relu
    coef: Tensor,  # (M,) acc
    x_sqnorm: Tensor | None,  # (M,) acc
    normalize: str,
    eps: float,
    row_term: Tensor | None,  # (M,) acc
    col_term: Tensor | None,  # (N,) acc
    precision: str,
) -> tuple[Tensor, Tensor]:  # dW (N, K) acc, db (N,) acc
    dz = 2 * coef[:, None] * p.to(coef.dtype)
    if row_term is not None and col_term is not None:
        dz = dz + row_term[:, None] * col_term
    r = _row_scale(x, x_sqnorm, normalize, eps)
    scaled = dz if r is None else dz * r[:, None]
    return _operand(scaled, precision).T @ _operand(x, precision), dz.sum(0)


def ff_grad(
    x: Tensor,  # (M, K)
    y: Tensor,  # (M, N): y for relu, p otherwise
    coef: Tensor,  # (M,) acc
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    x_sqnorm: Tensor | None,  # (M,) acc
    normalize: str,
    eps: float,
    activation: str,
    row_term: Tensor | None,  # (M,) acc
    col_term: Tensor | None,  # (N,) acc
    precision: str,
) -> tuple[Tensor, Tensor]:  # grad_weight (N, K), grad_bias (N,) or (0,)
    dw, db = _gradient(x, y, coef, x_sqnorm, normalize, eps, row_term, col_term, precision)
    return dw.to(weight.dtype), weight.new_empty(0) if bias is None else db.to(bias.dtype)


def _update(
    x: Tensor,
    y: Tensor,
    coef: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: list[Tensor],
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
    x_sqnorm: Tensor | None,
    normalize: str,
    eps: float,
    row_term: Tensor | None,
    col_term: Tensor | None,
    precision: str,
) -> list[tuple[Tensor, Tensor]]:
    grads = _gradient(x, y, coef, x_sqnorm, normalize, eps, row_term, col_term, precision)
    params = [weight] if bias is None else [weight, bias]
    return optimized(params, list(grads), state, optimizer, lr, hyper)


def ff_update_(
    x: Tensor,  # (M, K)
    y: Tensor,  # (M, N): y for relu, p otherwise
    coef: Tensor,  # (M,) acc
    weight: Tensor,  # (N, K), in place
    bias: Tensor | None,  # (N,), in place
    state: list[Tensor],  # in place
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
    x_sqnorm: Tensor | None,  # (M,) acc
    normalize: str,
    eps: float,
    activation: str,
    row_term: Tensor | None,  # (M,) acc
    col_term: Tensor | None,  # (N,) acc
    precision: str,
) -> None:
    write(
        _update(
            x,
            y,
            coef,
            weight,
            bias,
            state,
            optimizer,
            lr,
            hyper,
            x_sqnorm,
            normalize,
            eps,
            row_term,
            col_term,
            precision,
        )
    )


def apply_gradient_(
    weight: Tensor,  # (N, K), in place
    bias: Tensor | None,  # (N,), in place
    state: list[Tensor],  # in place
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
    grad_weight: Tensor,  # (N, K) acc
    grad_bias: Tensor | None,  # (N,) acc
) -> None:
    params = [weight] if bias is None else [weight, bias]
    grads = [grad_weight] if grad_bias is None else [grad_weight, grad_bias]
    write(optimized(params, grads, state, optimizer, lr, hyper))


def _step(
    x, sign, weight, bias, state, optimizer, lr, hyper, threshold, temperature, goodness, x_sqnorm, normalize, eps,
    activation, row_term, col_term, precision,
):  # fmt: skip
    """A layer's step without its writes: (y, G, loss), writes. Arguments as for ff_step_."""
    curved = activation != "relu"
    y, total, p = ff_forward(x, weight, bias, x_sqnorm, normalize, eps, activation, precision, curved)
    divisor = weight.shape[0] if goodness == "mean" else 1
    loss, coef = logistic_loss(total, sign, divisor, threshold, temperature)
    writes = _update(
        x, p if curved else y, coef, weight, bias, state, optimizer, lr, hyper, x_sqnorm, normalize, eps, row_term,
        col_term, precision,
    )  # fmt: skip
    return (y, total, loss), writes


def ff_step_(
    x: Tensor,  # (M, K)
    sign: Tensor,  # (M,) acc
    weight: Tensor,  # (N, K), in place
    bias: Tensor | None,  # (N,), in place
    state: list[Tensor],  # in place
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
    threshold: float,
    temperature: float,
    goodness: str,
    x_sqnorm: Tensor | None,  # (M,) acc
    normalize: str,
    eps: float,
    activation: str,
    row_term: Tensor | None,  # (M,) acc
    col_term: Tensor | None,  # (N,) acc
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # y (M, N) from before the update, G (M,) acc, loss () acc
    results, writes = _step(
        x, sign, weight, bias, state, optimizer, lr, hyper, threshold, temperature, goodness, x_sqnorm, normalize, eps,
        activation, row_term, col_term, precision,
    )  # fmt: skip
    write(writes)
    return results


def overlay(
    x: Tensor,  # (M, K)
    labels: Tensor,  # (M,) int64
    num_classes: int,
    strength: float,
) -> Tensor:  # (M, K)
    """x with ``strength`` in column ``label`` and 0 in the other columns below ``num_classes`` (Hinton 2022, 3.3)."""
    classes = torch.arange(num_classes, device=x.device)
    one_hot = torch.where(labels[:, None] == classes, x.new_full((1,), strength), x.new_zeros(1))
    return torch.cat([one_hot, x[:, num_classes:]], dim=1)


def _label_rows(
    x: Tensor,  # (B, K)
    labels_pos: Tensor,  # (B,) int64
    labels_neg: Tensor,  # (B,) int64
    num_classes: int,
    strength: float,
) -> tuple[Tensor, Tensor]:  # rows (2 B, K): positive, then negative; sign (2 B,) acc
    rows = torch.cat([overlay(x, labels, num_classes, strength) for labels in (labels_pos, labels_neg)])
    sign = torch.ones(rows.shape[0], dtype=state_dtype(x.dtype), device=x.device)
    sign[x.shape[0] :] = -1
    return rows, sign


def ff_network_step_(
    x: Tensor,  # (M, K), or (B, K) with labels
    sign: Tensor | None,  # (M,) acc
    x_sqnorm: Tensor | None,  # (M,) acc, of the network's input
    labels_pos: Tensor | None,  # (B,) int64: then M = 2 B, positive rows first
    labels_neg: Tensor | None,  # (B,) int64
    num_classes: int,
    strength: float,
    weights: list[Tensor],  # L of (N_l, N_{l-1}), in place
    biases: list[Tensor],  # of the layers that have one, in place
    states: list[Tensor],  # all layers' states, one after the other, in place
    has_bias: list[bool],  # L
    state_sizes: list[int],  # L: tensors of states that belong to the layer
    optimizers: list[str],  # L
    lrs: list[Tensor],  # L, or none
    hypers: list[float],  # 5 L
    thresholds: list[float],  # L
    temperatures: list[float],  # L
    goodness: list[str],  # L
    normalize: list[str],  # L
    eps: list[float],  # L
    activations: list[str],  # L
    precisions: list[str],  # L
    peers: list[float],  # L: lambda of peer normalisation; 0: none
    peer_means: list[Tensor],  # of the layers whose lambda is not 0: (N_l,) acc, in place
    dropouts: list[float],  # L: of the layer's input; 0 for the first
    dropout_seed: Tensor | None,  # (1,) int64
) -> tuple[Tensor, Tensor]:  # G (L, M) acc, loss (L,) acc
    if labels_pos is not None and labels_neg is not None:
        x, sign = _label_rows(x, labels_pos, labels_neg, num_classes, strength)
    assert sign is not None
    assert x.dim() == 2, "several minibatches come one by one (minibatches.py)"
    totals, losses, writes = [], [], []
    own_bias, own_state, own_mean = iter(biases), iter(states), iter(peer_means)
    for i, weight in enumerate(weights):
        if dropouts[i] and dropout_seed is not None:
            x, x_sqnorm = dropout(x, dropouts[i], dropout_seed, i), None
        row_term = col_term = peer_mean = None
        if peers[i]:
            peer_mean = next(own_mean)
            divisor = weight.shape[0] if goodness[i] == "mean" else 1
            row_term, col_term = peer.terms(sign, peer_mean, peers[i], divisor)
        (x, x_sqnorm, loss), layer_writes = _step(
            x, sign, weight, next(own_bias) if has_bias[i] else None, [next(own_state) for _ in range(state_sizes[i])],
            optimizers[i], lrs[i] if lrs else None, hypers[OPTIMIZER_FLOATS * i : OPTIMIZER_FLOATS * (i + 1)],
            thresholds[i], temperatures[i], goodness[i], x_sqnorm, normalize[i], eps[i], activations[i], row_term,
            col_term, precisions[i],
        )  # fmt: skip
        totals.append(x_sqnorm)  # G of this layer is the squared norm of the next one's input
        losses.append(loss)
        writes += layer_writes
        if peer_mean is not None:
            writes.append((peer_mean, peer.new_mean(peer_mean, x, sign)))
    write(writes)
    return torch.stack(totals), torch.stack(losses)


def ff_network_forward(
    x: Tensor,  # (M, K)
    x_sqnorm: Tensor | None,  # (M,) acc
    num_classes: int,
    strength: float,
    weights: list[Tensor],  # of (N_l, N_(l-1))
    biases: list[Tensor],  # of (N_l,), of the layers that have one
    has_bias: list[bool],
    normalize: list[str],
    eps: list[float],
    activations: list[str],
    precisions: list[str],
) -> tuple[list[Tensor], Tensor]:  # y (M, N_l) of each layer; G (L, M) acc
    if num_classes:
        x = x.clone()
        x[:, :num_classes] = strength / num_classes
    ys, totals, own_bias = [], [], iter(biases)
    for i, weight in enumerate(weights):
        bias = next(own_bias) if has_bias[i] else None
        x, x_sqnorm, _ = ff_forward(
            x, weight, bias, x_sqnorm, normalize[i], eps[i], activations[i], precisions[i], False
        )  # fmt: skip
        ys.append(x)
        totals.append(x_sqnorm)
    return ys, torch.stack(totals)


def ff_label_forward(
    x: Tensor,  # (B, K)
    labels: Tensor,  # (B, C) int64
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    num_classes: int,
    strength: float,
    normalize: str,
    eps: float,
    activation: str,
    precision: str,
    return_p: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # y (B C, N), G (B C,) acc, p (B C, N) or (0,)
    rows = overlay(x.repeat_interleave(labels.shape[1], dim=0), labels.flatten(), num_classes, strength)
    return ff_forward(rows, weight, bias, None, normalize, eps, activation, precision, return_p)


def ff_label_step_(
    x: Tensor,  # (B, K)
    labels_pos: Tensor,  # (B,) int64
    labels_neg: Tensor,  # (B,) int64
    weight: Tensor,  # (N, K), in place
    bias: Tensor | None,  # (N,), in place
    state: list[Tensor],  # in place
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
    num_classes: int,
    strength: float,
    threshold: float,
    temperature: float,
    goodness: str,
    normalize: str,
    eps: float,
    activation: str,
    row_term: Tensor | None,  # (2 B,) acc
    col_term: Tensor | None,  # (N,) acc
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # y (2 B, N): positive rows, then negative; G (2 B,) acc, loss () acc
    rows, sign = _label_rows(x, labels_pos, labels_neg, num_classes, strength)
    return ff_step_(
        rows, sign, weight, bias, state, optimizer, lr, hyper, threshold, temperature, goodness, None, normalize, eps,
        activation, row_term, col_term, precision,
    )  # fmt: skip
