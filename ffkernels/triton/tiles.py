"""Tile configurations of the Triton kernels: a table by architecture and operand type, and the choice from it.

All of it is plain arithmetic on shapes: nothing here imports triton, and the launcher, the cost model and the
ahead-of-time report read the same functions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Device:
    """What the choice of tiles needs to know of a GPU; rates are a multiprocessor's, in a clock."""

    arch: str  # "sm_90", "gfx942"
    sms: int
    shared: int  # bytes that one block may take
    shared_sm: int  # bytes of a multiprocessor
    flops_16bit: int  # bf16 and fp16 with float32 accumulation, dense
    flops_tf32: int
    flops_fp32: int
    l2_bytes: float  # from L2
    wgmma: bool = False  # products of whole warp groups that read both operands from shared memory
    warp_size: int = 32

    @property
    def number(self) -> int:
        """90 for sm_90; 0 where the architecture is no NVIDIA one."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def tma(self) -> bool:
        """Whether tiles can be copied by tensor descriptors in hardware."""
        return self.number >= 90


# The GPU that stands for each architecture where no other is at hand. Tensor rates: the vendors' architecture papers;
# L2 rates: 64 bytes a clock and slice over the multiprocessors, rounded down.
DEVICES = {
    "sm_80": Device("sm_80", 108, 163 * KIB, 164 * KIB, 2048, 1024, 128, 47),  # A100
    "sm_86": Device("sm_86", 84, 99 * KIB, 100 * KIB, 1024, 512, 256, 24),  # A40
    "sm_89": Device("sm_89", 128, 99 * KIB, 100 * KIB, 512, 256, 256, 24),  # RTX 4090
    "sm_90": Device("sm_90", 132, 227 * KIB, 228 * KIB, 4096, 2048, 256, 38, wgmma=True),  # H100 SXM
    "sm_100": Device("sm_100", 148, 227 * KIB, 228 * KIB, 8192, 4096, 256, 42, wgmma=True),  # B200
    "sm_120": Device("sm_120", 170, 99 * KIB, 100 * KIB, 512, 256, 256, 24),  # RTX 5090
    "gfx942": Device("gfx942", 304, 64 * KIB, 64 * KIB, 2048, 1024, 256, 28, warp_size=64),  # MI300X
}


@dataclass(frozen=True)
class Tile:
    """One configuration of a product: a program computes (m, n) outputs, k terms of the sum at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int = 0  # at most, a thread; 0: ptxas's choice, which may be to spill for one more block

    def shared(self, item: int) -> int:
        """Bytes of shared memory that the pipelined operands take; ``item`` is their size in memory."""
        return self.stages * (self.m + self.n) * self.k * item


# By architecture and the way in which operands are multiplied: the shape classes large, middle, small and thin. What
# limits them: two blocks' worth of registers for the accumulators, and the shared memory of `Device`.
#   16bit: bf16 or fp16 in memory.   tf32, medium: float32 in memory, multiplied as TF32 or bf16.   exact: float32.
# Updates and labelled products (`candidates`) keep more in registers beside their accumulators; where the ahead-of-time
# report found spills, they have tiles of their own: less of the sum at a time, more warps or more registers.
_AMPERE_LARGE = {
    "16bit": (Tile(128, 256, 32, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(64, 32, 64, 4, 4)),
    "16bit update": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 64, 4, 4)),
    "16bit labelled": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(64, 32, 32, 4, 4)),
    "16bit labelled update": (Tile(64, 64, 32, 8, 4), Tile(64, 32, 32, 4, 4, 168)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    "tf32 update": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    "tf32 labelled": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    "medium": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    "medium update": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4, 255), Tile(64, 32, 32, 4, 3)),
    "medium labelled": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    "exact": (Tile(64, 64, 16, 4, 3), Tile(32, 32, 32, 4, 3)),
    "exact update": (Tile(64, 64, 16, 8, 3), Tile(32, 32, 32, 4, 3)),
    "exact labelled update": (Tile(64, 64, 16, 8, 3), Tile(32, 32, 16, 4, 3)),
}
_AMPERE_SMALL = {
    "16bit": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3)),
    "16bit update": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 64, 4, 3, 255)),
    "16bit labelled": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3)),
    "16bit labelled update": (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3, 208)),
    "tf32": (Tile(128, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "tf32 update": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "tf32 labelled": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "medium": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "exact": (Tile(64, 64, 16, 4, 3), Tile(32, 32, 32, 4, 3)),
    "exact update": (Tile(64, 64, 16, 8, 3), Tile(32, 32, 32, 4, 3)),
}
_HOPPER = {
    "16bit": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(64, 32, 64, 4, 4)),
    "16bit update": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 32, 64, 4, 4),
    ),
    "16bit labelled": (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(64, 32, 32, 4, 4)),
    "16bit labelled update": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4, 168)),
    "tf32": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    "tf32 labelled": (Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)),
    # 32 rows keep it on mma.sync. wgmma takes TF32 only with the sum's index contiguous, which an update's operands do
    # not have, and Triton 3.7 rewrites registers that such a product still reads (the PTX interpreter found it).
    "tf32 update": (Tile(32, 128, 32, 4, 4), Tile(32, 64, 32, 4, 4)),
    "tf32 labelled update": (Tile(32, 128, 32, 4, 4), Tile(32, 64, 32, 4, 4, 168)),
    "medium": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "medium labelled": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "medium labelled update": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    "exact": (Tile(64, 64, 16, 4, 3), Tile(32, 32, 32, 4, 3)),
    "exact update": (Tile(64, 64, 16, 8, 3), Tile(32, 32, 32, 4, 3)),
}
_BLACKWELL = {
    **_HOPPER,
    "16bit update": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 64, 4, 4)),
    "tf32 update": (Tile(32, 128, 32, 4, 4), Tile(32, 64, 32, 4, 4, 192)),
    "medium update": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
    "medium labelled update": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 8, 3)),
}
_CONSUMER_BLACKWELL = {
    **_AMPERE_SMALL,
    "16bit update": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
}
_CDNA3 = {
    "16bit": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2), Tile(64, 32, 64, 4, 2)),
    "tf32": (Tile(128, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2)),
    "medium": (Tile(128, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2)),
    "exact": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 32, 4, 2)),
}
TABLE: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": _AMPERE_LARGE,
    "sm_86": _AMPERE_SMALL,
    "sm_89": _AMPERE_SMALL,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _CONSUMER_BLACKWELL,
    "gfx942": _CDNA3,
}


