"""Greedy training with one layer in memory: what the layers below give is kept in files, and read from there.

For networks and data larger than memory. A frozen layer gives the same output for an input and a label in every epoch,
so it is run once, over all inputs under all labels, in chunks of rows; the layer above then trains on the file. Files
are memory-mapped and their pages handed back as training goes on, so that memory holds one layer with its state, a
chunk, and a few bytes for each row. Disk: rows x classes x width of the layer in training, twice while it advances.

    train-<i>.y, .g, .s     what layer i reads: (rows, classes, width) output of the layer below, and (rows, classes)
                            its goodness and the sum of g over all layers below
    valid-<i>.y, .g, .s     the same of the validation rows
    train.json, valid.json  how far the files are written, and for which weights
    layer-<i>.pt            state of a layer that was given without memory (device "meta"), and after how many epochs;
                            it stays, as do its pages: the layer's weights are mapped from it
    layer-<i>-before.pt     of the layer in training, the same an epoch earlier: whoever keeps the records may have been
                            stopped before they were written
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .batches import Draws, TensorBatches, beside
from .checkpoint import bytes_of, write_atomic
from .hybrid import ImageNegatives
from .layer import FFLinear
from .learning_rate import LearningRate
from .negatives import Negatives
from .nn import FFNet, NetStep
from .optim import state_dtype
from .peer import START
from .stage import HeadStage, Stage
from .training import Callback, Record, Run

CHUNK_BYTES = 4 << 20  # of outputs, written at once
RESIDENT_BYTES = 4 << 20  # of a file, before its pages are handed back
_AROUND = 128 << 10  # bytes that Linux maps around a row that is touched, about


def _trim() -> None:
    """Hand the C library's free memory back to the system.

    glibc soon serves tensors of some MB from its heap, where freed ones leave holes that the next layer's do not fit:
    without this the heap grows with every layer, although no tensor stays.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
    if trim is not None:
        trim(0)


