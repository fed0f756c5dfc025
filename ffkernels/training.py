"""The training loop: minibatches, wrong labels, schedules, progress. What FFNet.fit calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .batches import Draws, LoaderBatches, TensorBatches, beside, make_batches
from .hybrid import ImageNegatives
from .learning_rate import LearningRate
from .loss import Loss
from .negatives import DrawnOnce, Negatives, UniformLabels
from .nn import FFNet, NetStep
from .selection import Selection
from .stage import HeadStage, Stage

Record = dict[str, Any]
Callback = Callable[[FFNet, list[Record]], object]
MODES = ("simultaneous", "greedy")


class EarlyStopping:
    """A callback that stops training once ``monitor`` has not fallen for ``patience`` epochs.

    Args:
        patience: epochs >= 1 without a new minimum.
        monitor: a number in fit's records, "error" (percent on the validation data) by default.
    """

    def __init__(self, patience: int, monitor: str = "error") -> None:
        checks.count("patience", patience, 1, 2**31, "epochs without a new minimum")
        self.patience, self.monitor = patience, monitor

    def __call__(self, net: FFNet, history: list[Record]) -> bool:
        last = history[-1].get(self.monitor, "")
        if last is None:  # not measured after this epoch
            return False
        if not isinstance(last, (int, float)):
            raise ValueError(
                f"monitor must be a number in fit's records, which hold {sorted(history[-1])}, got {self.monitor!r}"
            )
        stage = [r[self.monitor] for r in history if r["layer"] == history[-1]["layer"]]
        stage = [value for value in stage if value is not None]
        return len(stage) - 1 - stage.index(min(stage)) >= self.patience


def check_validation(net: FFNet, validation: Any) -> None:
    if validation is None:
        return
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(f"validation must be (x, labels), got {type(validation).__name__}")
    x, labels = validation
    checks.inputs("validation[0]", x)
    checks.labels("validation[1]", labels, x, dims=1)
    if not x.is_floating_point():
        raise TypeError(f"validation[0] must hold floats, as the net's input does, got {x.dtype}")
    check_rows(net, x, labels, ("validation[0]", "validation[1]"))


def check_rows(net: FFNet, x: Tensor, labels: Tensor, names: tuple[str, str] = ("data", "labels")) -> None:
    """ValueError unless the inputs are of the net's size and the labels of its classes."""
    inputs = getattr(net, "inputs", net.stack[0].in_features)
    if len(x) == 0 or x[0].numel() != inputs:
        raise ValueError(f"{names[0]} must have at least one row, each of {inputs} inputs, got {tuple(x.shape)}")
    assert net.num_classes is not None
    checks.label_values(names[1], labels, net.num_classes)


def check_history(history: Any, mode: str, layers: int, head_epochs: int) -> list[Record]:
    """The records as a list; ValueError if they are of another kind of training, which this one cannot go on with."""
    records = list(history or ())
    stages = [*([None] if mode == "simultaneous" else range(layers)), *([layers] if head_epochs else [])]
    for i, record in enumerate(records):
        if not isinstance(record, dict) or record.get("layer", "") not in stages:
            given = f'of "layer" {record["layer"]}' if isinstance(record, dict) and "layer" in record else f"{record!r}"
            raise ValueError(
                f'history must hold the records of a fit in mode {mode!r}, whose "layer" is in {stages}; '
                f"history[{i}] is {given}"
            )
    return records


def counted(net: FFNet, stop: int) -> list[int]:
    """Whose goodness counts when the layers below ``stop`` are trained: those of the net's choice, or all of them."""
    chosen = range(len(net)) if net.predict_layers is None else [i % len(net) for i in net.predict_layers]
    return [i for i in range(stop) if i in chosen] or list(range(stop))


def error_percent(net: FFNet, x: Tensor, labels: Tensor, *, layers: Sequence[int] | None = None) -> float:
    """Percent of the rows whose predicted label is wrong.

    Args:
        x: (B, K) or (B, C, H, W), of floats of any type, on any device. labels: (B,), integers in [0, num_classes).
        layers: as for `FFNet.predict`.

    Raises:
        TypeError, ValueError: another type or shape; no rows, of which there is no error.
    """
    checks.inputs("x", x)
    checks.labels("labels", labels, x, dims=1)
    if len(x) == 0:
        raise ValueError(f"x must have at least one row (the error is a mean over rows), got {tuple(x.shape)}")
    if net.num_classes is not None:
        checks.label_values("labels", labels, net.num_classes)
    weight = net.stack[0].weight
    predicted = net.predict(beside(x, weight), layers=layers)
    return 100.0 * (predicted.cpu() != labels.cpu()).double().mean().item()


