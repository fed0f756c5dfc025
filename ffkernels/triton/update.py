"""Update kernel: dW = (c r y)^T x with the loss in its prologue and the optimizer in its epilogue, one launch.

dW never reaches memory, but for ff_grad, which asks for it, and for the parts of a split sum (reduce.py).
"""

import triton
import triton.language as tl

from .common import load_tile, logistic, multiply, row_scale, sum_parts, tile_place
from .optimizers import optimize, step_factors


@triton.jit
def row_factors(
    coef,  # (M,), or None: the logistic loss
    sign,  # (M,)
    goodness,  # (parts, M)
    sqnorm,  # (q_parts, M)
    rows,
    M,
    parts,
    q_parts,
    eps,
    inv_width,
    inv_divisor,
    threshold,
    temperature,
    NORMALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    Q_PARTS: tl.constexpr,
):
    """Of each row: c (without the 1 / (E M) of the logistic loss), r, G and the loss. 0 beyond the last row."""
    inside = rows < M
    if coef is not None:
        c = tl.load(coef + rows, mask=inside, other=0.0)
        total = c
        loss = c
    else:
        total = sum_parts(goodness, parts, M, rows, inside, PARTS)
        s = tl.load(sign + rows, mask=inside, other=0.0)
        loss, slope = logistic(total, s, inv_divisor, threshold, temperature)
        c = -s * slope
        loss = tl.where(inside, loss, 0.0)
    r = tl.where(inside, 1.0, 0.0)
    if NORMALIZE != "none":
        q = sum_parts(sqnorm, q_parts, M, rows, inside, Q_PARTS)
        r = tl.where(inside, row_scale(q, eps, inv_width, NORMALIZE), 0.0)
    return c, r, total, loss


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def write_gradient(
    grad,  # (ROWS, COLS)
    row,
    col,
    weight,
    slot0,
    slot1,
    out,  # (N, K), or None
    N,
    K,
    rate,
    steps,
    first,
    second,
    h1,
    h2,
    h3,
    h4,
    EPILOGUE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIECES: tl.constexpr,  # parts of the columns that are in registers one after the other
):
    if PIECES > 1:
        left, right = halves(grad, ROWS, COLS)
        write_gradient(left, row, col, weight, slot0, slot1, out, N, K, rate, steps, first, second, h1, h2, h3, h4,
                       EPILOGUE, UNIT, ROWS, COLS // 2, PIECES // 2)  # fmt: skip
        write_gradient(right, row, col + COLS // 2, weight, slot0, slot1, out, N, K, rate, steps, first, second, h1, h2,
                       h3, h4, EPILOGUE, UNIT, ROWS, COLS // 2, PIECES // 2)  # fmt: skip
    else:
        K = tl.multiple_of(K, UNIT)
        n, k = tl.arange(0, ROWS), tl.arange(0, COLS)
        start = row.to(tl.int64) * K + col
        place = n[:, None] * K + k[None, :]
        mask = (row + n < N)[:, None] & (col + k < K)[None, :]
        if EPILOGUE == "store":
            tl.store(out + start + place, grad.to(out.dtype.element_ty), mask=mask)
        else:
            own0 = slot0
            own1 = slot1
            if slot0 is not None:
                own0 = slot0 + start + place
            if slot1 is not None:
                own1 = slot1 + start + place
            optimize(grad, weight + start + place, own0, own1, mask, rate, steps, first, second, h1, h2, h3, h4,
                     EPILOGUE, False)  # fmt: skip


@triton.jit
def update_kernel(
    x,  # (M, K), or its descriptor
    y,  # (M, N), or its descriptor
    coef,  # (M,), or None: from the logistic loss
    sign,  # (M,), or None
    goodness,  # (parts, M), or None
    sqnorm,  # (q_parts, M), or None without normalisation
    row_term,  # (M,), or None
    col_term,  # (N,), or None
    weight,  # (N, K), in place; this and the next six None where a gradient is stored
    bias,  # (N,), in place
    slot0,  # (N, K), in place
    slot1,  # (N, K), in place
    bias_slot0,  # (N,), in place
    bias_slot1,  # (N,), in place
    step,  # (): steps with this one
    lr,  # (), or None: rate
    grad_weight,  # (splits, N, K), written, or None
    grad_bias,  # (splits, N), written, or None
    goodness_out,  # (M,), written, or None
    loss_out,  # (splits,), written, or None: sums of the rows' losses
    M,
    K,
    N,
    x_stride,
    y_stride,
    parts,
    q_parts,
    split_rows,  # rows of a split
    eps,
    inv_width,
    inv_divisor,
    threshold,
    temperature,
    coef_scale,  # of c: 2, or 2 / (E M)
    loss_scale,  # of the sum of losses
    rate,
    h1,
    h2,
    h3,
    h4,
    log_beta1,
    log_beta2,
    NORMALIZE: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "store", or the optimizer's kind
    MODE: tl.constexpr,
    PARTS: tl.constexpr,
    Q_PARTS: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of weight
    BLOCK_N: tl.constexpr,  # columns of weight
    BLOCK_K: tl.constexpr,  # rows of x and y at a time
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    HALF: tl.constexpr,  # whether operands are fp16
):
    pid, split = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tile_place(pid, tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, M)
    n, m = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    in_n = row + n < N

    largest = 1.0
    if HALF:  # c r y in fp16 needs a scale: the largest |c r| becomes 1
        peak = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(begin, end, BLOCK_K):
            c, r, _, _ = row_factors(
                coef, sign, goodness, sqnorm, start + m, M, parts, q_parts, eps, inv_width, inv_divisor, threshold,
                temperature, NORMALIZE, PARTS, Q_PARTS,
            )  # fmt: skip
            c = tl.abs(c * coef_scale)
            if row_term is not None:
                c = tl.maximum(c, tl.abs(tl.load(row_term + start + m, mask=start + m < end, other=0.0)))
            # rows of infinite or undefined scale spoil their own product only; rows of zeros add nothing
            size = c * r
            peak = tl.maximum(peak, tl.where(size < 3e38, size, 0.0))
        largest = tl.max(peak, 0)
        largest = tl.where(largest > 0.0, largest, 1.0)
    scale = 1.0 / largest

    d = tl.zeros((BLOCK_M,), tl.float32)
    if col_term is not None:
        d = tl.load(col_term + row + n, mask=in_n, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    acc_loss = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(begin, end, BLOCK_K):
        a = load_tile(y, start, row, end, N, y_stride, BLOCK_K, BLOCK_M, Y_UNIT)
        b = load_tile(x, start, col, end, K, x_stride, BLOCK_K, BLOCK_N, X_UNIT)
        rows = start + m
        c, r, total, loss = row_factors(
            coef, sign, goodness, sqnorm, rows, M, parts, q_parts, eps, inv_width, inv_divisor, threshold, temperature,
            NORMALIZE, PARTS, Q_PARTS,
        )  # fmt: skip
        dz = a.T.to(tl.float32) * (c * coef_scale)[None, :]
        if row_term is not None:
            dz += d[:, None] * tl.load(row_term + rows, mask=rows < end, other=0.0)[None, :]
        sum_dz += dz  # added across the rows at the end: no barrier in the loop
        acc = multiply((dz * (r * scale)[None, :]).to(a.dtype), b, acc, MODE)
        if loss_out is not None and pid == 0:
            acc_loss += loss
            if goodness_out is not None:
                tl.store(goodness_out + rows, total, mask=rows < end)
    acc = acc * largest

    steps = 0.0
    first = rate
    second = rate
    if EPILOGUE != "store":
        rate, steps, first, second = step_factors(step, lr, rate, log_beta1, log_beta2, EPILOGUE)
    out = grad_weight
    if grad_weight is not None:
        out = grad_weight + split.to(tl.int64) * N * K
    write_gradient(acc, row, col, weight, slot0, slot1, out, N, K, rate, steps, first, second, h1, h2, h3, h4, EPILOGUE,
                   W_UNIT, BLOCK_M, BLOCK_N, PIECES)  # fmt: skip
    if tile_n == 0:
        acc_bias = tl.sum(sum_dz, 1)
        if EPILOGUE == "store":
            if grad_bias is not None:
                tl.store(grad_bias + split * N + row + n, acc_bias.to(grad_bias.dtype.element_ty), mask=in_n)
        elif bias is not None:
            own0 = bias_slot0
            own1 = bias_slot1
            if bias_slot0 is not None:
                own0 = bias_slot0 + row + n
            if bias_slot1 is not None:
                own1 = bias_slot1 + row + n
            optimize(acc_bias, bias + row + n, own0, own1, in_n, rate, steps, first, second, h1, h2, h3, h4, EPILOGUE,
                     True)  # fmt: skip
    if loss_out is not None and pid == 0:
        tl.store(loss_out + split, tl.sum(acc_loss, 0) * loss_scale)
