"""Peer normalisation inside a step (ffkernels/peer.py has the formulas), without a launch of its own.

The forward sums y's columns over the positive rows of each tile and puts the running mean aside; the update works with
the mean put aside, so one of its programs may write the new one while others still run.
"""

import triton
import triton.language as tl


@triton.jit
def sum_columns(
    y,  # (rows, BLOCK_N) as rounded
    positive,  # (rows,) whether a row is inside and positive
    sums,  # (tiles of M, N), written
    counts,  # (tiles of M,), written
    mean,  # (N,)
    before,  # (N,), written: mean
    tile_m,
    tile_n,
    col,
    N,
    BLOCK_N: tl.constexpr,
):
    """The forward's part."""
    n = col + tl.arange(0, BLOCK_N)
    total = tl.sum(tl.where(positive[:, None], y, 0.0), 0)
    tl.store(sums + tile_m.to(tl.int64) * N + n, total, mask=n < N)
    if tile_n == 0:
        tl.store(counts + tile_m, tl.sum(positive.to(tl.float32), 0))
    if tile_m == 0:
        tl.store(before + n, tl.load(mean + n, mask=n < N, other=0.0), mask=n < N)


@triton.jit
def column_term(
    before,  # (N,)
    strength,
    row,
    N,
    ROWS: tl.constexpr,
):
    """d = strength (m - mean(m)) of the columns of y from ``row`` on."""
    at = tl.arange(0, 512)
    total = tl.zeros((512,), tl.float32)
    for start in tl.range(0, N, 512, num_stages=1):
        total += tl.load(before + start + at, mask=start + at < N, other=0.0)
    n = row + tl.arange(0, ROWS)
    d = tl.load(before + n, mask=n < N, other=0.0) - tl.sum(total, 0) / N
    return tl.where(n < N, strength * d, 0.0)


@triton.jit
def write_mean(
    before,  # (N,)
    sums,  # (tiles, N)
    counts,  # (tiles,)
    mean,  # (N,), written
    tiles,
    row,
    N,
    ROWS: tl.constexpr,
):
    """m <- 0.9 m + 0.1 mean over the positive rows of y; m where there are none."""
    n = row + tl.arange(0, ROWS)
    old = tl.load(before + n, mask=n < N, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    count = 0.0
    for i in tl.range(0, tiles, num_stages=1):
        total += tl.load(sums + n, mask=n < N, other=0.0)
        count += tl.load(counts + i)
        sums += N
    new = tl.where(count > 0.0, 0.9 * old + 0.1 * (total / tl.maximum(count, 1.0)), old)
    tl.store(mean + n, new, mask=n < N)
