"""``python -m ffkernels.triton.aot``: every Triton kernel compiled for GPUs that need not be there, and the outcome.

The launchers (launch.py) run as they are, on tensors without memory; each launch of theirs is compiled for the
architecture instead, with the specialisation that Triton's own JIT makes of its arguments, and the machine code is read
(machine_code.py). Compiled code stays in Triton's cache, so a second report takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..optim import SGD, Adam, AdamW, Optimizer
from . import device as devices
from . import plan
from .in_flight import touched
from .machine_code import MachineCode, of_amdgcn, of_cubins
from .tiles import DEVICES, Tile, candidates

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# How operands are multiplied: name, dtype, precision, the table's word for it
OPERANDS = {
    "bf16": (torch.bfloat16, "highest", "16bit"),
    "fp16": (torch.float16, "highest", "16bit"),
    "tf32": (torch.float32, "high", "tf32"),
    "medium": (torch.float32, "medium", "medium"),
    "exact": (torch.float32, "highest", "exact"),
}
ROWS, DEPTH, COLS, CLASSES = 4096, 2048, 2048, 10  # sizes that are aligned in every way
RAGGED = (1000, 750, 500)  # rows of 16-bit operands start on 4 bytes (K) and 8 bytes (N)


@dataclass(frozen=True)
class Variant:
    """Launches that are compiled together: an op with operands of a kind, on a tile of the table."""

    op: str
    operands: str
    tile: Tile  # of the forward
    update_tile: Tile
    splits: int = 1
    optimizer: str = "adam"
    ragged: bool = False
    activation: str = "relu"


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture."""

    arch: str
    kernel: str
    variant: Variant
    shared: int  # bytes a block
    warps: int
    stages: int
    code: MachineCode
    scratch: int  # bytes of global memory that a launch asks Triton's allocator for, which nobody sets
    in_flight: int  # instructions that touch registers of a wgmma in flight
    hash: str  # Triton's, of source, constants, specialisation and target


_OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Adam(lr=1e-3),
    "adamw": AdamW(lr=1e-3, weight_decay=0.1),
    "sgd": SGD(lr=1e-2),
    "momentum": SGD(lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def pairs_of(arch: str, kind: str, labelled: bool = False, ragged: bool = False) -> list[tuple[Tile, Tile]]:
    """Tiles of a step's forward and update, such that each of the table is met: a step takes one each way."""
    forward = candidates(arch, kind, False, labelled, narrow=ragged)
    update = candidates(arch, kind, True, labelled, narrow=ragged)
    return [(f or forward[-1], u or update[-1]) for f, u in zip_longest(forward, update)]


RAGGED_TOO = ("bf16", "medium", "exact")  # the rest differ from one of these in an instruction's type


def variants(arch: str) -> list[Variant]:
    """What is compiled for ``arch``.

    A step on every tile of the table with every kind of operand; on ragged rows and with labels with those of
    RAGGED_TOO; what depends on neither once.
    """
    found = []
    for operands, (_, _, kind) in OPERANDS.items():
        pairs, labelled = pairs_of(arch, kind), pairs_of(arch, kind, labelled=True)
        found += [Variant("ff_step_", operands, *pair) for pair in pairs]
        if operands in RAGGED_TOO:
            found += [Variant("ff_step_", operands, *pair, ragged=True) for pair in pairs_of(arch, kind, ragged=True)]
            found += [Variant("ff_label_step_", operands, *pair) for pair in labelled]
            found.append(Variant("ff_network_step_", operands, *pairs[0]))
            found.append(Variant("ff_grad", operands, *pairs[-1]))
        else:
            found.append(Variant("ff_label_step_", operands, *labelled[-1]))
    small, both = pairs_of(arch, "16bit")[-1], pairs_of(arch, "16bit", labelled=True)[-1]
    narrow = pairs_of(arch, "16bit", labelled=True, ragged=True)[-1]
    found.append(Variant("ff_label_step_", "bf16", *narrow, ragged=True))
    found.append(Variant("ff_label_step_", "bf16", *both, splits=4))
    found.append(Variant("ff_step_", "bf16", *small, splits=4))
    found += [Variant("ff_step_", "bf16", *small, optimizer=name) for name in ("adamw", "sgd", "momentum")]
    found += [Variant("ff_forward", "bf16", *small, activation=name) for name in ("leaky_relu", "gelu", "silu", "tanh")]
    found.append(Variant("ff_label_forward", "bf16", *both))
    return found


class _NoDriver:
    """Stands where Triton's driver does, for compiling only. The device, Triton's key of its caches, is the target."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target

    def get_current_stream(self, device: Any) -> int:
        return 0


def target(arch: str) -> Any:
    """Triton's name for an architecture."""
    from triton.backends.compiler import GPUTarget

    warp = DEVICES[arch].warp_size
    return GPUTarget("cuda", DEVICES[arch].number, warp) if DEVICES[arch].number else GPUTarget("hip", arch, warp)


@contextmanager
def compiling(arch: str) -> Iterator[list[Any]]:
    """While open, launches of Triton kernels are compiled for ``arch`` and not run; gives the list of the results.

    Tensors on the CPU or without memory ("meta") are then taken for tensors on such a GPU.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled.append(original(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    before = getattr(driver, "_active", None)
    driver.set_active(_NoDriver(target(arch)))
    try:
        with mock.patch.object(JITFunction, "run", run), devices.stand_in(arch):
            yield compiled
    finally:
        driver._active = before


def _launch(variant: Variant) -> None:
    """Call the launcher of the variant's op."""
    from . import launch  # which needs triton

    dtype, precision, _ = OPERANDS[variant.operands]
    m, k, n = RAGGED if variant.ragged else (ROWS, DEPTH, COLS)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias = new(m, k), new(n, k), new(n)
    per_row = new(m, dtype=torch.float32)
    labels = new(m // 2, dtype=torch.int64)
    optimizer = _OPTIMIZERS[variant.optimizer]
    state = list(optimizer.init_state(weight, bias).values())
    other = list(optimizer.init_state(new(n, n), bias).values())  # of a second layer
    update = (weight, bias, state, optimizer.kind, None, optimizer.hyper)
    loss = (2.0, 1.0, "mean")
    layer = ("l2", 1e-4, variant.activation)
    calls: dict[str, Callable[[], object]] = {
        "ff_forward": lambda: launch.ff_forward(x, weight, bias, per_row, *layer, precision, True),
        "ff_step_": lambda: launch.ff_step_(x, per_row, *update, *loss, None, *layer, None, None, precision),
        "ff_grad": lambda: launch.ff_grad(x, new(m, n), per_row, weight, bias, None, *layer, None, None, precision),
        "ff_label_forward": lambda: launch.ff_label_forward(
            x, new(m, CLASSES, dtype=torch.int64), weight, bias, CLASSES, 1.0, *layer, precision, False
        ),
        "ff_label_step_": lambda: launch.ff_label_step_(
            new(m // 2, k), labels, labels, *update, CLASSES, 1.0, *loss, *layer, None, None, precision
        ),
        "ff_network_step_": lambda: launch.ff_network_step_(
            x, per_row, None, None, None, 0, 0.0, [weight, new(n, n)], [bias] * 2, [*state, *other], [True] * 2,
            [len(state)] * 2, [optimizer.kind] * 2, [], optimizer.hyper * 2, [loss[0]] * 2, [loss[1]] * 2,
            [loss[2]] * 2, [layer[0]] * 2, [layer[1]] * 2, [layer[2]] * 2, [precision] * 2, [0.0] * 2, [], [0.0] * 2,
            None,
        ),
    }  # fmt: skip
    calls[variant.op]()


def _kernels(arch: str, variant: Variant) -> list[Any]:
    """All kernels that the variant's op launches, as Triton compiles them."""
    with (
        compiling(arch) as kernels,
        mock.patch.object(plan, "choose", return_value=variant.tile),
        mock.patch.object(plan, "choose_split", return_value=(variant.update_tile, variant.splits)),
    ):
        plan.plan.cache_clear()
        try:
            _launch(variant)
        finally:
            plan.plan.cache_clear()
    return kernels


def compile_variants(arch: str, found: Sequence[Variant]) -> list[Compiled]:
    """What the variants' ops launch, each kernel once, under the first variant that launches it."""
    kernels: dict[str, tuple[Variant, Any]] = {}
    for variant in found:
        for kernel in _kernels(arch, variant):
            kernels.setdefault(kernel.hash, (variant, kernel))
    return _read(arch, list(kernels.values()))


def _read(arch: str, kernels: Sequence[tuple[Variant, Any]]) -> list[Compiled]:
    if DEVICES[arch].number:
        codes = of_cubins([kernel.asm["cubin"] for _, kernel in kernels], arch)
    else:
        codes = [of_amdgcn(kernel.asm["amdgcn"]) for _, kernel in kernels]
    found = []
    for (variant, kernel), code in zip(kernels, codes, strict=True):
        meta = kernel.metadata
        in_flight = len(touched(kernel.asm["ptx"])) if "ptx" in kernel.asm else 0
        scratch = getattr(meta, "global_scratch_size", None) or 0
        found.append(
            Compiled(
                arch, meta.name, variant, meta.shared, meta.num_warps, meta.num_stages, code, scratch, in_flight,
                kernel.hash,
            )
        )  # fmt: skip
    return found


def report(
    archs: Sequence[str] = ARCHS,
    jobs: int | None = None,
    only: Callable[[Variant], bool] = lambda variant: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Compiled]:
    """Compile everything for ``archs`` in ``jobs`` processes (None: one a CPU); each kernel once."""
    work: dict[tuple[str, str], list[Variant]] = {}  # whose kernels have most in common, for one process
    for arch in archs:
        for variant in filter(only, variants(arch)):
            work.setdefault((arch, variant.operands), []).append(variant)
    environment = {"TRITON_INTERPRET": "0"}  # which would make jit functions that cannot be compiled
    with (
        mock.patch.dict(os.environ, environment),
        ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(compile_variants, arch, found) for (arch, _), found in work.items()]
        for done, _ in enumerate(as_completed(futures), 1):
            progress(done, len(futures))
        every = [compiled for future in futures for compiled in future.result()]
    return list({compiled.hash: compiled for compiled in reversed(every)}.values())[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _widths(found: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(found.items(), reverse=True)) or "-"


def rows(compiled: Sequence[Compiled]) -> list[list[str]]:
    """The report, heading first. Memory accesses are instructions x bytes; TMA: copies by tensor descriptor."""
    table = [["arch", "kernel", "op", "operands", "tile", "warps", "stages", "registers", "spills", "shared", "matrix",
              "loads", "stores", "TMA", "loop: instructions", "products", "divisions", "in flight"]]  # fmt: skip
    for c in compiled:
        v, code = c.variant, c.code
        loop = [str(code.loop.get(name, "-")) for name in ("instructions", "products", "divisions")]
        tile = v.tile if "forward" in c.kernel else v.update_tile
        op = v.op + f" /{v.splits}" * (v.splits > 1) + " ragged" * v.ragged
        op += f" {v.optimizer}" * (v.optimizer != "adam") + f" {v.activation}" * (v.activation != "relu")
        table.append([
            c.arch, c.kernel, op, v.operands, f"{tile.m}x{tile.n}x{tile.k}", str(c.warps), str(c.stages),
            str(code.registers), str(code.spills), str(c.shared),
            " ".join(f"{count} {family}" for family, count in code.matrix.items()) or "-", _widths(code.loads),
            _widths(code.stores), str(code.bulk_copies), *loop, str(c.in_flight),
        ])  # fmt: skip
    return table


def text(compiled: Sequence[Compiled]) -> str:
    table = rows(compiled)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ffkernels.triton.aot",
        description="Compile every Triton kernel for GPUs that need not be there; print what the machine code says.",
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, help="default: all of them")
    parser.add_argument("--operands", nargs="+", choices=list(OPERANDS), default=list(OPERANDS))
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a CPU)")
    parser.add_argument("--json", metavar="FILE", help="write every number as JSON; - writes it to stdout")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if (reason := devices.missing()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    compiled = report(args.arch, args.jobs, lambda v: v.operands in args.operands, progress)
    content = json.dumps([dataclasses.asdict(c) for c in compiled], indent=1)
    if args.json == "-":
        print(content)
        return 0
    print(text(compiled))
    if args.json is not None:
        with open(args.json, "w") as file:
            file.write(content + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