def fit(
    net: FFNet,
    data: Any,
    labels: Tensor | None = None,  # (B,)
    *,
    epochs: int,
    head_epochs: int = 0,
    mode: str = "simultaneous",
    batch_size: int = 256,
    seed: int = 0,
    lr: float | None = None,
    schedule: Callable[[float], float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | Sequence[Loss] | None = None,
    negatives: Negatives | DrawnOnce | ImageNegatives | None = None,
    selection: Selection | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    constraint: Callable[[FFNet], object] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    validate_every: int = 1,
    callbacks: Iterable[Callback] = (),
    history: Sequence[Record] | None = None,
    progress: bool = True,
    spool_dir: str | Path | None = None,
    device: torch.device | str | None = None,
) -> list[Record]:
    """Train on labelled inputs: positives under their label, negatives under a wrong one.

    A net's head is trained beside its layers on the neutral label, and its average is updated after every step. Where
    the negatives are images (`HybridImages`), the layers never see a label: they learn from the images as they are.
    All random numbers of an epoch are drawn anew from (seed, epoch) alone: the same seed gives the same bits, and a
    training that stopped goes on from net.state_dict() and the records so far.

    Args:
        data, labels: x (B, K) or (B, C, H, W) with labels (B,); or a DataLoader, any sized iterable, of them.
        epochs: passes over the data; in "greedy" mode for each layer.
        head_epochs: train the net's head alone for so many more passes after that, on frozen layers, instead of beside
            them. The head of a net without labels in its input (``label_strength`` None) needs them.
        mode: "simultaneous" trains every layer on every minibatch; "greedy" one layer after the other, input first.
        batch_size: inputs a minibatch (twice as many rows), for tensors; a loader has its own.
        seed: of the data's order (tensors only), the negatives, the augmentation and the dropout.
        lr: overrides the layers' learning rate (not the head's).
        schedule: gets the progress in [0, 1) before every step (in "greedy" mode that of the layer in training) and
            gives what the learning rates are multiplied by: a `Schedule`, or any function. None: 1.
        optimizer: any torch.optim optimizer over net.parameters(), instead of the layers' fused ones.
        loss: on the goodness of each layer, one for all or one for each; see `Loss`. None: the logistic loss with the
            layers' threshold and temperature, the only one inside the fused step. Others run layer by layer.
        negatives: gives the negatives' labels, see `Negatives`; None: `UniformLabels()`. `DrawnOnce`: the same labels
            in all epochs (tensors only). Or gives the negatives themselves, see `ImageNegatives`.
        selection: chooses the inputs of each minibatch that the layers learn from, by what the head makes of them, see
            `Selection`; the head learns from all. None: all. The records' means are then those of the inputs chosen.
        augment: gives a new tensor for every minibatch before labels are written over it, as `Shift` does.
        constraint: called with the net after every step, to put the weights back where they must lie, as
            `ReceptiveFields` does. The initial weights are the caller's to see to.
        validation: (x, labels), for the records' "error". validate_every: epochs from one measurement to the next; the
            last epoch is always measured.
        callbacks: called with (net, records) after every epoch; a true result stops training ("greedy": the layer's).
        history: records of the epochs done already; training goes on after them.
        progress: show a progress bar.
        spool_dir: a folder for the activations, in mode "greedy" and with tensors: memory then holds one layer at a
            time, whatever the depth and the rows (see `ffkernels.spool`). Layers made on device "meta" get their memory
            when their turn comes and their weights are mapped from files in this folder afterwards, which stay; all
            else is removed at the end. A training that was stopped goes on with its files.
        device: with spool_dir: where the layer in training is; None: where it is already ("meta": the CPU).

    Returns:
        One record an epoch: "epoch" from 1, "layer" (None unless greedy; the number of layers where the head is trained
        alone); lists with an entry a layer (None where not
        trained) "loss", "goodness_positive", "goodness_negative" (means of g over the epoch); with a head "head_loss";
        "lr" (the last one), "rows_per_second", "seconds" of training alone; with ``validation`` "error" in percent
        (None where it was not measured: with ``head_epochs`` it is the head's), of the net's average if it has one.

    A UserWarning says so where a loss is not finite any more.

    Raises:
        TypeError, ValueError: a wrong argument, before anything has changed. What a loader gives and what functions of
            one's own return is seen only when it comes. An error then, or one of theirs, leaves the weights as the last
            complete update of each left them, and learning rates as they were before.
    """
    checks.count("epochs", epochs, 1, 2**31, "passes over the data")
    checks.option("mode", mode, MODES)
    checks.count("batch_size", batch_size, 1, 2**31, "inputs a minibatch")
    checks.count("seed", seed, -(2**63), 2**63, "any integer")
    checks.count("validate_every", validate_every, 1, 2**31, "epochs from one measurement to the next")
    if lr is not None:
        checks.number("lr", lr, 0.0)
    from_images = isinstance(negatives, ImageNegatives)
    for name, function in (
        ("schedule", schedule),
        ("negatives", negatives),
        ("selection", selection),
        ("augment", augment),
        ("constraint", constraint),
    ):
        if name == "negatives" and (from_images or isinstance(negatives, DrawnOnce)):
            continue
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    calls = list(callbacks)
    for i, callback in enumerate(calls):
        if not callable(callback):
            raise TypeError(f"callbacks[{i}] must be a function, got {type(callback).__name__}")
    losses = _losses(loss, len(net))
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim optimizer, got {type(optimizer).__name__}")
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for layer in net.stack for p in layer.parameters()):
            raise ValueError("optimizer must hold parameters of the net's layers, got one that holds none of them")
    if net.num_classes is None:
        raise ValueError("fit needs a net with num_classes, to write labels over the input; it is None")
    _check_head(net, epochs, head_epochs, mode, from_images)
    if net.label_strength is not None and net.stack[0].dropout:
        raise ValueError(
            "dropout must be 0 in the first layer of a net whose input holds the label, which would be dropped, got "
            f"{net.stack[0].dropout}"
        )
    if (losses is not None or optimizer is not None) and not net.layered:
        raise ValueError(f"loss and optimizer must be None for a {type(net).__name__}, which has its own step")
    if from_images and not net.layered:
        raise ValueError(f"negatives must be labels for a {type(net).__name__}, got {type(negatives).__name__}")
    if selection is not None and (net.head is None or head_epochs):
        raise ValueError("selection must be None but for a net with a head that is trained beside the layers")
    check_validation(net, validation)
    if net.average is not None:
        net.average.check_fits(net)
    records = check_history(history, mode, len(net), head_epochs)
    if device is not None and spool_dir is None:
        raise ValueError("device is for spool_dir; without one, move the net: net.to(device)")
    batches = make_batches(data, labels, batch_size)
    if isinstance(batches, TensorBatches):
        check_rows(net, batches.x, batches.labels)
    chosen = UniformLabels() if negatives is None else negatives
    if isinstance(chosen, DrawnOnce):
        if not isinstance(batches, TensorBatches):
            raise TypeError(f"data must be tensors for negatives drawn once, got {type(data).__name__}")
        batches.wrong = chosen.draw(batches.labels, net.num_classes, seed)
        chosen = chosen.negatives
    if spool_dir is not None:
        from . import spool  # which imports this module

        spool.check(net, mode, chosen, loss=loss, augment=augment, constraint=constraint, optimizer=optimizer)
        assert not isinstance(chosen, ImageNegatives)  # it has seen to it
        if not isinstance(batches, TensorBatches):
            raise TypeError(f"data must be tensors with spool_dir, got {type(data).__name__}")
        spool.fit(
            net, batches, spool_dir, records, epochs=epochs, seed=seed, lr=lr, schedule=schedule, negatives=chosen,
            validation=validation, validate_every=validate_every, callbacks=calls, progress=progress,
            device=device,
        )  # fmt: skip
        return records
    rate = LearningRate(net.stack, net.head, lr, schedule, optimizer)
    beside = net.head is not None and not head_epochs
    by_head = net.predict_by != "goodness" or net.candidates is not None
    stages: list[Stage | HeadStage] = [
        Stage(
            net,
            only,
            optimizer,
            chosen,
            losses,
            epochs=epochs,
            with_head=beside,
            measured=beside or not by_head,
            selection=selection,
        )
        for only in ([None] if mode == "simultaneous" else range(len(net)))
    ]
    if head_epochs:
        stages.append(HeadStage(net, head_epochs, first_epoch=len(stages) * epochs + 1))
    run = Run(net, batches, seed, rate, augment, constraint, validation, validate_every, calls, progress)
    try:
        for stage in stages:
            run.train(stage, records)
    finally:
        rate.restore()
    return records


