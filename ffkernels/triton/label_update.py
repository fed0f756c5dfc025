"""Update kernel for labelled inputs: positive and negative row of an input share the base product.

Outside the label columns both rows read the same x, so dW = (c+ r y+ + c- r y-)^T x: one product for two rows. Inside
them dW is a narrow product with the one-hot labels, which programs of their own compute, with x beside the labels up to
a column that wide accesses can begin at.
"""

import triton
import triton.language as tl

from .common import load_again, load_tile, multiply, settled, sum_parts, tile_place
from .factors import (
    column_terms,
    excess,
    larger_peak,
    largest_of,
    logistic_slope,
    row_scales,
)
from .label_forward import one_hot
from .optimizers import finish, step_numbers
from .peer import write_mean
from .update import write_gradient, write_losses


@triton.jit
def label_update_kernel(
    x,  # (B, K), or its descriptor
    x_again,  # (B, K)
    y,  # (2 B, N): the positive rows, then the negative ones; or its descriptor
    labels_pos,  # (B,) int64
    labels_neg,  # (B,) int64
    goodness,  # (parts, 2 B)
    scale,  # (B,): r, or None without normalisation
    row_term,  # (2 B,), or None
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
    goodness_out,  # (2 B,), written, or None
    loss_out,  # (splits,), written: sums of the rows' losses
    B,
    K,
    N,
    num_classes,
    x_stride,
    y_stride,
    parts,
    split_rows,  # inputs of a split
    strength,
    inv_divisor,
    threshold,
    temperature,
    inv_temperature,
    coef_scale,  # of c: 2 / (E M)
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
    BLOCK_K: tl.constexpr,  # inputs at a time
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    HALF: tl.constexpr,  # whether operands are fp16
    SETTLE: tl.constexpr,  # other than 0: each product is waited for (common.settled)
    LABELS: tl.constexpr,  # classes at a time
    LOSS_ROWS: tl.constexpr,  # rows at a time of the program that computes the loss
):
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles = tiles_m * tl.cdiv(K, BLOCK_N)
    narrow = pid - tiles  # from 0 on for the programs of the label columns
    tile_m, tile_n = tile_place(tl.minimum(pid, tiles - 1), tiles_m, tl.cdiv(K, BLOCK_N), GROUP)
    if narrow >= 0:
        tile_m = narrow % tiles_m
    row = tile_m * BLOCK_M
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, B)
    n, m = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    if pid == tl.num_programs(0) - 1:
        write_losses(None, goodness, goodness_out, loss_out + split, begin, end, 2 * B, parts, inv_divisor, threshold,
                     temperature, loss_scale, PARTS, LOSS_ROWS, 2)  # fmt: skip
        return

    RANK_1: tl.constexpr = row_term is not None or peer_mean is not None
    largest = 1.0
    if HALF:  # c r y in fp16 needs a scale: the largest |c r| becomes 1
        peak = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(begin, end, BLOCK_K):
            rows = start + m
            r = row_scales(scale, rows, rows < B, 0.0, 0.0, NORMALIZE)
            for half in tl.static_range(2):
                c = half_coefficients(half, goodness, rows, B, parts, inv_divisor, threshold, inv_temperature, PARTS)
                peak = larger_peak(peak, c * coef_scale, r)
                if RANK_1:
                    peak = larger_peak(peak, half_terms(half, row_term, peer_mean, peer_scale, rows, B), r)
        largest = 2.0 * largest_of(peak)  # two rows are added
    inv_largest = 1.0 / largest

    d = column_terms(col_term, peer_mean, peer_before, peer_strength, row, N, BLOCK_M)
    numbers = step_numbers(step, lr, rate, h1, h2, h3, h4, log_beta1, log_beta2, EPILOGUE)
    weight += split.to(tl.int64) * N * K
    if narrow < 0:
        col = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sum_dz = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(begin, end, BLOCK_K):
            b = load_tile(x, start, col, end, K, x_stride, BLOCK_K, BLOCK_N, X_UNIT)
            rows = start + m
            both = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for half in tl.static_range(2):
                c = half_coefficients(half, goodness, rows, B, parts, inv_divisor, threshold, inv_temperature, PARTS)
                tile = load_tile(y, half * B + start, row, half * B + end, N, y_stride, BLOCK_K, BLOCK_M, Y_UNIT)
                both += inside_of(tile, rows < end) * (c * coef_scale)[None, :]
                if RANK_1:
                    both += d[:, None] * half_terms(half, row_term, peer_mean, peer_scale, rows, B)[None, :]
            if bias is not None:
                sum_dz += both  # added across the rows at the end: no barrier in the loop
            r = row_scales(scale, rows, rows < B, 0.0, 0.0, NORMALIZE)
            acc = multiply((both * (r * inv_largest)[None, :]).to(b.dtype), b, acc, MODE)
            if SETTLE:
                acc = settled(acc)
        low = tl.cdiv(num_classes, LABELS) * LABELS
        write_gradient(acc, largest, row, col, low, K, weight, slot0, slot1, N, K, numbers, EPILOGUE, W_UNIT,
                       BLOCK_M, BLOCK_N, PIECES, write_gradient)  # fmt: skip
        if bias is not None and col == 0:
            finish(tl.sum(sum_dz, 1), bias, bias_slot0, bias_slot1, split * N + row, n, row + n < N, numbers, EPILOGUE,
                   True)  # fmt: skip
        if peer_mean is not None and (col == 0 and split == 0):
            write_mean(peer_before, peer_sums, peer_counts, peer_mean, peer_tiles, row, N, BLOCK_M)
    else:
        first = narrow // tiles_m * LABELS
        dw = tl.zeros((BLOCK_M, LABELS), tl.float32)
        for start in tl.range(begin, end, BLOCK_K, num_stages=1):
            rows = start + m
            r = row_scales(scale, rows, rows < B, 0.0, 0.0, NORMALIZE) * inv_largest
            beside = load_again(x_again, start, first, num_classes, end, K, x_stride, BLOCK_K, LABELS, X_UNIT)
            for half in tl.static_range(2):
                c = half_coefficients(half, goodness, rows, B, parts, inv_divisor, threshold, inv_temperature, PARTS)
                tile = load_tile(y, half * B + start, row, half * B + end, N, y_stride, BLOCK_K, BLOCK_M, Y_UNIT)
                dz = inside_of(tile, rows < end) * (c * coef_scale)[None, :]
                if RANK_1:
                    dz += d[:, None] * half_terms(half, row_term, peer_mean, peer_scale, rows, B)[None, :]
                if half == 0:
                    label = tl.load(labels_pos + rows, mask=rows < end, other=-1)
                else:
                    label = tl.load(labels_neg + rows, mask=rows < end, other=-1)
                hot = one_hot(label, first, strength, LABELS).to(tile.dtype) + beside
                dw = multiply((dz * r[None, :]).to(tile.dtype), hot, dw, MODE)
        write_gradient(dw, largest, row, first, 0, K, weight, slot0, slot1, N, K, numbers, EPILOGUE, W_UNIT, BLOCK_M,
                       LABELS, 1, write_gradient)  # fmt: skip


