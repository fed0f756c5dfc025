"""The optimizers in plain torch, as reference.py's in-place ops use them: torch.optim's formulas and Hinton's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OPTIMIZER_FLOATS = 5  # entries of hyper: lr, then four that depend on the optimizer


def sgd(
    param: Tensor,
    grad: Tensor,
    slots: list[Tensor],  # [momentum_buffer] or []
    step: Tensor,  # (): steps before this one
    lr: Tensor | float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
) -> tuple[Tensor, list[Tensor]]:
    """torch.optim.SGD: the first step's buffer is the gradient itself, undamped."""
    if weight_decay:
        grad = grad + weight_decay * param
    if not slots:
        return param - lr * grad, []
    buffer = torch.where(step == 0, grad, momentum * slots[0] + (1 - dampening) * grad)
    return param - lr * (grad + momentum * buffer if nesterov else buffer), [buffer]


def adam(
    decoupled: bool,
    param: Tensor,
    grad: Tensor,
    slots: list[Tensor],  # [exp_avg, exp_avg_sq]
    step: Tensor,  # (): steps before this one
    lr: Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, list[Tensor]]:
    """torch.optim.Adam, and AdamW where the decay is decoupled."""

    def bias_correction(beta: float) -> Tensor:  # 1 - beta^t, which cancels badly in float32 for t = 1
        return -torch.expm1((step + 1) * math.log(beta)) if beta > 0 else torch.ones_like(step)

    if decoupled:
        param = param * (1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * param
    exp_avg = beta1 * slots[0] + (1 - beta1) * grad
    exp_avg_sq = beta2 * slots[1] + (1 - beta2) * grad.square()
    denom = (exp_avg_sq / bias_correction(beta2)).sqrt() + eps
    return param - lr / bias_correction(beta1) * exp_avg / denom, [exp_avg, exp_avg_sq]


def hinton_sgd(
    param: Tensor,
    grad: Tensor,
    slots: list[Tensor],  # [momentum_buffer]
    lr: Tensor | float,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, list[Tensor]]:
    """Hinton's published code: the momentum averages gradients, the weight decay stands beside it."""
    buffer = momentum * slots[0] + (1 - momentum) * grad
    return param - lr * (buffer + weight_decay * param), [buffer]


def optimized(
    params: list[Tensor],  # weight, and bias if there is one
    grads: list[Tensor],  # acc
    state: list[Tensor],  # step, the weight's slots, the bias's slots
    optimizer: str,
    lr: Tensor | None,
    hyper: list[float],
) -> list[tuple[Tensor, Tensor]]:
    """The optimizer's step as (target, new value) pairs, for the caller to write when all of them are there."""
    step, slots = state[0], state[1:]
    rate = hyper[0] if lr is None else lr.to(step.dtype)
    per_param = len(slots) // len(params)
    writes = [(step, step + 1)]
    for i, (param, grad) in enumerate(zip(params, grads, strict=False)):
        own = slots[i * per_param : (i + 1) * per_param]
        master = param.to(step.dtype)
        if optimizer == "sgd":
            new, new_slots = sgd(master, grad, own, step, rate, *hyper[1:])
        elif optimizer == "hinton_sgd":  # the bias does not decay
            new, new_slots = hinton_sgd(master, grad, own, rate, hyper[1], hyper[2] if i == 0 else 0.0)
        else:
            new, new_slots = adam(optimizer == "adamw", master, grad, own, step, rate, *hyper[1:])
        writes += [(param, new), *zip(own, new_slots, strict=True)]
    return writes


def write(writes: list[tuple[Tensor, Tensor]]) -> None:
    for target, value in writes:
        target.copy_(value)
