"""What the kernels share: tiles of matrices, products in each precision, row scales, activations."""

import triton
import triton.language as tl


@triton.jit
def tile_place(
    pid,
    rows,  # of tiles
    cols,
    GROUP: tl.constexpr,
):
    """Row and column of the pid-th tile, where GROUP rows of tiles are run through column by column."""
    in_group = GROUP * cols
    first = pid // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """n, a multiple of UNIT, such that the compiler knows it: it forgets tl.multiple_of where a function is inlined."""
    return n // UNIT * UNIT


@triton.jit
def load_tile(
    source,  # pointer to (height, width), or its tensor descriptor
    row,
    col,
    height,
    width,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,  # divides stride and width, in elements; 0: by descriptor
):
    """Tile (ROWS, COLS) at (row, col), with 0 beyond the matrix."""
    if UNIT == 0:
        tile = source.load([row, col])
    else:
        r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
        stride, width = multiple(stride, UNIT), multiple(width, UNIT)
        place = source + tl.cast(row, tl.int64) * stride + col + r[:, None] * stride + c[None, :]
        tile = tl.load(place, mask=(row + r < height)[:, None] & (col + c < width)[None, :], other=0.0)
    return tile


@triton.jit
def fold(tile, ROWS: tl.constexpr, COLS: tl.constexpr, FOLD: tl.constexpr):
    """(ROWS, COLS / FOLD): FOLD neighbours of a row added up."""
    if FOLD > 1:
        tile = tl.sum(tl.reshape(tile, (ROWS, COLS // FOLD, FOLD)), 2)
    return tile


@triton.jit
def add_squares(squares, tile, ROWS: tl.constexpr, COLS: tl.constexpr, FOLD: tl.constexpr):
    """squares (ROWS, COLS / FOLD) + the tile's squares, FOLD neighbours of a row added up: those that a thread has from
    one load, so that the sums take few registers."""
    wide = tile.to(tl.float32)
    return squares + fold(wide * wide, ROWS, COLS, FOLD)


@triton.jit
def load_again(
    source, row, col, low, height, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """`load_tile` by pointers, straight to registers, with 0 in columns below ``low`` too.

    For a tile that a product reads as well: with wgmma it must not be loaded once for both uses. Triton 3.7 gives its
    buffer to the next copy when the other use is done, while the product may still be reading it (the PTX interpreter
    found it; tests/test_triton_kernels.py shows it). The cache modifier keeps the two loads from being made one again.
    """
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    if UNIT > 0:
        stride, width = multiple(stride, UNIT), multiple(width, UNIT)
    place = source + tl.cast(row, tl.int64) * stride + col + r[:, None] * stride + c[None, :]
    mask = (row + r < height)[:, None] & ((col + c < width) & (col + c >= low))[None, :]
    return tl.load(place, mask=mask, other=0.0, cache_modifier=".ca")


@triton.jit
def multiply(a, b, acc, MODE: tl.constexpr):
    """acc + a b in the way of tiles.operands: 16bit, tf32, medium or exact."""
    if MODE == "medium":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif MODE == "exact":
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32")
    return acc


@triton.jit
def settled(acc):
    """acc, once its product is done: nothing is computed, but Triton waits before it hands acc over.

    For wgmma, which Triton 3.7 otherwise lets run into the loop's next round. There an operand that was computed in
    registers is computed anew, in the same registers (in_flight.py finds it); and of a tile that was loaded for a
    product and for something else, the buffer is filled anew. tests/test_triton_kernels.py shows both.
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def as_bits(operand, MODE: tl.constexpr):
    """An operand as a loop may hand it to its next round: as integers, in the type that `multiply` multiplies.

    Handed over as it is, Triton would put it into shared memory, and would not let the product run beside anything.
    """
    if MODE == "medium":
        operand = operand.to(tl.bfloat16)
    return operand.to(tl.int16 if operand.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)


@triton.jit
def of_bits(bits, dtype: tl.constexpr, MODE: tl.constexpr):
    """The operand, for a product with one of type ``dtype``."""
    return bits.to(tl.bfloat16 if MODE == "medium" else dtype, bitcast=True)


@triton.jit
def sum_parts(
    parts,  # (count, size)
    count,
    size,
    at,  # offsets in [0, size)
    mask,
    COUNT: tl.constexpr,  # power of two >= count
):
    """Elements of the sum over the first dimension, always added in the same order."""
    if COUNT == 1:
        total = tl.load(parts + at, mask=mask, other=0.0)
    else:
        part = tl.arange(0, COUNT)
        place = parts + part[:, None].to(tl.int64) * size + at[None, :]
        total = tl.sum(tl.load(place, mask=(part < count)[:, None] & mask[None, :], other=0.0), 0)
    return total


@triton.jit
def row_scale(q, eps, inv_width, NORMALIZE: tl.constexpr):
    """r = 1 / (sqrt(q / D) + eps), D = 1 ("l2") or K ("rms")."""
    if NORMALIZE == "rms":
        q = q * inv_width
    return 1.0 / (tl.sqrt_rn(q) + eps)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) and act'(z). NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0.0, z, 0.01 * z)
        slope = tl.where(z > 0.0, 1.0, 0.01)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        y = z * cdf
        slope = cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        y = z * s
        slope = s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        y = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        slope = 1.0 - y * y
    return y, slope
