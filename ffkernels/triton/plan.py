"""What every op launches: kernels, grids, tiles, and the work that each launch does. Plain arithmetic on shapes.

The launcher (launch.py) runs exactly these launches; the cost model and the ahead-of-time report read them. Nothing
here imports triton.

Bytes are counted as the kernels ask for them: ``bytes_read`` and ``bytes_written`` count each byte once however many
blocks touch it, ``bytes_requested`` counts every block's loads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .tiles import (
    DEVICES,
    Device,
    Tile,
    blocks_per_sm,
    ceil_div,
    choose,
    choose_split,
    group_rows,
    operands,
)

REDUCE_BLOCK = 1024  # elements of the weight that a program of the reduce kernel takes
DROPOUT_ROWS = 4  # rows that a program of the dropout kernel takes
NORM_ROWS = 16  # rows that a program of the sqnorm kernel takes
ROWS_BLOCK = 256  # rows that a program of the goodness kernel takes
PAD = 16  # row strides of matrices that the package owns are multiples of it, in elements

_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Layer:
    """One layer of an op, by its sizes and options."""

    rows: int  # M, of y
    depth: int  # K
    cols: int  # N
    dtype: str = "bfloat16"  # of x, y, weight and bias: "bfloat16", "float16" or "float32"
    precision: str = "highest"  # of float32 products
    bias: bool = True
    normalize: str = "l2"
    activation: str = "relu"
    optimizer: str = "adam"  # Optimizer.kind
    slots: int = 2  # tensors like the weight in the optimizer's state
    sqnorm_parts: int = 0  # vectors that add up to the squared norms of x's rows; 0: the forward computes them
    peer: bool = False  # whether a rank-1 term is added to dz
    dropout: bool = False  # of the layer's input, in a network
    candidates: int = 0  # rows of y that share a row of x, which differ in their label; 0: no labels
    num_classes: int = 0
    x_unit: int = 0  # see `unit`
    w_unit: int = 0
    y_unit: int = 0

    @property
    def inputs(self) -> int:
        """Rows of x, and of the products."""
        return self.rows // self.candidates if self.candidates else self.rows

    @property
    def item(self) -> int:
        return _ITEM[self.dtype]

    @property
    def kind(self) -> str:
        return operands(self.dtype, self.precision)

    @property
    def label_block(self) -> int:
        """Columns of the one-hot labels that are multiplied at a time."""
        return min(64, max(16, next_power(self.num_classes)))

    def parameters(self) -> int:
        """Bytes of weight, bias and the optimizer's state."""
        count = self.depth * self.cols + self.bias * self.cols
        return count * (self.item + 4 * self.slots)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, and the work that all its blocks do together."""

    kernel: str  # name of the @triton.jit function
    grid: tuple[int, ...]
    warps: int
    stages: int
    constants: dict[str, int | str | bool] = field(default_factory=dict)  # tl.constexpr arguments that the plan decides
    tile: Tile | None = None
    flops: int = 0  # of matrix products, padding of tiles included
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_requested: int = 0
    rate: str = "bf16"  # of the products: "bf16", "fp16", "tf32" or "fp32"
    resident: int = 1  # blocks that share a multiprocessor, predicted
    splits: int = 1
    split_rows: int = 0  # of x and y, a split
    light: int = 0  # blocks of each split that multiply nothing: the one that computes the loss
    stage: int = 0  # launches of one stage do not depend on one another and may run side by side

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def multiplying(self) -> tuple[int, ...]:
        """The grid without the blocks whose work is too little to make a wave of tiles."""
        return (self.grid[0] - self.light, *self.grid[1:])

    def tiles_of(self, cols: int) -> int:
        """Tiles over the columns of the result."""
        assert self.tile is not None
        return ceil_div(cols, self.tile.n)


def next_power(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def padded(width: int) -> int:
    """Row stride of a matrix that the package owns: its rows then start on 16 bytes in every dtype."""
    return ceil_div(width, PAD) * PAD


def unit(stride: int, width: int, item: int, address: int, device: Device, kind: str) -> int:
    """How a kernel may load tiles of a matrix: 0 by tensor descriptor (TMA), else what divides stride and width.

    Descriptors ask for rows that start on 16 bytes. Elsewhere the unit says how wide loads can be: 500 bf16 a row (1000
    bytes) gives 4, loads of 8 bytes. Operands of exact products pass through registers, where descriptors gain nothing.
    """
    if device.tma and kind != "exact" and stride * item % 16 == 0 and address % 16 == 0:
        return 0
    return math.gcd(stride, width, 16)


def _rate(layer: Layer) -> str:
    if layer.dtype == "float16":
        return "fp16"
    return {"16bit": "bf16", "medium": "bf16", "tf32": "tf32", "exact": "fp32"}[layer.kind]


def _tile_constants(tile: Tile) -> dict[str, int | str | bool]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def settles(layer: Layer, device: Device, tile: Tile) -> bool:
    """Whether a product must be waited for before its operands are made anew: a wgmma, see common.settled."""
    return device.number == 90 and layer.kind != "exact" and tile.m >= 64


def _narrow(*units: int) -> bool:
    """Whether rows of an operand allow no loads of four elements."""
    return any(0 < unit < 4 for unit in units)


def loads_again(layer: Layer, device: Device) -> bool:
    """Whether the forward computes its rows' norms from a second load of x: see common.load_again."""
    return device.number >= 100 and device.wgmma and layer.kind != "exact"


