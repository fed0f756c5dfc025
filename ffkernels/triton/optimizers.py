"""The optimizers' formulas on values in registers (optim.py), applied where the gradient is complete."""

import triton
import triton.language as tl


@triton.jit
def one_minus_power(steps, log_beta):
    """1 - beta^t, without the cancellation of float32 for beta near 1 and small t."""
    v = steps * log_beta
    series = 1.0 + v * (0.5 + v * (1.0 / 6 + v * (1.0 / 24 + v * (1.0 / 120 + v * (1.0 / 720)))))
    return tl.where(v > -0.125, -v * series, 1.0 - tl.exp(v))


@triton.jit
def step_numbers(
    step,  # (): steps with this one
    lr,  # () on the device, or None
    rate,  # lr where it is not on the device
    h1,  # the optimizer's own four numbers, in the order of Optimizer.hyper
    h2,
    h3,
    h4,
    log_beta1,
    log_beta2,
    EPILOGUE: tl.constexpr,  # the optimizer's kind, or "store"
):
    """The numbers that all elements share: lr, t, lr / (1 - beta1^t), 1 / (1 - beta2^t), the optimizer's own four, and
    1 less the first two of them."""
    steps = 0.0
    first = rate
    second = rate
    if EPILOGUE != "store":
        steps = tl.load(step)
        if lr is not None:
            rate = tl.load(lr)
        if EPILOGUE == "adam" or EPILOGUE == "adamw":
            first = rate / one_minus_power(steps, log_beta1)
            second = 1.0 / one_minus_power(steps, log_beta2)
    rest1 = 1.0 - h1
    rest2 = 1.0 - h2
    if EPILOGUE == "adam" or EPILOGUE == "adamw":  # 1 - 0.999 in float32 is off by 1e-5
        rest1 = one_minus_power(1.0, log_beta1)
        rest2 = one_minus_power(1.0, log_beta2)
    return rate, steps, first, second, h1, h2, h3, h4, rest1, rest2


@triton.jit
def finish(
    grad,
    param,  # the gradient itself where it is stored
    slot0,  # exp_avg or momentum_buffer, or None
    slot1,  # exp_avg_sq, or None
    start,
    at,  # offsets from start
    mask,
    numbers,  # of step_numbers
    EPILOGUE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One step of the optimizer on these elements, in place; or the gradient stored."""
    param += start
    if EPILOGUE == "store":
        tl.store(param + at, grad.to(param.dtype.element_ty), mask=mask)
    else:
        rate, steps, first, second, h1, h2, h3, h4, rest1, rest2 = numbers
        value = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
        old0 = 0.0
        old1 = 0.0
        if slot0 is not None:
            slot0 += start
            old0 = tl.load(slot0 + at, mask=mask, other=0.0)
        if slot1 is not None:
            slot1 += start
            old1 = tl.load(slot1 + at, mask=mask, other=0.0)
        if BIAS:  # a short vector's elements are held by several threads, of which one writes
            tl.debug_barrier()
        if EPILOGUE == "sgd":  # momentum, dampening, weight_decay, nesterov
            grad += h3 * value
            if slot0 is not None:
                new0 = tl.where(steps == 1.0, grad, h1 * old0 + rest2 * grad)
                tl.store(slot0 + at, new0, mask=mask)
                grad = tl.where(h4 > 0.0, grad + h1 * new0, new0)
            value -= rate * grad
        elif EPILOGUE == "hinton_sgd":  # momentum, weight_decay, which is not the bias's
            new0 = h1 * old0 + rest1 * grad
            tl.store(slot0 + at, new0, mask=mask)
            if not BIAS:
                value *= 1.0 - rate * h2
            value -= rate * new0
        else:  # beta1, beta2, eps, weight_decay
            tl.static_assert(EPILOGUE == "adam" or EPILOGUE == "adamw")
            if EPILOGUE == "adamw":
                value *= 1.0 - rate * h4
            else:
                grad += h4 * value
            new0 = h1 * old0 + rest1 * grad
            new1 = h2 * old1 + rest2 * grad * grad
            tl.store(slot0 + at, new0, mask=mask)
            tl.store(slot1 + at, new1, mask=mask)
            value -= first * new0 / (tl.sqrt_rn(new1 * second) + h3)
        tl.store(param + at, value.to(param.dtype.element_ty), mask=mask)
