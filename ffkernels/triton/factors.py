"""What an update multiplies each row by: c of the loss, the row scale r; and what precedes both updates' main loops."""

import triton
import triton.language as tl

from .common import row_scale
from .peer import column_term


@triton.jit
def row_scales(
    norm,  # (M,): r itself ("given"), or squared norms; None without normalisation
    rows,
    inside,
    eps,
    inv_width,
    NORMALIZE: tl.constexpr,
):
    """r of each row; 0 beyond the last.

    A step's forward hands r over, so that no square root and no division is left in the update's main loop.
    """
    r = tl.where(inside, 1.0, 0.0)
    if NORMALIZE == "given":
        r = tl.load(norm + rows, mask=inside, other=0.0)
    elif NORMALIZE != "none":
        q = tl.load(norm + rows, mask=inside, other=0.0)
        r = scale_or_zero(q, row_scale(q, eps, inv_width, NORMALIZE))
    return r


@triton.jit
def scale_or_zero(q, r):
    """r, but 0 for a row of zeros: it adds nothing to dW, whatever its scale, which in fp16 would drown other rows."""
    return tl.where(q != 0.0, r, 0.0)


@triton.jit
def excess(goodness, sign, inv_divisor, threshold):
    """v = -s (G / E - theta): the loss is T softplus(v / T)."""
    return -sign * (goodness * inv_divisor - threshold)


@triton.jit
def logistic_slope(v, inv_temperature):
    """sigmoid(v / T)."""
    u = v * inv_temperature
    e = tl.exp(-tl.abs(u))
    return tl.where(u < 0.0, e, 1.0) * reciprocal(1.0 + e)


@triton.jit
def reciprocal(d):
    """1 / d for d in [1, 2], to 2 units in the last place, without a division: AMD's compiler divides exactly.

    The straight line nearest to 1 / d there (off by 1 / 17), then Newton's steps, each of which squares the error.
    """
    r = 1.4117647058823530 - 0.47058823529411764 * d
    for _ in tl.static_range(3):
        r += r * (1.0 - d * r)
    return r


@triton.jit
def logistic_loss(v, temperature):
    """T softplus(v / T)."""
    e = tl.exp(-tl.abs(v / temperature))
    w = 1.0 + e
    log1p = tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)) + tl.where(w == 1.0, e, 0.0)  # exact where 1 + e is not
    return tl.where(v < 0.0, 0.0, v) + temperature * log1p


@triton.jit
def larger_peak(peak, c, r):
    """The largest |c r| so far. Rows of infinite or undefined scale spoil their own product only."""
    size = tl.abs(c) * r
    return tl.maximum(peak, tl.where(size < 3e38, size, 0.0))


@triton.jit
def largest_of(peak):
    """What products are divided by: the largest |c r|, 1 where all are 0."""
    largest = tl.max(peak, 0)
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def column_terms(
    col_term,  # (N,), or None
    peer_mean,  # (N,), or None
    peer_before,
    peer_strength,
    row,
    N,
    ROWS: tl.constexpr,
):
    """d of the rank-1 term, for the columns of y from ``row`` on; 0 without one."""
    n = row + tl.arange(0, ROWS)
    d = tl.zeros((ROWS,), tl.float32)
    if col_term is not None:
        d = tl.load(col_term + n, mask=n < N, other=0.0)
    if peer_mean is not None:
        d = column_term(peer_before, peer_strength, row, N, ROWS)
    return d