class _Mapped:
    """A file as a tensor (rows, columns). Pages that were touched are dropped again, so they do not add up."""

    def __init__(self, path: Path, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.path, size = path, rows * columns * dtype.itemsize
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._tensor = torch.frombuffer(self._map, dtype=dtype).view(rows, columns)
        self._touched = 0

    def read(self, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, slice):
            found = self._tensor[rows].clone()
            self._touch(found.nbytes)
            return found
        found = self._tensor.new_empty(len(rows), self._tensor.shape[1])
        each = self._tensor.shape[1] * self._tensor.itemsize + _AROUND
        size = max(1, RESIDENT_BYTES // each)
        for part, into in zip(rows.split(size), found.split(size), strict=True):
            torch.index_select(self._tensor, 0, part, out=into)
            self._touch(len(part) * each)
        return found

    def write(self, first: int, values: Tensor) -> None:
        self._tensor[first : first + len(values)] = values
        self._touch(values.nbytes)

    def _touch(self, size: int) -> None:
        self._touched += size
        if self._touched >= RESIDENT_BYTES:
            self.drop()

    def drop(self) -> None:
        """Hand the pages back; what was written stays in the file."""
        self._touched = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        self._map.flush()

    def remove(self) -> None:
        del self._tensor
        self._map.close()
        self.path.unlink(missing_ok=True)


class Rows:
    """Inputs under every label, as the layers run so far give them. ``name``: "train" or "valid"."""

    def __init__(self, folder: Path, name: str, x: Tensor, net: FFNet) -> None:
        self.folder, self.name, self.x, self.net = folder, name, x, net
        self.classes = net.num_classes or 0
        self.layer = 0  # whose inputs these are
        self.begun, self.towards = 0, None  # inputs that the layer has run over already, and the key of what they give
        self._files: dict[str, _Mapped] = {}

    def _file(self, kind: str, layer: int) -> _Mapped:
        width = self.net.stack[layer - 1].out_features if kind == "y" else 1
        dtype = self.net.stack[0].weight.dtype
        path = self.folder / f"{self.name}-{layer}.{kind}"
        return _Mapped(path, len(self.x) * self.classes, width, dtype if kind == "y" else state_dtype(dtype))

    def at(self, layer: int) -> None:
        """Use the files of ``layer``'s inputs, which are complete."""
        self.layer = layer
        self._files = {kind: self._file(kind, layer) for kind in ("y", "g", "s")} if layer else {}

    def climb_labels(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What FFNet.climb_labels gives for the inputs ``rows`` (B,) under ``labels`` (B, C), from the files."""
        places = (rows[:, None].cpu() * self.classes + labels.cpu()).flatten()
        device = labels.device
        return self._files["y"].read(places).to(device), [self._files["g"].read(places).flatten().to(device)]

    def chunks(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of inputs that take CHUNK_BYTES together, on either side of the layer."""
        layer = self.net.stack[self.layer]
        width = max(layer.in_features, layer.out_features) * layer.weight.element_size() * self.classes
        size = max(1, CHUNK_BYTES // width)
        for start in range(first, len(self.x), size):
            yield start, min(start + size, len(self.x))

    def run(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer on inputs [first, last) under every label: y (M, N), G (M,), sum of g up to it (M,)."""
        layer = self.net.stack[self.layer]
        device, places = layer.weight.device, slice(first * self.classes, last * self.classes)
        if self.layer == 0:
            x = beside(self.x[first:last], layer.weight)
            labels = torch.arange(self.classes, device=device).expand(len(x), -1)
            y, (total,) = self.net[:1].climb_labels(x, labels)
            return y, total, total / layer.divisor
        x, sqnorm, score = (self._files[kind].read(places).to(device) for kind in ("y", "g", "s"))
        y, total = ops.ff_forward(x, layer.weight, layer.bias, x_sqnorm=sqnorm.flatten(), **layer.forward_options())
        return y, total, score.flatten() + total / layer.divisor

    # -- progress: which layer's inputs are complete, and how much of the next one's is there

    def _note(self, **content: Any) -> None:
        write_atomic(self.folder / f"{self.name}.json", json.dumps(content).encode())

    def resume(self, index: int, keys: Sequence[str]) -> None:
        """Use the files that are there, if they lead to layer ``index`` and are of the same data and weights."""
        try:
            found = json.loads((self.folder / f"{self.name}.json").read_text())
            layer, key, self.begun, self.towards = (found[name] for name in ("layer", "key", "begun", "next"))
        except (OSError, ValueError, KeyError):
            layer, key = 0, keys[0]
        if layer > index or keys[layer] != key:
            self.close()
            layer, self.begun = 0, 0
        self.at(layer)

    def advance(self, keys: Sequence[str]) -> None:
        """Run the layer over the inputs that it has not run over yet, and use its outputs from then on."""
        target = {kind: self._file(kind, self.layer + 1) for kind in ("y", "g", "s")}
        here, there = keys[self.layer], keys[self.layer + 1]
        for first, last in self.chunks(self.begun if self.towards == there else 0):
            for kind, values in zip(("y", "g", "s"), self.run(first, last), strict=True):
                target[kind].write(first * self.classes, values.view(len(values), -1).cpu())
                target[kind].sync()
            self._note(layer=self.layer, key=here, begun=last, next=there)
        self._note(layer=self.layer + 1, key=there, begun=0, next=None)
        for file in self._files.values():
            file.remove()
        self._files, self.layer, self.begun = target, self.layer + 1, 0
        _trim()

    def close(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            file.remove()
        self._files = {}
        for path in (*self.folder.glob(f"{self.name}-*.[ygs]"), self.folder / f"{self.name}.json"):
            path.unlink(missing_ok=True)


class Spool:
    """The folder of one greedy training: its files, and how far they are."""

    def __init__(self, folder: str | Path, net: FFNet, x: Tensor, validation: tuple[Tensor, Tensor] | None) -> None:
        self.folder, self.net = Path(folder), net
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train = Rows(self.folder, "train", x, net)
        self.valid = None if validation is None else Rows(self.folder, "valid", validation[0], net)
        self.sets = [rows for rows in (self.train, self.valid) if rows is not None]
        self._without_memory = [layer.weight.is_meta for layer in net.stack]
        self._homes = [layer.weight.device for layer in net.stack]
        self._keys: list[str] = []

    # -- the layer in training

    def take_up(self, index: int, device: torch.device | str | None, seed: int, epochs: int | None = None) -> FFLinear:
        """The layer in memory: as it was after ``epochs`` (None: when it was left), before the first with its first
        weights, which depend on (seed, index) alone.

        ValueError: it was not kept after so many epochs.
        """
        layer = self.net.stack[index]
        if not self._without_memory[index]:
            return layer if device is None else layer.to(device)
        kept = None if epochs == 0 else self._kept(index, epochs)
        layer.to_empty(device=device or "cpu")
        if kept is not None:
            layer.load_state_dict(kept)
            return layer
        with torch.random.fork_rng(devices=[]):
            digest = hashlib.blake2b(f"{seed}/{index}/weights".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)
            first = FFLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        layer.weight.copy_(first.weight)
        if layer.bias is not None and first.bias is not None:
            layer.bias.copy_(first.bias)
        for t in layer.optimizer_state.buffers():
            t.zero_()
        if layer.peer_mean is not None:
            layer.peer_mean.fill_(START)
        return layer

    def layer_file(self, index: int, before: bool = False) -> Path:
        return self.folder / f"layer-{index}{'-before' * before}.pt"

    def _kept(self, index: int, epochs: int | None) -> dict[str, Tensor]:
        """The layer's state, mapped into memory."""
        found = []
        for path in (self.layer_file(index), self.layer_file(index, before=True)):
            if path.exists():
                content = torch.load(path, mmap=True, weights_only=True)
                if epochs in (None, content["epochs"]):
                    return content["state"]
                found.append(content["epochs"])
        raise ValueError(
            f"spool_dir must hold layer {index} as it was after {epochs} epochs, which history has of it; "
            f"{self.folder} has it after {found or 'none'}"
        )

    def keep(self, index: int, epochs: int) -> None:
        """Write the layer's state after so many epochs, if it has no memory of its own."""
        if self._without_memory[index]:
            path = self.layer_file(index)
            temporary = path.with_suffix(".tmp")
            torch.save({"epochs": epochs, "state": self.net.stack[index].state_dict()}, temporary)
            if epochs > 1 and path.exists():
                os.replace(path, self.layer_file(index, before=True))
            os.replace(temporary, path)

    def put_down(self, index: int) -> None:
        """The layer leaves the device: back to where it was, or into its file, mapped into memory."""
        layer = self.net.stack[index]
        if self._without_memory[index]:
            layer.load_state_dict(self._kept(index, None), assign=True)
            self.layer_file(index, before=True).unlink(missing_ok=True)
        else:
            layer.to(self._homes[index])
        _trim()

    # -- what the layers below give

    def _next_key(self, index: int) -> str:
        """Names the inputs of layer ``index``: those of the same data and weights below have the same one."""
        digest = hashlib.sha256()
        if index == 0:
            for rows in self.sets:
                x, size = rows.x, max(1, CHUNK_BYTES // (rows.x[0].numel() * rows.x.element_size()))
                digest.update(f"{x.dtype} {x.shape} {self.net.num_classes} {self.net.label_strength}".encode())
                for part in x.split(size):
                    held = part.cpu().contiguous()
                    digest.update(bytes_of(held))
        else:
            below = self.net.stack[index - 1]
            digest.update(self._keys[index - 1].encode())
            digest.update(f"{below.forward_options()} {checks.precision(below.precision)} {below.divisor}".encode())
            for t in below.parameters():
                held = t.detach().cpu().contiguous()
                digest.update(bytes_of(held))
        return digest.hexdigest()

    def climb(self, index: int, device: torch.device | str | None, seed: int) -> None:
        """Have the inputs of layer ``index`` in files, from wherever they are."""
        fresh = not self._keys
        for layer in range(len(self._keys), index + 1):
            if layer and self.net.stack[layer - 1].weight.is_meta:
                self.take_up(layer - 1, device, seed)
                self.put_down(layer - 1)
            self._keys.append(self._next_key(layer))
        if fresh:
            for rows in self.sets:
                rows.resume(index, self._keys)
        for layer in range(min(rows.layer for rows in self.sets), index):
            if device is not None and torch.device(device).type != "cpu":  # mapped weights do for a forward on the CPU
                self.take_up(layer, device, seed)
            for rows in self.sets:
                if rows.layer == layer:
                    rows.advance(self._keys)
            self.put_down(layer)

    def finish(self) -> None:
        """Remove everything but the states of layers without memory."""
        for rows in self.sets:
            rows.close()


class _SpooledStage(Stage):
    """A stage whose minibatches are numbers of rows; what the layers below give for them comes from files."""

    def __init__(self, net: FFNet, only: int, negatives: Negatives, spool: Spool, epochs: int) -> None:
        super().__init__(net, only, None, negatives, None, epochs=epochs, with_head=False, measured=True)
        self.spool = spool
        if only:
            self.below = spool.train  # type: ignore[assignment]  # it has the one method of it that is used

    def step(
        self, x: Tensor, labels: Tensor, draws: Draws, wrong: Tensor | None = None
    ) -> tuple[NetStep, Tensor | None]:
        weight = self.layers[0].weight
        if self.only == 0:
            x = beside(self.spool.train.x[x.to(self.spool.train.x.device)], weight)
        fixed = None if wrong is None else wrong.to(weight.device)
        found, _ = super().step(x, labels.to(weight.device), draws, fixed)
        return NetStep(*(t.to(labels.device) for t in found)), None


class _SpooledRun(Run):
    """The epochs of one layer."""

    spool: Spool

    def _error(self, stage: Stage | HeadStage) -> float:
        assert self.validation is not None
        rows, wrong, labels = self.spool.valid, 0, self.validation[1].cpu()
        assert rows is not None
        best = torch.Tensor.argmin if self.net.minimize else torch.Tensor.argmax
        for first, last in rows.chunks():
            score = rows.run(first, last)[2].view(last - first, -1)
            wrong += int((best(score, 1).cpu() != labels[first:last]).sum())
        return 100.0 * wrong / len(labels)


def check(net: FFNet, mode: str, negatives: Any, **unused: Any) -> None:
    """What can be trained from files; ``unused``: further arguments of `ffkernels.training.fit`, which must be None."""
    for name, given in {**unused, "average": net.average, "head": net.head}.items():
        if given is not None:
            raise ValueError(f"{name} must be None with spool_dir, got {type(given).__name__}")
    if mode != "greedy":
        raise ValueError(f"mode must be 'greedy' with spool_dir, which holds one layer at a time, got {mode!r}")
    if isinstance(negatives, ImageNegatives) or not net.layered:
        raise ValueError("spool_dir is for an FFNet and negatives that are labels")
    if net.predict_layers is not None:
        raise ValueError("predict_layers must be None with spool_dir: the error is that of all layers so far")


def fit(
    net: FFNet,
    data: TensorBatches,
    spool_dir: str | Path,
    records: list[Record],  # extended
    *,
    epochs: int,
    seed: int,
    lr: float | None,
    schedule: Callable[[float], float] | None,
    negatives: Negatives,
    validation: tuple[Tensor, Tensor] | None,
    validate_every: int,
    callbacks: list[Callback],
    progress: bool,
    device: torch.device | str | None,
) -> None:
    """`ffkernels.training.fit` in mode "greedy", whose arguments these are, with one layer in memory at a time."""
    spool = Spool(spool_dir, net, data.x, validation)
    rows = torch.arange(len(data.x), device=data.labels.device)
    batches = TensorBatches(rows, data.labels, data.batch_size)
    batches.wrong = data.wrong
    for index in range(len(net)):
        if any(r["layer"] > index for r in records):
            continue
        spool.climb(index, device, seed)
        layer = spool.take_up(index, device, seed, epochs=sum(r["layer"] == index for r in records))
        rate = LearningRate([layer], None, lr, schedule, None)

        def keep(net: FFNet, history: list[Record], index: int = index) -> None:
            spool.keep(index, sum(r["layer"] == index for r in history))

        run = _SpooledRun(
            net, batches, seed, rate, None, None, validation, validate_every, [keep, *callbacks], progress
        )
        run.spool = spool
        try:
            run.train(_SpooledStage(net, index, negatives, spool, epochs), records)
        finally:
            rate.restore()
        spool.put_down(index)
    spool.finish()