def operands(dtype: str, precision: str) -> str:
    """The table's word for how operands of ``dtype`` ("float32", "bfloat16", "float16") are multiplied."""
    if dtype != "float32":
        return "16bit"
    return {"highest": "exact", "high": "tf32", "medium": "medium"}[precision]


def nearest(arch: str) -> str:
    """The architecture of the table that code for ``arch`` resembles most: itself, or the last one before it."""
    if arch in TABLE:
        return arch
    if not arch.startswith("sm_"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    known = sorted(int(a.removeprefix("sm_")) for a in TABLE if a.startswith("sm_"))
    return f"sm_{max([a for a in known if a <= number], default=80)}"


def candidates(
    arch: str, kind: str, update: bool = False, labelled: bool = False, narrow: bool = False
) -> tuple[Tile, ...]:
    """All tiles that the table has for operands of ``kind`` on ``arch``.

    An update keeps more in registers beside its accumulators (scaled y, sums for the bias, weight and state): unless
    the table has tiles for it, it takes none above 128 x 128. Nor does a labelled product, which has two rows of y.

    Args:
        narrow: rows allow no loads of four elements. Many small ones take registers: the smaller half of the tiles.
    """
    table = TABLE[nearest(arch)]
    names = [kind]
    if update:
        names = [f"{kind} labelled update"] * labelled + [f"{kind} update"]
    elif labelled:
        names = [f"{kind} labelled"]
    found = next((table[name] for name in names if name in table), None)
    if found is None:
        found = tuple(t for t in table[kind] if t.m * t.n <= 128 * 128)
    return found[len(found) // 2 :] if narrow else found


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# Clocks that a block spends outside its main loop (start, first loads, epilogue), and that one more launch costs.
BLOCK_OVERHEAD = 3000
LAUNCH_OVERHEAD = 4000


def blocks_per_sm(tile: Tile, device: Device, item: int) -> int:
    """How many blocks a multiprocessor holds: shared memory, then 64 K registers for accumulators and as much again."""
    by_shared = device.shared_sm // (tile.shared(item) + KIB)
    by_registers = 32768 // (tile.m * tile.n)
    return max(1, min(by_shared, by_registers, 2048 // (tile.warps * device.warp_size)))


def predicted_clocks(
    tile: Tile,
    device: Device,
    m: int,
    n: int,
    k: int,
    kind: str,
    item: int,
    splits: int = 1,
) -> float:
    """Predicted clocks of a product (m, n) over k, its k split ``splits`` times.

    The busiest multiprocessor has ceil(blocks / sms) blocks: that is the wave quantisation. A block's main loop runs at
    the slowest of three rates: products, operands from L2, fragments out of shared memory. Each round of resident
    blocks costs its start and epilogue once, so occupancy hides those of the others.
    """
    blocks = ceil_div(m, tile.m) * ceil_div(n, tile.n) * splits
    steps = ceil_div(ceil_div(k, splits), tile.k)
    rate = {"16bit": device.flops_16bit, "medium": device.flops_16bit, "tf32": device.flops_tf32}.get(
        kind, device.flops_fp32
    )
    products = 2 * tile.m * tile.n * tile.k / rate
    loads = (tile.m + tile.n) * tile.k * item / device.l2_bytes
    if device.wgmma and kind != "exact" and tile.m >= 64:  # a warp group multiplies 64 rows by all columns
        fragments = tile.m // 64 * (64 + tile.n) * tile.k * item / 128
    else:  # a warp multiplies its part of the tile, about as high as wide
        down = 1 << (tile.warps.bit_length() // 2)
        fragments = (tile.m * (tile.warps // down) + tile.n * down) * tile.k * item / 128
    busiest = ceil_div(blocks, device.sms)
    rounds = ceil_div(busiest, blocks_per_sm(tile, device, item))
    return busiest * steps * max(products, loads, fragments) + rounds * BLOCK_OVERHEAD


Shape = tuple[int, int, int, str]  # m, n, k and the kind of the operands
# What was measured on the GPU at hand (tune.py) goes before what is predicted.
measured_forward: dict[Shape, Tile] = {}
measured_update: dict[Shape, tuple[Tile, int]] = {}


def choose(
    device: Device, m: int, n: int, k: int, kind: str, item: int, labelled: bool = False, narrow: bool = False
) -> Tile:
    """The tile that was measured to be fastest; else that of the table with the least predicted time."""
    measured = measured_forward.get((m, n, k, kind))
    if measured and measured in candidates(device.arch, kind, False, labelled, narrow):
        return measured
    return _predict(device, m, n, k, kind, item, labelled, narrow)


@functools.lru_cache(maxsize=4096)
def _predict(device: Device, m: int, n: int, k: int, kind: str, item: int, labelled: bool, narrow: bool) -> Tile:
    """Of equals the larger one, which moves fewer bytes."""
    found = candidates(device.arch, kind, False, labelled, narrow)
    tiles = [t for t in found if t.shared(item) <= device.shared]
    return min(tiles, key=lambda t: (predicted_clocks(t, device, m, n, k, kind, item), -t.m * t.n))


MIN_SPLIT_ROWS = 128  # terms of the sum that a split has at least: fewer do not pay for its start
MAX_WORKSPACE = 0.1  # of a step's bytes: the L2 cache holds a workspace only while nothing else needs it


def choose_split(
    device: Device, m: int, n: int, k: int, kind: str, item: int, labelled: bool = False, narrow: bool = False
) -> tuple[Tile, int]:
    """Tile and number of parts of an update: a product (m, n) weights over k rows.

    A small weight has fewer tiles than the GPU has multiprocessors, and each of them a long sum: then the sum is split,
    the parts go to a workspace, and a second launch adds them. Splitting costs that launch and the workspace's way
    through L2 and back, so it is done where the predicted time with both is less. Parts are powers of two; writing and
    reading them may add MAX_WORKSPACE to what the step reads and writes anyway (x and y twice, weights and moments).
    """
    measured = measured_update.get((m, n, k, kind))
    if measured and measured[0] in candidates(device.arch, kind, True, labelled, narrow):
        return measured
    return _predict_split(device, m, n, k, kind, item, labelled, narrow)


def splits_of(m: int, n: int, k: int, item: int) -> list[int]:
    """The numbers of parts that the sum of an update may have."""
    step_bytes = 2 * item * k * (m + n) + 7 * 4 * m * n
    powers = (2, 4, 8, 16, 32, 64)
    return [1] + [
        s for s in powers if ceil_div(k, s) >= MIN_SPLIT_ROWS and 2 * 4 * s * m * n <= MAX_WORKSPACE * step_bytes
    ]


@functools.lru_cache(maxsize=4096)
def _predict_split(
    device: Device, m: int, n: int, k: int, kind: str, item: int, labelled: bool, narrow: bool
) -> tuple[Tile, int]:
    def clocks(tile: Tile, splits: int) -> float:
        second = LAUNCH_OVERHEAD + 2 * 4 * splits * m * n / (device.l2_bytes * device.sms) if splits > 1 else 0
        return predicted_clocks(tile, device, m, n, k, kind, item, splits) + second

    found = candidates(device.arch, kind, True, labelled, narrow)
    fitting = [t for t in found if t.shared(item) <= device.shared]
    options = [(tile, splits) for tile in fitting for splits in splits_of(m, n, k, item)]
    return min(options, key=lambda o: (clocks(*o), o[1], -o[0].m * o[0].n))


def group_rows(tile: Tile, device: Device, m: int, n: int, item: int) -> int:
    """Rows of tiles that are computed together before the next columns: L2 reuse.

    The blocks that run at once cover g rows and w / g columns of tiles and read g m + w / g n operand rows from memory:
    least at g = sqrt(w n / m), rounded to a power of two of at most 16.
    """
    rows, cols = ceil_div(m, tile.m), ceil_div(n, tile.n)
    at_once = min(rows * cols, device.sms * blocks_per_sm(tile, device, item))
    ideal = math.sqrt(at_once * tile.n / tile.m)
    return min(16, 1 << max(0, round(math.log2(ideal))), 1 << max(0, math.ceil(math.log2(rows))))