def _check_head(net: FFNet, epochs: int, head_epochs: int, mode: str, from_images: bool) -> None:
    checks.count("head_epochs", head_epochs, 0, 2**31, "passes that train the head alone")
    if net.head is not None and mode == "greedy" and not head_epochs:
        raise ValueError("mode must be 'simultaneous' for a net with a head, which looks at several layers at once")
    if head_epochs and (net.head is None or net.average is not None):
        given = "one without a head" if net.head is None else "one with an average, which would mix the two trainings"
        raise ValueError(f"head_epochs must be 0 but for a net with a head and no average, got {given}")
    if (net.label_strength is None) != from_images:
        raise ValueError(
            f"negatives must be images (HybridImages) for a net with label_strength None, and only for such a net; its "
            f"label_strength is {net.label_strength}"
        )


def _losses(loss: Any, layers: int) -> list[Loss] | None:
    """One for each layer."""
    if loss is None:
        return None
    losses = list(loss) if isinstance(loss, (tuple, list)) else [loss] * layers
    if len(losses) != layers or not all(callable(each) for each in losses):
        raise ValueError(f"loss must be a function, or one for each of the {layers} layers, got {loss!r}")
    return losses


@dataclasses.dataclass
class Run:
    """What all stages of one fit share."""

    net: FFNet
    batches: TensorBatches | LoaderBatches
    seed: int
    rate: LearningRate
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    constraint: Callable[[FFNet], object] | None
    validation: tuple[Tensor, Tensor] | None
    validate_every: int
    callbacks: list[Callback]
    progress: bool
    warned: bool = False

    def train(self, stage: Stage | HeadStage, records: list[Record]) -> None:
        """All epochs of one stage that ``records`` does not hold yet; they are added to it."""
        place = -1 if stage.only is None else stage.only
        if any(r["layer"] is not None and r["layer"] > place for r in records):
            return  # a callback had ended this stage before its last epoch
        done = sum(r["layer"] == stage.only for r in records)
        names = {None: "training", len(self.net): "head"}
        title = names.get(stage.only, f"layer {(stage.only or 0) + 1}/{len(self.net)}")
        total = stage.epochs * len(self.batches)
        with tqdm(
            total=total, initial=done * len(self.batches), desc=title, unit="batch", disable=not self.progress
        ) as bar:
            for own_epoch in range(done, stage.epochs):
                record = self._epoch(stage, own_epoch, bar)
                self._warn(record)
                if self.validation is not None:
                    due = (own_epoch + 1) % self.validate_every == 0 or own_epoch + 1 == stage.epochs
                    record["error"] = self._error(stage) if due and stage.measured else None
                records.append(record)
                stop = [callback(self.net, records) for callback in self.callbacks]  # all are called
                if any(stop):
                    return

    def _warn(self, record: Record) -> None:
        """Once, where training has gone astray: weights that are not finite stay so."""
        losses = [loss for loss in (*record["loss"], record.get("head_loss")) if loss is not None]
        if not self.warned and not all(map(math.isfinite, losses)):
            self.warned = True
            warnings.warn(
                f"a loss is not finite after epoch {record['epoch']} ({', '.join(f'{loss:g}' for loss in losses)}): "
                "the learning rate may be too large, or the data may hold numbers that are not finite",
                stacklevel=5,  # where net.fit was called
            )

    def _epoch(self, stage: Stage | HeadStage, own_epoch: int, bar: tqdm) -> Record:
        net, weight, batches = self.net, self.net.stack[0].weight, len(self.batches)
        epoch = stage.first_epoch + own_epoch
        draws = Draws(self.seed, epoch)
        sums = Sums(len(stage.trained), stage.with_head, weight.device)
        start = time.perf_counter()
        for i, (x, labels, wrong) in enumerate(self.batches.epoch(draws)):
            done = own_epoch + min(i, batches - 1) / batches  # a loader may give more than its length says
            self.rate.set(done / stage.epochs)
            x = beside(x, weight)
            if self.augment is not None:
                x = self.augment(x, draws["augment"])
            fixed = None if wrong is None else wrong.to(weight.device)
            found, head_loss = stage.step(x, labels.to(weight.device), draws, fixed)
            if self.constraint is not None:
                self.constraint(net)
            if net.average is not None:
                net.average.update(net, (epoch - 1) * batches + i + 1)
            sums.add(len(x), found, head_loss)
            if bar.update():  # true when it is time to redraw: only then are values fetched from the device
                means, head_mean = sums.means()
                rate = stage.copies * sums.inputs / (time.perf_counter() - start)
                bar.set_postfix_str(status(epoch, means, head_mean, rate), refresh=False)
        means, head_mean = sums.means()
        seconds = time.perf_counter() - start
        record: Record = {"epoch": epoch, "layer": stage.only}
        for name, values in zip(("loss", "goodness_positive", "goodness_negative"), means.tolist(), strict=True):
            by_layer = dict(zip(stage.trained, values, strict=True))
            record[name] = [by_layer.get(layer) for layer in range(len(net))]
        if head_mean is not None:
            record["head_loss"] = head_mean.item()
        record.update(lr=self.rate.value(), rows_per_second=stage.copies * sums.inputs / seconds, seconds=seconds)
        return record

    def _error(self, stage: Stage | HeadStage) -> float:
        assert self.validation is not None
        average = self.net.average
        with contextlib.nullcontext() if average is None else average.applied(self.net):
            whole = stage.only is None or stage.only == len(self.net)
            layers = None if whole else counted(self.net, stage.trained.stop)
            return error_percent(self.net, *self.validation, layers=layers)