def forward(layer: Layer, device: Device, for_step: bool = False) -> Launch:
    """forward_kernel, or label_forward_kernel where several rows of y share one of x.

    ``for_step``: an update follows, which takes the rows' scales from it, and y times the activation's slope (p).
    """
    wants_p = for_step and layer.activation != "relu"
    m, k, n, e = layer.inputs, layer.depth, layer.cols, layer.item
    narrow = _narrow(layer.x_unit, layer.w_unit)
    tile = choose(device, m, n, k, layer.kind, e, layer.candidates > 0, narrow)
    tiles_m, tiles_n = ceil_div(m, tile.m), ceil_div(n, tile.n)
    constants = {
        **_tile_constants(tile),
        "GROUP": group_rows(tile, device, m, n, e),
        "MODE": layer.kind,
        "NORMALIZE": layer.normalize,
        "ACTIVATION": layer.activation,
        "X_UNIT": layer.x_unit,
        "W_UNIT": layer.w_unit,
    }
    own_norm = layer.normalize != "none" and not layer.sqnorm_parts
    read = e * (m * k + n * k + layer.bias * n) + 4 * m * layer.sqnorm_parts
    constants["SETTLE"] = own_norm and settles(layer, device, tile)
    requested = (
        e * (m * k * tiles_n + n * k * tiles_m + layer.bias * n * tiles_m) + 4 * m * layer.sqnorm_parts * tiles_n
    )
    if own_norm and loads_again(layer, device):
        requested += e * m * k * tiles_n
    flops = 2 * tiles_m * tile.m * tiles_n * tile.n * ceil_div(k, tile.k) * tile.k
    written = e * layer.rows * n * (1 + wants_p) + 4 * layer.rows * tiles_n
    if layer.candidates:
        constants |= {"LABELS": layer.label_block}
        label_steps = ceil_div(layer.num_classes, layer.label_block)
        flops += 2 * tiles_m * tile.m * tiles_n * tile.n * label_steps * layer.label_block * layer.candidates
        read += 8 * layer.rows
        requested += 8 * layer.rows * tiles_n + e * n * layer.num_classes * tiles_m * layer.candidates
    else:
        constants["PARTS"] = next_power(layer.sqnorm_parts)
    if for_step and layer.normalize != "none":
        written += 4 * m  # the row scales
    return Launch(
        "label_forward_kernel" if layer.candidates else "forward_kernel",
        (tiles_m * tiles_n,), tile.warps, tile.stages, constants, tile, flops, read, written, requested, _rate(layer),
        blocks_per_sm(tile, device, e),
    )  # fmt: skip


def goodness(layer: Layer, parts: int) -> Launch:
    """goodness_kernel: adds the forward's sums of several tiles of columns."""
    return Launch(
        "goodness_kernel", (ceil_div(layer.rows, ROWS_BLOCK),), 4, 1, {"PARTS": next_power(parts), "BLOCK": ROWS_BLOCK},
        bytes_read=4 * layer.rows * parts, bytes_written=4 * layer.rows, bytes_requested=4 * layer.rows * parts,
        resident=8,
    )  # fmt: skip


