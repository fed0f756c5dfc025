"""Small kernels over rows: the goodness from the sums of tiles, and squared norms where no forward gave them."""

import triton
import triton.language as tl

from .common import multiple, sum_parts


@triton.jit
def goodness_kernel(
    parts,  # (count, M)
    goodness,  # (M,), written
    count,
    M,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(goodness + rows, sum_parts(parts, count, M, rows, rows < M, PARTS), mask=rows < M)


@triton.jit
def sqnorm_kernel(
    x,  # (M, K)
    sqnorm,  # (M,), written
    M,
    K,
    x_stride,
    X_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    x_stride, K = multiple(x_stride, X_UNIT), multiple(K, X_UNIT)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, K, COLS):
        mask = (rows < M)[:, None] & (start + k < K)[None, :]
        place = rows.to(tl.int64)[:, None] * x_stride + (start + k)[None, :]
        tile = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        squares += tile * tile
    tl.store(sqnorm + rows, tl.sum(squares, 1), mask=rows < M)
