"""Forward kernel for labelled inputs: one base product for all labels of an input, and a narrow one for each label.

With x0 = x without its label columns, z = r (x0 W^T + strength W[:, label]^T) + b: rows that differ in their label
share everything but the second term, a product with the one-hot label over the first columns of W.
"""

import triton
import triton.language as tl

from .common import add_squares, load_again, load_tile, multiply, row_scale, settled, tile_place
from .factors import scale_or_zero
from .forward import write_rows
from .peer import sum_columns


@triton.jit
def one_hot(
    labels,  # (rows,) int64
    first,
    strength,
    COLS: tl.constexpr,
):
    """``strength`` at each label, over the columns from ``first`` on."""
    return tl.where(labels[:, None] == (first + tl.arange(0, COLS))[None, :], strength, 0.0)


@triton.jit
def label_forward_kernel(
    x,  # (B, K), or its descriptor
    x_again,  # (B, K)
    weight,  # (N, K), or its descriptor
    weight_again,  # (N, K)
    bias,  # (N,), or None
    labels,  # of input b and candidate c at b row_b + c row_c, where y's row is
    labels_neg,  # (B,): of candidate 1, and labels (B,) of candidate 0; or None
    y,  # (B C, N), written
    p,  # (B C, N), written, or None
    goodness,  # (tiles of N, B C), written: each tile's sums of y's squares
    scale_out,  # (B,), written, or None: r, for the update; 0 of rows of zeros
    step,  # (), 1 is added; or None
    peer_mean,  # (N,), or None; the rows of candidate 0 are the positive ones
    peer_before,  # (N,), written, or None
    peer_sums,  # (tiles of B, N), written, or None
    peer_counts,  # (tiles of B,), written, or None
    B,
    K,
    N,
    candidates,
    num_classes,
    row_b,
    row_c,
    x_stride,
    w_stride,
    y_stride,
    strength,
    eps,
    inv_width,
    NORMALIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MODE: tl.constexpr,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    LABELS: tl.constexpr,  # classes at a time
    SETTLE: tl.constexpr,  # whether each product is waited for (common.settled)
    AGAIN: tl.constexpr,  # whether the norms are computed from a load of their own (common.load_again)
):
    pid = tl.program_id(0)
    tile_m, tile_n = tile_place(pid, tl.cdiv(B, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    FOLD: tl.constexpr = 128 // x_again.dtype.element_ty.primitive_bitwidth if SETTLE or AGAIN else 1
    squares = tl.zeros((BLOCK_M, BLOCK_K // FOLD), tl.float32)
    labelled = tl.cdiv(num_classes, BLOCK_K) * BLOCK_K
    for k in tl.range(0, labelled, BLOCK_K, num_stages=1):  # where x has label columns, which count as 0
        a = load_again(x_again, row, k, num_classes, B, K, x_stride, BLOCK_M, BLOCK_K, X_UNIT)
        b = load_tile(weight, col, k, N, K, w_stride, BLOCK_N, BLOCK_K, W_UNIT)
        acc = multiply(a, b.T, acc, MODE)
        squares = add_squares(squares, a, BLOCK_M, BLOCK_K, FOLD)
    for k in range(labelled, K, BLOCK_K):
        a = load_tile(x, row, k, B, K, x_stride, BLOCK_M, BLOCK_K, X_UNIT)
        b = load_tile(weight, col, k, N, K, w_stride, BLOCK_N, BLOCK_K, W_UNIT)
        acc = multiply(a, b.T, acc, MODE)
        if SETTLE:
            acc = settled(acc)
        if NORMALIZE != "none":
            if AGAIN:
                a = load_again(x_again, row, k, 0, B, K, x_stride, BLOCK_M, BLOCK_K, X_UNIT)
            squares = add_squares(squares, a, BLOCK_M, BLOCK_K, FOLD)

    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m, in_n = row + m < B, col + n < N
    r = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORMALIZE != "none":
        q = tl.sum(squares, 1) + strength * strength
        r = row_scale(q, eps, inv_width, NORMALIZE)
        if scale_out is not None and tile_n == 0:
            tl.store(scale_out + row + m, scale_or_zero(q, r), mask=in_m)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + col + n, mask=in_n, other=0.0).to(tl.float32)
    for c in tl.range(0, candidates, num_stages=1):
        at = (row + m).to(tl.int64) * row_b + c * row_c
        if labels_neg is None:
            label = tl.load(labels + at, mask=in_m, other=-1)
        else:
            label = tl.load(labels + row + m, mask=in_m & (c == 0), other=-1)
            label = tl.maximum(label, tl.load(labels_neg + row + m, mask=in_m & (c != 0), other=-1))
        z = acc
        for first in tl.range(0, num_classes, LABELS, num_stages=1):
            a = one_hot(label, first, strength, LABELS).to(weight_again.dtype.element_ty)
            b = load_again(weight_again, col, first, 0, N, num_classes, w_stride, BLOCK_N, LABELS, 1)
            z = multiply(a, b.T, z, MODE)
        z = z * r[:, None] + offset[None, :]
        rounded = write_rows(z, y, p, goodness + tile_n.to(tl.int64) * B * candidates, at, in_m, col, N, y_stride,
                             ACTIVATION, Y_UNIT, BLOCK_N)  # fmt: skip
        if peer_mean is not None:
            if c == 0:
                sum_columns(
                    rounded, in_m, peer_sums, peer_counts, peer_mean, peer_before, tile_m, tile_n, col, N, BLOCK_N
                )
    if step is not None and pid == 0:
        steps = tl.load(step)
        tl.debug_barrier()  # every thread reads, one writes
        tl.store(step, steps + 1.0)
