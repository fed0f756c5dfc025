"""Forward kernel: y = act(r x W^T + b) and the sums of y's squares, one launch."""

import triton
import triton.language as tl

from .common import (
    activate,
    add_squares,
    load_again,
    load_tile,
    multiple,
    multiply,
    row_scale,
    settled,
    sum_parts,
    tile_place,
)
from .factors import scale_or_zero
from .peer import sum_columns


@triton.jit
def write_rows(
    z,  # (rows, BLOCK_N), with the bias
    y,
    p,
    goodness,  # (M,) of this tile of columns
    at,  # rows of y
    inside,
    col,
    N,
    y_stride,
    ACTIVATION: tl.constexpr,
    Y_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue: y, p, and the sum of y's squares before they are rounded. Gives y as it was rounded."""
    n = col + tl.arange(0, BLOCK_N)
    in_n = n < N
    result, slope = activate(z, ACTIVATION)
    y_stride, N = multiple(y_stride, Y_UNIT), multiple(N, Y_UNIT)
    place = at.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)
    if p is not None:
        tl.store(p + place, (result * slope).to(p.dtype.element_ty), mask=mask)
    tl.store(goodness + at, tl.sum(tl.where(in_n[None, :], result * result, 0.0), 1), mask=inside)
    return result.to(y.dtype.element_ty).to(tl.float32)


@triton.jit
def forward_kernel(
    x,  # (M, K), or its descriptor
    x_again,  # (M, K): where the row norms are computed from a load of their own; or None
    weight,  # (N, K), or its descriptor
    bias,  # (N,), or None
    sqnorm,  # (parts, M): added up, the rows' squared norms; None computes them
    y,  # (M, N), written
    p,  # (M, N), written, or None
    goodness,  # (tiles of N, M), written: each tile's sums of y's squares
    scale_out,  # (M,), written, or None: r, for the update; 0 of rows of zeros
    step,  # (), 1 is added; or None
    sign,  # (M,), for peer_mean; or None: the first half of the rows is positive
    peer_mean,  # (N,), or None
    peer_before,  # (N,), written, or None
    peer_sums,  # (tiles of M, N), written, or None
    peer_counts,  # (tiles of M,), written, or None
    M,
    K,
    N,
    x_stride,
    w_stride,
    y_stride,
    parts,
    eps,
    inv_width,
    NORMALIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MODE: tl.constexpr,
    PARTS: tl.constexpr,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SETTLE: tl.constexpr,  # whether each product is waited for (common.settled)
):
    pid = tl.program_id(0)
    tile_m, tile_n = tile_place(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    OWN_NORM: tl.constexpr = sqnorm is None and NORMALIZE != "none"

    m = tl.arange(0, BLOCK_M)
    in_m = row + m < M
    if sqnorm is not None:
        q = sum_parts(sqnorm, parts, M, row + m, in_m, PARTS)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    FOLD: tl.constexpr = 128 // y.dtype.element_ty.primitive_bitwidth if SETTLE or x_again is not None else 1
    squares = tl.zeros((BLOCK_M, BLOCK_K // FOLD), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = load_tile(x, row, k, M, K, x_stride, BLOCK_M, BLOCK_K, X_UNIT)
        b = load_tile(weight, col, k, N, K, w_stride, BLOCK_N, BLOCK_K, W_UNIT)
        acc = multiply(a, b.T, acc, MODE)
        if SETTLE:
            acc = settled(acc)
        if OWN_NORM:
            if x_again is not None:
                a = load_again(x_again, row, k, 0, M, K, x_stride, BLOCK_M, BLOCK_K, X_UNIT)
            squares = add_squares(squares, a, BLOCK_M, BLOCK_K, FOLD)

    n = tl.arange(0, BLOCK_N)
    in_n = col + n < N
    if NORMALIZE != "none":
        if OWN_NORM:
            q = tl.sum(squares, 1)
        r = row_scale(q, eps, inv_width, NORMALIZE)
        if scale_out is not None and tile_n == 0:
            tl.store(scale_out + row + m, scale_or_zero(q, r), mask=in_m)
        acc = acc * r[:, None]
    if bias is not None:
        acc += tl.load(bias + col + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    rounded = write_rows(acc, y, p, goodness + tile_n.to(tl.int64) * M, row + m, in_m, col, N, y_stride, ACTIVATION,
                         Y_UNIT, BLOCK_N)  # fmt: skip
    if peer_mean is not None:
        positive = in_m & (row + m < M // 2)
        if sign is not None:
            positive = tl.load(sign + row + m, mask=in_m, other=-1.0) > 0.0
        sum_columns(rounded, positive, peer_sums, peer_counts, peer_mean, peer_before, tile_m, tile_n, col, N, BLOCK_N)
    if step is not None and pid == 0:
        steps = tl.load(step)
        tl.debug_barrier()  # every thread reads, one writes
        tl.store(step, steps + 1.0)