@triton.jit
def inside_of(
    tile,  # (rows, cols)
    inside,  # (rows,)
):
    """The tile transposed, in float32. Rows beyond the positive ones are negative ones, not 0: they are cleared."""
    return tl.where(inside[None, :], tile.T.to(tl.float32), 0.0)


@triton.jit
def half_coefficients(
    half,  # 0: positive rows, 1: negative rows
    goodness,  # (parts, 2 B)
    rows,
    B,
    parts,
    inv_divisor,
    threshold,
    inv_temperature,
    PARTS: tl.constexpr,
):
    """Of each row of one half: c without 2 / (E M), 0 beyond the last row."""
    inside = rows < B
    sign = 1.0 - 2.0 * half
    total = sum_parts(goodness, parts, 2 * B, half * B + rows, inside, PARTS)
    v = excess(total, sign, inv_divisor, threshold)
    return tl.where(inside, -sign * logistic_slope(v, inv_temperature), 0.0)


@triton.jit
def half_terms(half, row_term, peer_mean, peer_scale, rows, B):
    """a of the rank-1 term in one half of the rows."""
    inside = rows < B
    a = tl.zeros_like(rows).to(tl.float32)
    if row_term is not None:
        a = tl.load(row_term + half * B + rows, mask=inside, other=0.0)
    if peer_mean is not None and half == 0:
        a = tl.where(inside, peer_scale, 0.0)
    return a
