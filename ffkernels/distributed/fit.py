"""The training loop of a net that several processes train: `ffkernels.training.fit` with a part for each rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checks
from ..batches import beside
from ..learning_rate import LearningRate
from ..training import MODES, Record, check_validation, counted, status
from .data import Shards
from .group import agreement, watch
from .model import ParallelModel
from .stage import Micro

Callback = Callable[[Any, list[Record]], object]


def fit(
    model: ParallelModel,
    data: Any,
    labels: Tensor | None = None,  # (B,)
    *,
    epochs: int,
    mode: str = "simultaneous",
    batch_size: int = 256,
    seed: int = 0,
    lr: float | None = None,
    schedule: Callable[[float], float] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    validate_every: int = 1,
    callbacks: Iterable[Callback] = (),
    history: Sequence[Record] | None = None,
    progress: bool = True,
    workers: int = 0,
) -> list[Record]:
    """Train as `ffkernels.training.fit` does in one process with the same arguments, up to the rounding of sums.

    Every rank calls it with the same arguments and gets the same records. Order and wrong labels of an epoch depend on
    (seed, epoch) alone, not on the number of ranks, so a training may go on with another number of them.

    Args:
        data, labels: x (B, K) or (B, C, H, W) with labels (B,); or a dataset with an index and a length that gives
            (x, label). All of it on every rank, each of which takes its part; tensors may be memory-mapped files.
        batch_size: inputs of a global minibatch.
        callbacks: called with (model, records) after every epoch, on every rank; training stops on all of them when one
            gives a true result on any.
        workers: processes that load a dataset's rows.
        The others as for `ffkernels.training.fit`. A pipeline has no mode "greedy": one layer alone cannot be divided.

    Raises:
        TypeError, ValueError: a wrong argument, or one that is not the same on all ranks, before anything has changed.
        RankError: another rank died, hangs, failed or had a wrong argument; the message names it.
    """
    with agreement(model.group) as same:
        checks.count("epochs", epochs, 1, 2**31, "passes over the data")
        checks.option("mode", mode, MODES)
        checks.count("batch_size", batch_size, 1, 2**31, "inputs of a global minibatch")
        checks.count("seed", seed, -(2**63), 2**63, "any integer")
        if mode == "greedy" and model.links.places > 1:
            raise ValueError("mode must be 'simultaneous' with a pipeline: in 'greedy' mode one layer trains at a time")
        checks.count("validate_every", validate_every, 1, 2**31, "epochs from one measurement to the next")
        if lr is not None:
            checks.number("lr", lr, 0.0)
        if model.net.num_classes is None:
            raise ValueError("fit needs a net with num_classes, to write labels over the input; it is None")
        check_validation(model.net, validation)
        shards = Shards(data, labels, batch_size, model.replicas, model.replica, workers)
        same |= {"rows of data": len(shards.data), "batch_size": batch_size, "epochs": epochs, "seed": seed, "lr": lr}
        same |= {"mode": mode, "rows of validation": validation and len(validation[0])}
        same |= {"validate_every": validate_every, "records of history": len(history or ())}
    records = list(history or ())
    rate = LearningRate([layer for _, layer in model.layers], None, lr, schedule, None)
    with watch().guard():
        try:
            for only in [None] if mode == "simultaneous" else range(len(model.net)):
                loop = _Loop(
                    model, shards, only, epochs, seed, rate, validation, validate_every, progress and model.main
                )
                loop.run(list(callbacks), records)
        finally:
            rate.restore()
    return records


class _Loop:
    """The epochs that train all layers, or in "greedy" mode the layer ``only``."""

    def __init__(
        self,
        model: ParallelModel,
        shards: Shards,
        only: int | None,
        epochs: int,
        seed: int,
        rate: LearningRate,
        validation: tuple[Tensor, Tensor] | None,
        validate_every: int,
        progress: bool,
    ) -> None:
        self.model, self.shards, self.only, self.epochs, self.seed = model, shards, only, epochs, seed
        self.rate, self.validation, self.validate_every, self.progress = rate, validation, validate_every, progress
        self.trained = range(len(model.net)) if only is None else range(only, only + 1)

    def run(self, callbacks: list[Callback], records: list[Record]) -> None:
        only, batches = self.only, len(self.shards.sampler)
        if only is not None and any(r["layer"] is not None and r["layer"] > only for r in records):
            return  # a callback had ended this layer's training before its last epoch
        done = sum(r["layer"] == only for r in records)
        title = "training" if only is None else f"layer {only + 1}/{len(self.model.net)}"
        with tqdm(
            total=self.epochs * batches,
            initial=done * batches,
            desc=title,
            unit="batch",
            disable=not self.progress,
        ) as bar:
            for own_epoch in range(done, self.epochs):
                records.append(self._epoch(own_epoch, (only or 0) * self.epochs + own_epoch + 1, bar))
                stop = [callback(self.model, records) for callback in callbacks]  # all are called
                if self.model.anywhere(any(stop)):
                    return

    def _epoch(self, own_epoch: int, epoch: int, bar: tqdm) -> Record:
        model, sizes = self.model, self.shards.sampler.sizes()
        stage = model.stage(self.trained if self.only is not None else None)
        paired = model.paired(self.shards.images, self.trained)
        plans = [model.plan(own, own, (rows, rows), paired) for rows, own in sizes]
        stage.sums.zero_()
        stage.begin([micro for plan in plans for micro in plan])
        inputs, start = 0, time.perf_counter()
        for i, (plan, batch) in enumerate(zip(plans, self._batches(epoch), strict=True)):
            self.rate.set((own_epoch + i / len(plans)) / self.epochs)
            self._feed(plan, batch)
            model.count_step()
            inputs += sizes[i][0]
            if bar.update():  # true when it is time to redraw: only then are values fetched from the device
                bar.set_postfix_str(self._status(sizes[: i + 1], time.perf_counter() - start, epoch), refresh=False)
        stage.end()
        sums = model._over_all(stage.sums.clone())
        seconds = time.perf_counter() - start
        rows = 2 * inputs
        # a row's loss counts once, its goodness among the positive or the negative half
        means = (sums / torch.tensor([[rows], [inputs], [inputs]], device=sums.device)).tolist()
        record: Record = {"epoch": epoch, "layer": self.only}
        for name, values in zip(("loss", "goodness_positive", "goodness_negative"), means, strict=True):
            record[name] = [v if i in self.trained else None for i, v in enumerate(values)]
        record.update(lr=self.rate.value(), rows_per_second=rows / seconds, seconds=seconds)
        if self.validation is not None:
            due = (own_epoch + 1) % self.validate_every == 0 or own_epoch + 1 == self.epochs
            record["error"] = self._error() if due else None
        return model._from_main(record)  # times differ between ranks

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor] | None]:
        if self.model.links.place:
            return iter([None] * len(self.shards.sampler))  # later stages get their input from the one before
        return self.shards.epoch(self.seed, epoch, self.model.net.num_classes or 0)

    def _feed(self, plan: Sequence[Micro], batch: tuple[Tensor, Tensor, Tensor] | None) -> None:
        model = self.model
        stage = model.stage(self.trained if self.only is not None else None)
        if batch is None:
            for micro in plan:
                stage.feed(micro)
            return
        weight = model.layers[0][1].weight
        x, labels, negatives = batch
        x = beside(x, weight)
        parts = model.labelled(x, labels.to(weight.device), negatives.to(weight.device), plan)
        for micro, part in zip(plan, parts, strict=True):
            stage.feed(micro, part)

    def _error(self) -> float:
        """Percent of the validation rows whose predicted label is wrong."""
        assert self.validation is not None
        x, labels = self.validation
        layers = None if self.only is None else counted(self.model.net, self.trained.stop)
        predicted = self.model.predict(x, layers=layers)
        return 100.0 * (predicted.cpu() != labels.cpu()).double().mean().item()

    def _status(self, sizes: Sequence[tuple[int, int]], seconds: float, epoch: int) -> str:
        """Of this rank's rows and layers; rows a second of all."""
        own, everyone = (max(1, sum(s[i] for s in sizes)) for i in (1, 0))
        stage = self.model.stage(self.trained if self.only is not None else None)
        columns = [s.index for s, _ in stage.layers if not s.head and s.index in self.trained]
        inputs = torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64, device=stage.device) * own
        return status(epoch, stage.sums[:, columns] / inputs, None, 2 * everyone / seconds)