def pieces(tile: Tile, device: Device) -> int:
    """Parts of a tile that the optimizer takes one after the other, so that weight and state need few registers."""
    accumulators = tile.m * tile.n // (tile.warps * device.warp_size)  # a thread
    return max(1, accumulators // (16 if accumulators <= 64 else 8))


def _update_stages(layer: Layer, tile: Tile, device: Device, parts: int) -> int:
    """The tile's stages, or as many as shared memory holds of everything that is copied ahead.

    Beside x that is y, of two rows where they are labelled, and the parts of the goodness, of which a forward on narrow
    tiles leaves many.
    """
    halves = 2 if layer.candidates else 1
    stage = tile.k * (layer.item * (halves * tile.m + tile.n) + 4 * halves * next_power(parts))
    return max(2, min(tile.stages, device.shared // stage))


def update(
    layer: Layer,
    device: Device,
    parts: int,  # vectors that add up to the goodness; 0: the coefficients are given
    store: bool = False,
    config: tuple[Tile, int] | None = None,
) -> tuple[Launch, ...]:
    """update_kernel (label_update_kernel), and reduce_kernel where its sum is split; ``store``: ff_grad."""
    m, k, n, e = layer.inputs, layer.depth, layer.cols, layer.item
    narrow = _narrow(layer.x_unit, layer.y_unit)
    tile, splits = config or choose_split(device, n, k, m, layer.kind, e, layer.candidates > 0, narrow)
    split_rows = ceil_div(ceil_div(max(m, 1), splits), tile.k) * tile.k
    splits = max(1, ceil_div(m, split_rows))
    tiles_m, tiles_n = ceil_div(n, tile.m), ceil_div(k, tile.n)
    stored = store or splits > 1
    normalized = layer.normalize != "none"
    constants = {
        **_tile_constants(tile),
        "GROUP": group_rows(tile, device, n, k, e),
        "MODE": layer.kind,
        "NORMALIZE": "given" if normalized and parts else layer.normalize,  # a step's forward leaves the row scales
        "EPILOGUE": "store" if stored else layer.optimizer,
        "PARTS": next_power(parts),
        "X_UNIT": layer.x_unit,
        "Y_UNIT": layer.y_unit,
        "W_UNIT": math.gcd(k, 16),
        "PIECES": 1 if stored else pieces(tile, device),
        "HALF": layer.dtype == "float16",
        "SETTLE": _update_stages(layer, tile, device, parts) if settles(layer, device, tile) else 0,
        "LOSS_ROWS": min(1024, max(1, 8192 // next_power(parts))),
    }
    factors = 4 * layer.rows * (max(1, parts) + bool(parts) + layer.peer) + 4 * m * normalized
    blocks = tiles_m * tiles_n
    read = e * (m * k + layer.rows * n) + factors + 4 * n * layer.peer
    requested = e * (m * k * tiles_m + layer.rows * n * tiles_n) + factors * blocks + 4 * n * tiles_n * layer.peer
    if layer.dtype == "float16":
        requested += factors * blocks
    flops = 2 * tiles_m * tile.m * tiles_n * tile.n * splits * split_rows
    if layer.candidates:
        labels = ceil_div(layer.num_classes, layer.label_block)
        constants["LABELS"] = layer.label_block
        blocks += tiles_m * labels
        flops += 2 * layer.candidates * tiles_m * tile.m * labels * layer.label_block * splits * split_rows
        read += 8 * layer.rows
        beside = min(k, labels * layer.label_block) - layer.num_classes
        requested += labels * (e * layer.rows * n + 8 * layer.rows * tiles_m + factors * tiles_m)
        requested += e * m * beside * tiles_m
    written = 0
    if parts:  # a program of its own computes the loss
        blocks += 1
        requested += factors
        written = 4 * layer.rows + 4 * splits
    gradient = n * k + layer.bias * n
    if stored:
        written += gradient * (4 * splits if splits > 1 else e)
    else:
        read, requested, written = (
            read + layer.parameters() + 4,
            requested + layer.parameters(),
            written + layer.parameters(),
        )
    name = "label_update_kernel" if layer.candidates else "update_kernel"
    first = Launch(
        name, (blocks, splits), tile.warps, _update_stages(layer, tile, device, parts), constants, tile, flops, read,
        written, requested, _rate(layer), blocks_per_sm(tile, device, e), splits, split_rows,
        int(parts > 0),
    )  # fmt: skip
    return (first,) if splits == 1 else (first, reduce(layer, splits, "store" if store else layer.optimizer, parts > 0))


def reduce(layer: Layer, splits: int, epilogue: str, loss: bool = False) -> Launch:
    """reduce_kernel: adds the parts of a gradient; of one part it is the optimizer's step alone."""
    n, k = layer.cols, layer.depth
    gradient = 4 * splits * (n * k + layer.bias * n) + 4 * splits * loss
    kept = (n * k + layer.bias * n) * layer.item if epilogue == "store" else layer.parameters()
    read = gradient + (0 if epilogue == "store" else kept + 4)
    return Launch(
        "reduce_kernel", (ceil_div(n * k, REDUCE_BLOCK) + layer.bias * ceil_div(n, REDUCE_BLOCK),), 4, 1,
        {"BLOCK": REDUCE_BLOCK, "EPILOGUE": epilogue}, bytes_read=read, bytes_written=kept + 4 * loss,
        bytes_requested=read, resident=8, splits=splits,
    )  # fmt: skip


def sqnorm(layer: Layer) -> Launch:
    """sqnorm_kernel: what an update needs that no forward went before."""
    read = layer.rows * layer.depth * layer.item
    return Launch(
        "sqnorm_kernel", (ceil_div(layer.rows, NORM_ROWS),), 4, 1, {"ROWS": NORM_ROWS, "COLS": 256}, bytes_read=read,
        bytes_written=4 * layer.rows, bytes_requested=read, resident=8,
    )  # fmt: skip


def dropout(rows: int, depth: int, item: int) -> Launch:
    """dropout_kernel: a layer's dropped inputs and their squared norms."""
    size = rows * depth * item
    return Launch(
        "dropout_kernel", (ceil_div(rows, DROPOUT_ROWS),), 4, 1, {"ROWS": DROPOUT_ROWS, "COLS": 256}, bytes_read=size,
        bytes_written=size + 4 * rows, bytes_requested=size, resident=8,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _numbered(stages: Sequence[Sequence[Launch]]) -> tuple[Launch, ...]:
    return tuple(replace(launch, stage=i) for i, stage in enumerate(stages) for launch in stage)


def step(layer: Layer, device: Device) -> tuple[Launch, ...]:
    """ff_step_ or ff_label_step_: forward, update, and the reduction of a split update."""
    first = forward(layer, device, for_step=True)
    parts = first.tiles_of(layer.cols)
    return _numbered([[first], *([launch] for launch in update(layer, device, parts))])


def network(layers: Sequence[Layer], device: Device) -> tuple[Launch, ...]:
    """ff_network_step_: layer l's update and layer l + 1's forward are one stage."""
    stages: list[list[Launch]] = []
    pending: tuple[Launch, ...] = ()
    parts = 0
    for i, layer in enumerate(layers):
        if layer.dropout:
            stages.append([dropout(layer.rows, layer.depth, layer.item), *pending])
            pending = ()
        if i:
            layer = replace(layer, sqnorm_parts=1 if layer.dropout else parts)
        first = forward(layer, device, for_step=True)
        parts = first.tiles_of(layer.cols)
        stages.append([first, *pending])
        pending = update(layer, device, parts)
    stages += [[launch] for launch in pending]
    return _numbered(stages)


@functools.lru_cache(maxsize=1024)
def plan(op: str, layers: Layer | tuple[Layer, ...], device: Device | str) -> tuple[Launch, ...]:
    """The launches of ``op``, in order. ``device``: a Device, or an architecture of tiles.DEVICES ("sm_90").

    ff_update_ and apply_gradient_ also add 1 to the step count, by torch: a launch that is not listed.
    """
    device = DEVICES[device] if isinstance(device, str) else device
    if op == "ff_network_step_":
        return network(layers if isinstance(layers, tuple) else (layers,), device)
    layer = layers if isinstance(layers, Layer) else layers[0]
    if op in ("ff_forward", "ff_label_forward"):
        first = forward(layer, device)
        parts = first.tiles_of(layer.cols)
        return _numbered([[first]] if parts == 1 else [[first], [goodness(layer, parts)]])
    if op in ("ff_step_", "ff_label_step_"):
        return step(layer, device)
    if op in ("ff_update_", "ff_grad"):
        launches = update(replace(layer, sqnorm_parts=1), device, 0, store=op == "ff_grad")
        if layer.normalize != "none" and not layer.sqnorm_parts and layer.rows:
            launches = (sqnorm(layer), *launches)
        return _numbered([[launch] for launch in launches])
    if op == "apply_gradient_":
        return (reduce(layer, 1, layer.optimizer),)
    raise ValueError(f"no plan for {op!r}")
