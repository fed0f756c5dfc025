"""Dropout kernel: a layer's dropped inputs and their squared norms, by the generator of ffkernels/dropout.py.

A launch of its own: inside the products every tile of columns would run the generator again, and so would the update.
"""

import triton
import triton.language as tl


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10: four words for each counter; all uint32."""
    for _ in tl.static_range(10):
        a0 = tl.umulhi(c0, 0xD2511F53)
        a1 = c0 * 0xD2511F53
        b0 = tl.umulhi(c2, 0xCD9E8D57)
        b1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b0 ^ c1 ^ k0, b1, a0 ^ c3 ^ k1, a1
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_kernel(
    y,  # (M, K)
    seed,  # (1,) int64
    x,  # (M, K), written
    sqnorm,  # (M,), written
    M,
    K,
    y_stride,
    x_stride,
    layer,
    below,  # a word below it drops its input
    scale,  # 1 / (1 - p)
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, group = tl.arange(0, COLS), tl.arange(0, COLS // 4)
    key = tl.load(seed)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    zero = tl.zeros((ROWS, COLS // 4), tl.uint32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, K, COLS, num_stages=1):
        c0 = zero + (start // 4 + group).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = philox(k0, k1, c0, zero + rows.to(tl.uint32)[:, None], zero + layer, zero)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLS))
        mask = (rows < M)[:, None] & (start + k < K)[None, :]
        wide = rows.to(tl.int64)[:, None]
        value = tl.load(y + wide * y_stride + (start + k)[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(words.to(tl.int64) >= below, value * scale, 0.0).to(x.dtype.element_ty)
        tl.store(x + wide * x_stride + (start + k)[None, :], value, mask=mask)
        squares += value.to(tl.float32) * value.to(tl.float32)
    tl.store(sqnorm + rows, tl.sum(squares, 1), mask=rows < M)
