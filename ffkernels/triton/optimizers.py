"""The optimizers' formulas on values in registers: torch.optim's, applied where the gradient is complete."""

import triton
import triton.language as tl


@triton.jit
def one_minus_power(steps, log_beta):
    """1 - beta^t, without the cancellation of float32 for beta near 1 and small t."""
    v = steps * log_beta
    series = 1.0 + v * (0.5 + v * (1.0 / 6 + v * (1.0 / 24 + v * (1.0 / 120 + v * (1.0 / 720)))))
    return tl.where(v > -0.125, -v * series, 1.0 - tl.exp(v))


@triton.jit
def step_factors(
    step,  # (): steps with this one
    lr,  # () on the device, or None
    rate,  # lr where it is not on the device
    log_beta1,
    log_beta2,
    OPTIMIZER: tl.constexpr,
):
    """The numbers of a step that all elements share: lr, steps, lr / (1 - beta1^t), 1 / (1 - beta2^t)."""
    steps = tl.load(step)
    if lr is not None:
        rate = tl.load(lr)
    first = rate
    second = rate
    if OPTIMIZER == "adam" or OPTIMIZER == "adamw":
        first = rate / one_minus_power(steps, log_beta1)
        second = 1.0 / one_minus_power(steps, log_beta2)
    return rate, steps, first, second


@triton.jit
def optimize(
    grad,
    param,  # pointers, like the next two
    slot0,  # exp_avg or momentum_buffer, or None
    slot1,  # exp_avg_sq, or None
    mask,
    rate,
    steps,
    first,
    second,
    h1,  # the optimizer's own four numbers, in the order of Optimizer.hyper
    h2,
    h3,
    h4,
    OPTIMIZER: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One step on the elements at these places, in place."""
    value = tl.load(param, mask=mask, other=0.0).to(tl.float32)
    old0 = 0.0
    old1 = 0.0
    if slot0 is not None:
        old0 = tl.load(slot0, mask=mask, other=0.0)
    if slot1 is not None:
        old1 = tl.load(slot1, mask=mask, other=0.0)
    if VECTOR:  # a short vector's elements are held by several threads, of which one writes
        tl.debug_barrier()
    if OPTIMIZER == "sgd":  # momentum, dampening, weight_decay, nesterov
        grad += h3 * value
        if slot0 is not None:
            buffer = tl.where(steps == 1.0, grad, h1 * old0 + (1.0 - h2) * grad)
            tl.store(slot0, buffer, mask=mask)
            grad = tl.where(h4 > 0.0, grad + h1 * buffer, buffer)
        value -= rate * grad
    else:  # beta1, beta2, eps, weight_decay
        tl.static_assert(OPTIMIZER == "adam" or OPTIMIZER == "adamw")
        if OPTIMIZER == "adamw":
            value *= 1.0 - rate * h4
        else:
            grad += h4 * value
        exp_avg = h1 * old0 + (1.0 - h1) * grad
        exp_avg_sq = h2 * old1 + (1.0 - h2) * grad * grad
        tl.store(slot0, exp_avg, mask=mask)
        tl.store(slot1, exp_avg_sq, mask=mask)
        value -= first * exp_avg / (tl.sqrt_rn(exp_avg_sq * second) + h3)
    tl.store(param, value.to(param.dtype.element_ty), mask=mask)
