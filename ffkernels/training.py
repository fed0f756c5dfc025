"""The training loop: minibatches, wrong labels, schedules, progress. What FFNet.fit calls."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks
from .batches import Draws, LoaderBatches, TensorBatches, make_batches
from .loss import Loss
from .negatives import Negatives, UniformLabels
from .nn import FFNet
from .stage import Stage

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


class _LearningRate:
    """Sets the learning rate of whatever optimizes: the layers' and the head's fused optimizers, or torch.optim's."""

    def __init__(
        self,
        net: FFNet,
        lr: float | None,
        schedule: Callable[[float], float] | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.schedule, self.optimizer = schedule, optimizer
        self.first = net.stack[0]
        fused: list[Any] = [] if optimizer is not None else [*net.stack]
        self.fused = fused if net.head is None else [*fused, net.head]
        self.before = [owner.optimizer for owner in self.fused]
        self.groups = [] if optimizer is None else optimizer.param_groups
        self.groups_before = [group["lr"] for group in self.groups]
        own = [float(each.lr) for each in self.before]
        self.base = own if lr is None else [own[i] if owner is net.head else lr for i, owner in enumerate(self.fused)]
        self.group_base = [group_lr if lr is None else lr for group_lr in self.groups_before]
        self.rates: dict[float, Tensor] = {}  # tensors, so that a change costs no recompilation
        if lr is not None or schedule is not None:
            device = self.first.weight.device
            self.rates = {base: torch.zeros((), dtype=torch.float32, device=device) for base in self.base}
            for owner, base in zip(self.fused, self.base, strict=True):
                owner.optimizer = dataclasses.replace(owner.optimizer, lr=self.rates[base])
        self.factor = -1.0

    def set(self, progress: float) -> None:
        factor = 1.0 if self.schedule is None else self.schedule(progress)
        if factor == self.factor:
            return
        checks.number("the schedule's factor", factor, 0.0)
        self.factor = factor
        for base, rate in self.rates.items():
            rate.fill_(base * factor)
        for group, base in zip(self.groups, self.group_base, strict=True):
            group["lr"] = base * factor

    def value(self) -> float:
        return float(self.first.optimizer.lr if self.optimizer is None else self.groups[0]["lr"])

    def restore(self) -> None:
        for owner, optimizer in zip(self.fused, self.before, strict=True):
            owner.optimizer = optimizer
        for group, rate in zip(self.groups, self.groups_before, strict=True):
            group["lr"] = rate


def _check_validation(validation: Any) -> None:
    if validation is None:
        return
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        raise TypeError(f"validation must be (x, labels), got {type(validation).__name__}")
    checks.inputs("validation[0]", validation[0])
    checks.labels("validation[1]", validation[1], validation[0], dims=1)


def error_percent(net: FFNet, x: Tensor, labels: Tensor, *, layers: Sequence[int] | None = None) -> float:
    """Percent of the rows whose predicted label is wrong. x: (B, K) or (B, C, H, W), labels: (B,)."""
    checks.inputs("x", x)
    checks.labels("labels", labels, x, dims=1)
    weight = net.stack[0].weight
    predicted = net.predict(x.to(weight.device, weight.dtype), layers=layers)
    return 100.0 * (predicted.cpu() != labels.cpu()).double().mean().item()


def fit(
    net: FFNet,
    data: Any,
    labels: Tensor | None = None,  # (B,)
    *,
    epochs: int,
    mode: str = "simultaneous",
    batch_size: int = 256,
    seed: int = 0,
    lr: float | None = None,
    schedule: Callable[[float], float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | Sequence[Loss] | None = None,
    negatives: Negatives | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    validate_every: int = 1,
    callbacks: Iterable[Callback] = (),
    history: Sequence[Record] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train on labelled inputs: positives under their label, negatives under a wrong one.

    A net's head is trained beside its layers on the neutral label, and its average is updated after every step.
    All random numbers of an epoch are drawn anew from (seed, epoch) alone: the same seed gives the same bits, and a
    training that stopped goes on from net.state_dict() and the records so far.

    Args:
        data, labels: x (B, K) or (B, C, H, W) with labels (B,); or a DataLoader, any sized iterable, of them.
        epochs: passes over the data; in "greedy" mode for each layer.
        mode: "simultaneous" trains every layer on every minibatch; "greedy" one layer after the other, input first.
        batch_size: inputs a minibatch (twice as many rows), for tensors; a loader has its own.
        seed: of the data's order (tensors only), the negatives, the augmentation and the dropout.
        lr: overrides the layers' learning rate (not the head's).
        schedule: gets the progress in [0, 1) before every step (in "greedy" mode that of the layer in training) and
            gives what the learning rates are multiplied by: a `Schedule`, or any function. None: 1.
        optimizer: any torch.optim optimizer over net.parameters(), instead of the layers' fused ones.
        loss: on the goodness of each layer, one for all or one for each; see `Loss`. None: the logistic loss with the
            layers' threshold and temperature, the only one inside the fused step. Others run layer by layer.
        negatives: gives the negatives' labels, see `Negatives`; None: `UniformLabels()`.
        augment: changes every minibatch before labels are written over it, as `Shift` does.
        validation: (x, labels), for the records' "error". validate_every: epochs from one measurement to the next; the
            last epoch is always measured.
        callbacks: called with (net, records) after every epoch; a true result stops training ("greedy": the layer's).
        history: records of the epochs done already; training goes on after them.
        progress: show a progress bar.

    Returns:
        One record an epoch: "epoch" from 1, "layer" (None unless greedy); lists with an entry a layer (None where not
        trained) "loss", "goodness_positive", "goodness_negative" (means of g over the epoch); with a head "head_loss";
        "lr" (the last one), "rows_per_second", "seconds" of training alone; with ``validation`` "error" in percent
        (None where it was not measured), of the net's average if it has one.

    Raises:
        TypeError, ValueError: a wrong argument, before anything has changed.
    """
    checks.count("epochs", epochs, 1, 2**31, "passes over the data")
    checks.option("mode", mode, MODES)
    checks.count("batch_size", batch_size, 1, 2**31, "inputs a minibatch")
    checks.count("seed", seed, -(2**63), 2**63, "any integer")
    checks.count("validate_every", validate_every, 1, 2**31, "epochs from one measurement to the next")
    if lr is not None:
        checks.number("lr", lr, 0.0)
    for name, function in (("schedule", schedule), ("negatives", negatives), ("augment", augment)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    losses = _losses(loss, len(net))
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim optimizer, got {type(optimizer).__name__}")
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in net.parameters()):
            raise ValueError("optimizer must hold parameters of the net, got one that holds none of them")
    if net.num_classes is None:
        raise ValueError("fit needs a net with num_classes, to write labels over the input; it is None")
    if net.head is not None and mode == "greedy":
        raise ValueError("mode must be 'simultaneous' for a net with a head, which looks at several layers at once")
    _check_validation(validation)
    batches = make_batches(data, labels, batch_size)
    records = list(history or ())
    chosen = UniformLabels() if negatives is None else negatives
    rate = _LearningRate(net, lr, schedule, optimizer)
    run = _Run(net, batches, epochs, seed, rate, augment, validation, validate_every, list(callbacks), progress)
    try:
        for only in [None] if mode == "simultaneous" else range(len(net)):
            run.train(Stage(net, only, optimizer, chosen, losses), records)
    finally:
        rate.restore()
    return records


def _losses(loss: Any, layers: int) -> list[Loss] | None:
    """One for each layer."""
    if loss is None:
        return None
    losses = list(loss) if isinstance(loss, (tuple, list)) else [loss] * layers
    if len(losses) != layers or not all(callable(each) for each in losses):
        raise ValueError(f"loss must be a function, or one for each of the {layers} layers, got {loss!r}")
    return losses


@dataclasses.dataclass
class _Run:
    """What all stages of one fit share."""

    net: FFNet
    batches: TensorBatches | LoaderBatches
    epochs: int
    seed: int
    rate: _LearningRate
    augment: Callable[[Tensor, torch.Generator], Tensor] | None
    validation: tuple[Tensor, Tensor] | None
    validate_every: int
    callbacks: list[Callback]
    progress: bool

    def train(self, stage: Stage, records: list[Record]) -> None:
        """All epochs of one stage that ``records`` does not hold yet; they are added to it."""
        if stage.only is not None and any(r["layer"] is not None and r["layer"] > stage.only for r in records):
            return  # a callback had ended this layer's training before its last epoch
        done = sum(r["layer"] == stage.only for r in records)
        title = "training" if stage.only is None else f"layer {stage.only + 1}/{len(self.net)}"
        total = self.epochs * len(self.batches)
        with tqdm(
            total=total, initial=done * len(self.batches), desc=title, unit="batch", disable=not self.progress
        ) as bar:
            for own_epoch in range(done, self.epochs):
                record = self._epoch(stage, own_epoch, bar)
                if self.validation is not None:
                    due = (own_epoch + 1) % self.validate_every == 0 or own_epoch + 1 == self.epochs
                    record["error"] = self._error(stage) if due else None
                records.append(record)
                stop = [callback(self.net, records) for callback in self.callbacks]  # all are called
                if any(stop):
                    return

    def _epoch(self, stage: Stage, own_epoch: int, bar: tqdm) -> Record:
        net, weight, batches = self.net, stage.layers[0].weight, len(self.batches)
        epoch = (stage.only or 0) * self.epochs + own_epoch + 1
        draws = Draws(self.seed, epoch)
        sums = torch.zeros(3, len(stage.layers), dtype=torch.float64, device=weight.device)
        head_sum = torch.zeros((), dtype=torch.float64, device=weight.device)
        rows, start = 0, time.perf_counter()
        for i, (x, labels) in enumerate(self.batches.epoch(draws)):
            self.rate.set((own_epoch + i / batches) / self.epochs)
            x = x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
            if self.augment is not None:
                x = self.augment(x, draws["augment"])
            found, head_loss = stage.step(x, labels.to(weight.device), draws)
            if net.average is not None:
                net.average.update(net, (epoch - 1) * batches + i + 1)
            sums += len(x) * found
            if head_loss is not None:
                head_sum += len(x) * head_loss
            rows += 2 * len(x)
            if bar.update():  # true when it is time to redraw: only then are values fetched from the device
                bar.set_postfix_str(_status(sums, rows, time.perf_counter() - start, epoch), refresh=False)
        means = (2 * sums / rows).tolist()
        seconds = time.perf_counter() - start
        record: Record = {"epoch": epoch, "layer": stage.only}
        for name, values in zip(("loss", "goodness_positive", "goodness_negative"), means, strict=True):
            by_layer = dict(zip(stage.trained, values, strict=True))
            record[name] = [by_layer.get(layer) for layer in range(len(net))]
        if net.head is not None:
            record["head_loss"] = (2 * head_sum / rows).item()
        record.update(lr=self.rate.value(), rows_per_second=rows / seconds, seconds=seconds)
        return record

    def _error(self, stage: Stage) -> float:
        assert self.validation is not None
        average = self.net.average
        with contextlib.nullcontext() if average is None else average.applied(self.net):
            layers = None if stage.only is None else range(stage.trained.stop)
            return error_percent(self.net, *self.validation, layers=layers)


def _status(sums: Tensor, rows: int, seconds: float, epoch: int) -> str:
    loss, positive, negative = (2 * sums / rows).tolist()

    def show(values: list[float]) -> str:
        return " ".join(f"{v:.3g}" for v in values)

    return f"epoch {epoch}, loss {show(loss)}, g+ {show(positive)}, g- {show(negative)}, {rows / seconds:,.0f} rows/s"
