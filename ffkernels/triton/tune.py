"""Opt-in: tiles measured on the GPU at hand, once for each shape, and remembered on disk.

FFKERNELS_AUTOTUNE=1 switches it on. A shape that is new costs seconds at its first use, so it suits training, whose
shapes stay the same. The cache is a JSON file a GPU in FFKERNELS_CACHE, else in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import plan, tiles
from .plan import Layer
from .tiles import Device, Shape, Tile

Timer = Callable[[Callable[[], object]], float]  # milliseconds of a function
_busy = False  # while a shape is measured, its own launches are not
_loaded: set[Path] = set()


def enabled() -> bool:
    return os.environ.get("FFKERNELS_AUTOTUNE") == "1"


def cache_file(gpu: str) -> Path:
    folder = os.environ.get("FFKERNELS_CACHE")
    base = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ffkernels"
    return base / f"tiles-{re.sub('[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


def load(path: Path) -> None:
    """Take over what an earlier process has measured. A file that cannot be read counts as none."""
    _loaded.add(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for entry in json.loads(path.read_text()):
            shape: Shape = (entry["m"], entry["n"], entry["k"], entry["kind"])
            tile = Tile(**entry["tile"])
            if entry["op"] == "forward":
                tiles.measured_forward.setdefault(shape, tile)
            else:
                tiles.measured_update.setdefault(shape, (tile, entry["splits"]))
    plan.plan.cache_clear()


def save(path: Path) -> None:
    def entry(op: str, shape: Shape, tile: Tile, splits: int) -> dict[str, Any]:
        names = dict(zip(("m", "n", "k", "kind"), shape, strict=True))
        return {"op": op, **names, "tile": dataclasses.asdict(tile), "splits": splits}

    entries = [entry("forward", shape, tile, 1) for shape, tile in tiles.measured_forward.items()]
    entries += [entry("update", shape, *chosen) for shape, chosen in tiles.measured_update.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:  # whole, or not at all
        json.dump(entries, file, indent=1)
    os.replace(file.name, path)


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    global _busy
    _busy = True
    try:
        yield
    finally:
        _busy = False


def _fastest(table: dict[Any, Any], shape: Shape, options: list[Any], run: Callable[[], object], timer: Timer) -> None:
    """Put the option with the least time into ``table``; one that does not compile or fit is passed over."""
    times: list[tuple[float, int]] = []
    for i, option in enumerate(options):
        table[shape] = option
        plan.plan.cache_clear()
        try:
            times.append((timer(run), i))
        except Exception as error:  # of the compiler or the launch: Triton has no one type for them
            if not options[i + 1 :] and not times:
                del table[shape]
                raise RuntimeError(f"no tile runs for shape {shape}") from error
    table[shape] = options[min(times)[1]]
    plan.plan.cache_clear()


def measure(layer: Layer, device: Device, like: Tensor, timer: Timer) -> None:
    """Measure a layer's forward and update on scratch tensors of its shapes, on ``like``'s device and dtype."""
    from . import launch

    m, k, n = layer.inputs, layer.depth, layer.cols
    forward: Shape = (m, n, k, layer.kind)
    update: Shape = (n, k, m, layer.kind)
    x, weight, y = (torch.randn(shape, device=like.device).to(like.dtype) for shape in ((m, k), (n, k), (m, n)))
    vector = torch.rand(m, device=like.device)
    on_device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with _measuring(), on_device:  # timers take events of the current device
        if forward not in tiles.measured_forward:
            fitting = [t for t in tiles.candidates(device.arch, layer.kind) if t.shared(layer.item) <= device.shared]
            run = functools.partial(
                launch.ff_forward, x, weight, None, vector, "l2", 1e-4, "relu", layer.precision, False
            )
            _fastest(tiles.measured_forward, forward, fitting, run, timer)
        if update not in tiles.measured_update:
            allowed = tiles.candidates(device.arch, layer.kind, update=True)
            fitting = [t for t in allowed if t.shared(layer.item) <= device.shared]
            options = [(tile, splits) for tile in fitting for splits in tiles.splits_of(n, k, m, layer.item)]
            state = [torch.zeros((), device=like.device), *(torch.zeros(n, k, device=like.device) for _ in range(2))]
            adam = [1e-3, 0.9, 0.999, 1e-8, 0.0]
            step = functools.partial(
                launch.ff_update_, x, y, vector, weight, None, state, "adam", None, adam, vector, "l2", 1e-4, "relu",
                None, None, layer.precision,
            )  # fmt: skip
            _fastest(tiles.measured_update, update, options, step, timer)


def ensure(layer: Layer, device: Device, like: Tensor) -> None:
    """Measure a shape that is used for the first time, unless a graph is being captured."""
    if _busy or not like.is_cuda or torch.cuda.is_current_stream_capturing() or layer.inputs == 0:
        return
    path = cache_file(torch.cuda.get_device_name(like.device))
    if path not in _loaded:
        load(path)
    shapes = (layer.inputs, layer.cols, layer.depth, layer.kind), (layer.cols, layer.depth, layer.inputs, layer.kind)
    if shapes[0] in tiles.measured_forward and shapes[1] in tiles.measured_update:
        return
    from triton.testing import do_bench

    measure(layer, device, like, do_bench)
    try:
        save(path)
    except OSError as error:
        warnings.warn(f"measured tiles are kept for this process only: {path} cannot be written: {error}", stacklevel=2)
