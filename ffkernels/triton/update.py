"""Update kernel: dW = (c r y)^T x with the loss in its prologue and the optimizer in its epilogue, one launch.

dW never reaches memory, but for ff_grad, which asks for it, and for the parts of a split sum (reduce.py).
"""

import triton
import triton.language as tl

from .common import as_bits, fold, load_tile, multiple, multiply, of_bits, settled, sum_parts, tile_place
from .factors import (
    column_terms,
    excess,
    larger_peak,
    largest_of,
    logistic_loss,
    logistic_slope,
    row_scales,
)
from .optimizers import finish, step_numbers
from .peer import write_mean


@triton.jit
def row_coefficients(
    coef,  # (M,), or None: the logistic loss
    sign,  # (M,), or None: the first half of the rows is positive
    goodness,  # (parts, M)
    rows,
    end,
    M,
    parts,
    inv_divisor,
    threshold,
    inv_temperature,
    PARTS: tl.constexpr,
):
    """Of each row: c (without the 2 / (E M) of the logistic loss), s > 0, G, v. c is 0 from row ``end`` on."""
    inside = rows < end
    if coef is not None:
        c = tl.load(coef + rows, mask=inside, other=0.0)
        positive = inside
        total = c
        v = c
    else:
        total = sum_parts(goodness, parts, M, rows, inside, PARTS)
        s = tl.where(rows < M // 2, 1.0, -1.0)
        if sign is not None:
            s = tl.load(sign + rows, mask=inside, other=0.0)
        v = excess(total, s, inv_divisor, threshold)
        positive = inside & (s > 0.0)
        c = tl.where(inside, -s * logistic_slope(v, inv_temperature), 0.0)
    return c, positive, total, v


@triton.jit
def write_losses(
    sign,  # (M,), or None
    goodness,  # (parts, M)
    goodness_out,  # (M,), written, or None
    loss_out,  # (), written: the sum of the losses of rows [begin, end); of two HALVES, of those rows in each half
    begin,
    end,
    M,
    parts,
    inv_divisor,
    threshold,
    temperature,
    loss_scale,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """What a program of its own does: the loss, which no weight needs."""
    losses = tl.zeros((ROWS,), tl.float32)
    for half in tl.static_range(HALVES):
        last = end + half * (M // 2)
        for start in range(begin + half * (M // 2), last, ROWS):
            rows = start + tl.arange(0, ROWS)
            _, _, total, v = row_coefficients(
                None, sign, goodness, rows, last, M, parts, inv_divisor, threshold, 1.0, PARTS
            )
            losses += tl.where(rows < last, logistic_loss(v, temperature), 0.0)
            if goodness_out is not None:
                tl.store(goodness_out + rows, total, mask=rows < last)
    tl.store(loss_out, tl.sum(losses, 0) * loss_scale)


@triton.jit
def scaled_rows(
    y,  # (M, N), or its descriptor
    coef,
    sign,
    goodness,
    norm,
    row_term,
    d,  # (ROWS,): of the rank-1 term
    sum_dz,  # (ROWS, STEP / FOLD): sums of dz so far; across rows they are added up at the end, without barriers
    start,
    end,
    row,  # first column of y
    M,
    N,
    y_stride,
    parts,
    eps,
    inv_width,
    inv_divisor,
    threshold,
    inv_temperature,
    coef_scale,
    peer_scale,
    scale,  # of the result
    NORMALIZE: tl.constexpr,
    PARTS: tl.constexpr,
    Y_UNIT: tl.constexpr,
    PEER: tl.constexpr,
    BIAS: tl.constexpr,
    FOLD: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The product's left operand (ROWS, STEP): dz^T r of STEP rows from ``start`` on, 0 from ``end`` on; and sum_dz."""
    tile = load_tile(y, start, row, end, N, y_stride, STEP, ROWS, Y_UNIT)
    rows = start + tl.arange(0, STEP)
    inside = rows < end
    c, positive, _, _ = row_coefficients(
        coef, sign, goodness, rows, end, M, parts, inv_divisor, threshold, inv_temperature, PARTS
    )
    c = c * coef_scale
    r = row_scales(norm, rows, inside, eps, inv_width, NORMALIZE) * scale
    left = tile.T.to(tl.float32)
    if row_term is not None or PEER:
        left = left * c[None, :]
        if row_term is not None:
            left += d[:, None] * tl.load(row_term + rows, mask=inside, other=0.0)[None, :]
        if PEER:
            left += d[:, None] * tl.where(positive, peer_scale, 0.0)[None, :]
        if BIAS:
            sum_dz += fold(left, ROWS, STEP, FOLD)
        left = left * r[None, :]
    else:
        if BIAS:
            sum_dz += fold(left * c[None, :], ROWS, STEP, FOLD)
        left = left * (c * r)[None, :]
    return left.to(tile.dtype), sum_dz


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def write_gradient(
    grad,  # (ROWS, COLS), but for ``scale``
    scale,  # of the gradient
    row,
    col,
    low,  # columns in [low, high) are written
    high,
    param,  # (N, K): weight, or the gradient
    slot0,
    slot1,
    N,
    K,
    numbers,
    EPILOGUE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIECES: tl.constexpr,  # parts of the columns that are in registers one after the other
    AGAIN: tl.constexpr,  # write_gradient: Triton 3.4 does not compile a function that names itself
):
    """The epilogue of a tile of the gradient."""
    if PIECES > 1:
        left, right = halves(grad, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        AGAIN(left, scale, row, col, low, high, param, slot0, slot1, N, K, numbers, EPILOGUE, UNIT, ROWS, half,
              PIECES // 2, AGAIN)  # fmt: skip
        col += half
        AGAIN(right, scale, row, col, low, high, param, slot0, slot1, N, K, numbers, EPILOGUE, UNIT, ROWS, half,
              PIECES // 2, AGAIN)  # fmt: skip
    else:
        K, high = multiple(K, UNIT), multiple(high, UNIT)
        n, k = tl.arange(0, ROWS), tl.arange(0, COLS)
        mask = (row + n < N)[:, None] & ((col + k < high) & (col + k >= low))[None, :]
        finish(grad * scale, param, slot0, slot1, row.to(tl.int64) * K + col, n[:, None] * K + k[None, :], mask,
               numbers, EPILOGUE, False)  # fmt: skip


@triton.jit
def update_kernel(
    x,  # (M, K), or its descriptor
    y,  # (M, N), or its descriptor
    coef,  # (M,), or None: from the logistic loss
    sign,  # (M,); None: the first half of the rows is positive, or coef is given
    goodness,  # (parts, M), or None
    norm,  # (M,): r (NORMALIZE "given"), or squared norms; None without normalisation
    row_term,  # (M,), or None
    col_term,  # (N,), or None
    peer_mean,  # (N,), in place, or None: peer normalisation instead of the last two; see peer.py
    peer_before,  # (N,), or None
    peer_sums,  # (peer_tiles, N), or None
    peer_counts,  # (peer_tiles,), or None
    weight,  # (N, K), in place; or the gradient (splits, N, K), written
    bias,  # (N,), in place; or the gradient (splits, N), written; or None
    slot0,  # (N, K), in place
    slot1,  # (N, K), in place
    bias_slot0,  # (N,), in place
    bias_slot1,  # (N,), in place
    step,  # (): steps with this one
    lr,  # (), or None: rate
    goodness_out,  # (M,), written, or None
    loss_out,  # (splits,), written, or None: sums of the rows' losses
    M,
    K,
    N,
    x_stride,
    y_stride,
    parts,
    split_rows,  # rows of a split
    eps,
    inv_width,
    inv_divisor,
    threshold,
    temperature,
    inv_temperature,
    coef_scale,  # of c: 2, or 2 / (E M)
    loss_scale,  # of the sum of losses
    peer_strength,
    peer_scale,  # a of positive rows: 2 / (E M)
    peer_tiles,
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
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of weight
    BLOCK_N: tl.constexpr,  # columns of weight
    BLOCK_K: tl.constexpr,  # rows of x and y at a time
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    HALF: tl.constexpr,  # whether operands are fp16
    LOSS_ROWS: tl.constexpr,  # rows at a time of the program that computes the loss
    SETTLE: tl.constexpr,  # stages of the main loop where each product is waited for (common.settled); 0: it is not
):
    pid, split = tl.program_id(0), tl.program_id(1)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, M)
    if loss_out is not None:
        if pid == tl.num_programs(0) - 1:
            write_losses(sign, goodness, goodness_out, loss_out + split, begin, end, M, parts, inv_divisor, threshold,
                         temperature, loss_scale, PARTS, LOSS_ROWS, 1)  # fmt: skip
            return
    tile_m, tile_n = tile_place(pid, tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    m = tl.arange(0, BLOCK_K)

    largest = 1.0
    if HALF:  # c r y in fp16 needs a scale: the largest |c r| becomes 1
        peak = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(begin, end, BLOCK_K):
            rows = start + m
            c, positive, _, _ = row_coefficients(
                coef, sign, goodness, rows, end, M, parts, inv_divisor, threshold, inv_temperature, PARTS
            )
            r = row_scales(norm, rows, rows < M, eps, inv_width, NORMALIZE)
            peak = larger_peak(peak, c * coef_scale, r)
            if row_term is not None:
                peak = larger_peak(peak, tl.load(row_term + rows, mask=rows < end, other=0.0), r)
            if peer_mean is not None:
                peak = larger_peak(peak, tl.where(positive, peer_scale, 0.0), r)
        largest = largest_of(peak)
    scale = 1.0 / largest

    PEER: tl.constexpr = peer_mean is not None
    BIAS: tl.constexpr = bias is not None
    FOLD: tl.constexpr = 2 if SETTLE else 1  # the operand that is made ahead leaves few registers
    d = column_terms(col_term, peer_mean, peer_before, peer_strength, row, N, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_K // FOLD), tl.float32)
    if SETTLE:
        ahead, sum_dz = scaled_rows(
            y, coef, sign, goodness, norm, row_term, d, sum_dz, begin, end, row, M, N, y_stride, parts, eps,
            inv_width, inv_divisor, threshold, inv_temperature, coef_scale, peer_scale, scale, NORMALIZE, PARTS,
            Y_UNIT, PEER, BIAS, FOLD, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        ahead = as_bits(ahead, MODE)
        for start in tl.range(begin, end, BLOCK_K, num_stages=SETTLE):
            b = load_tile(x, start, col, end, K, x_stride, BLOCK_K, BLOCK_N, X_UNIT)
            acc = multiply(of_bits(ahead, b.dtype, MODE), b, acc, MODE)
            # while the product runs; beyond the last rows, nothing is loaded
            following = tl.where(start + BLOCK_K < end, start + BLOCK_K, M)
            ahead, sum_dz = scaled_rows(
                y, coef, sign, goodness, norm, row_term, d, sum_dz, following, end, row, M, N, y_stride, parts,
                eps, inv_width, inv_divisor, threshold, inv_temperature, coef_scale, peer_scale, scale, NORMALIZE,
                PARTS, Y_UNIT, PEER, BIAS, FOLD, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            ahead = as_bits(ahead, MODE)
            if start < end:  # always; what stands under an `if` is put behind the loop's loads
                acc = settled(acc)
    else:
        for start in range(begin, end, BLOCK_K):
            b = load_tile(x, start, col, end, K, x_stride, BLOCK_K, BLOCK_N, X_UNIT)
            left, sum_dz = scaled_rows(
                y, coef, sign, goodness, norm, row_term, d, sum_dz, start, end, row, M, N, y_stride, parts, eps,
                inv_width, inv_divisor, threshold, inv_temperature, coef_scale, peer_scale, scale, NORMALIZE, PARTS,
                Y_UNIT, PEER, BIAS, FOLD, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            acc = multiply(left, b, acc, MODE)

    numbers = step_numbers(step, lr, rate, h1, h2, h3, h4, log_beta1, log_beta2, EPILOGUE)
    weight += split.to(tl.int64) * N * K
    write_gradient(acc, largest, row, col, 0, K, weight, slot0, slot1, N, K, numbers, EPILOGUE, W_UNIT, BLOCK_M,
                   BLOCK_N, PIECES, write_gradient)  # fmt: skip
    if bias is not None and col == 0:
        n = tl.arange(0, BLOCK_M)
        finish(tl.sum(sum_dz, 1), bias, bias_slot0, bias_slot1, split * N + row, n, row + n < N, numbers, EPILOGUE,
               True)  # fmt: skip
    if peer_mean is not None and (col == 0 and split == 0):
        write_mean(peer_before, peer_sums, peer_counts, peer_mean, peer_tiles, row, N, BLOCK_M)