class Sums:
    """An epoch's means. Steps are added up many at once: each for itself, that would cost more than it adds up."""

    AT_ONCE = 64

    def __init__(self, layers: int, with_head: bool, device: torch.device) -> None:
        self.inputs = self.chosen = 0  # seen, and learned from
        self.sums = torch.zeros(3, layers, dtype=torch.float64, device=device)  # loss, g of positives, g of negatives
        self.head = torch.zeros((), dtype=torch.float64, device=device) if with_head else None
        self.steps: list[tuple[int, NetStep, Tensor | None]] = []

    def add(self, inputs: int, step: NetStep, head_loss: Tensor | None) -> None:
        self.inputs += inputs
        self.chosen += step.goodness_pos.shape[1]
        self.steps.append((inputs, step, head_loss))
        if len(self.steps) == self.AT_ONCE:
            self.sums, self.head = self._added_up()
            self.steps = []

    def _added_up(self) -> tuple[Tensor, Tensor | None]:  # (3, layers), ()
        """The sums with the steps that are not in them yet, which stay as they are: their order is the same always."""
        if not self.steps:
            return self.sums, self.head
        inputs, steps, head_losses = zip(*self.steps, strict=True)
        chosen = self.sums.new_tensor([step.goodness_pos.shape[1] for step in steps])
        own = [
            chosen @ torch.stack([step.loss for step in steps]).double(),
            torch.cat([step.goodness_pos for step in steps], 1).sum(1, dtype=torch.float64),
            torch.cat([step.goodness_neg for step in steps], 1).sum(1, dtype=torch.float64),
        ]
        head = self.head
        if head is not None:
            head = head + self.sums.new_tensor(inputs) @ torch.stack(head_losses).double()
        return self.sums + torch.stack(own), head

    def means(self) -> tuple[Tensor, Tensor | None]:  # (3, layers), ()
        sums, head = self._added_up()
        return sums / self.chosen, None if head is None else head / self.inputs


def status(epoch: int, means: Tensor, head_loss: Tensor | None, rows_per_second: float) -> str:
    parts = [f"epoch {epoch}"]
    if means.numel():
        parts += [
            f"{name} {' '.join(f'{v:.3g}' for v in values)}"
            for name, values in zip(("loss", "g+", "g-"), means.tolist(), strict=True)
        ]
    if head_loss is not None:
        parts.append(f"head {head_loss.item():.3g}")
    return ", ".join([*parts, f"{rows_per_second:,.0f} rows/s"])
