"""Reduce kernel: adds the parts of a split gradient in order and takes the optimizer's step, or stores the gradient."""

import triton
import triton.language as tl

from .optimizers import finish, step_numbers


@triton.jit
def add_parts(
    parts,  # (splits, size)
    splits,
    size,
    at,
    mask,
):
    total = tl.load(parts + at, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, splits):
        parts += size
        total += tl.load(parts + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def reduce_kernel(
    parts,  # (splits, N K)
    bias_parts,  # (splits, N), or None
    loss_parts,  # (splits,), or None
    weight,  # (N K,), in place, or the gradient, written
    bias,  # (N,), in place, or the gradient, written
    slot0,  # (N K,), in place, or None
    slot1,  # (N K,), in place, or None
    bias_slot0,  # (N,), in place, or None
    bias_slot1,  # (N,), in place, or None
    step,  # (): steps with this one, or None
    lr,  # (), or None: rate
    loss_out,  # (), written, or None
    splits,
    size,  # N K
    N,
    rate,
    h1,
    h2,
    h3,
    h4,
    log_beta1,
    log_beta2,
    EPILOGUE: tl.constexpr,  # "store", or the optimizer's kind
    BLOCK: tl.constexpr,
):
    pid, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    numbers = step_numbers(step, lr, rate, h1, h2, h3, h4, log_beta1, log_beta2, EPILOGUE)
    at = tl.arange(0, BLOCK)
    if pid < blocks:
        start = pid.to(tl.int64) * BLOCK
        mask = start + at < size
        grad = add_parts(parts + start, splits, size, at, mask)
        finish(grad, weight, slot0, slot1, start, at, mask, numbers, EPILOGUE, False)
    elif bias is not None:
        start = (pid - blocks).to(tl.int64) * BLOCK
        mask = start + at < N
        grad = add_parts(bias_parts + start, splits, N, at, mask)
        finish(grad, bias, bias_slot0, bias_slot1, start, at, mask, numbers, EPILOGUE, True)
    if loss_out is not None and pid == 0:
        loss = 0.0
        for i in range(splits):
            loss += tl.load(loss_parts + i)
        tl.store(loss_out, loss)
