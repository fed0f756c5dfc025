"""The training loop: minibatches, wrong labels, schedules, progress. What FFNet.fit calls."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import checks, ops
from .labels import overlay, wrong_labels
from .loss import logistic_loss
from .nn import FFNet, signs

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
        if not isinstance(history[-1].get(self.monitor), (int, float)):
            raise ValueError(
                f"monitor must be a number in fit's records, which hold {sorted(history[-1])}, got {self.monitor!r}"
            )
        stage = [r[self.monitor] for r in history if r["layer"] == history[-1]["layer"]]
        return len(stage) - 1 - stage.index(min(stage)) >= self.patience


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone: an epoch's draws need no state from the epoch before."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class _TensorBatches:
    """Shuffled minibatches of tensors; the wrong labels are drawn for all rows at once, whatever the batches."""

    def __init__(self, x: Tensor, labels: Tensor, batch_size: int) -> None:
        self.x, self.labels, self.batch_size = x, labels, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def epoch(self, seed: int, epoch: int, num_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        negatives = wrong_labels(self.labels, num_classes, epoch_generator(seed, epoch, "negatives"))
        order = torch.randperm(len(self.x), generator=epoch_generator(seed, epoch, "order")).to(self.x.device)
        for rows in order.split(self.batch_size):
            yield self.x[rows], self.labels[rows], negatives[rows]


class _LoaderBatches:
    """Minibatches of a loader, in its own order."""

    def __init__(self, loader: Iterable[Any], length: int) -> None:
        self.loader, self.length = loader, length

    def __len__(self) -> int:
        return self.length

    def epoch(self, seed: int, epoch: int, num_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = epoch_generator(seed, epoch, "negatives")
        for item in self.loader:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise TypeError(f"the loader must give (x, labels), got {type(item).__name__}")
            x, labels = item
            checks.inputs("x", x)
            checks.labels("labels", labels, x, dims=1)
            yield x, labels, wrong_labels(labels, num_classes, generator)


def _batches(data: Any, labels: Tensor | None, batch_size: int) -> _TensorBatches | _LoaderBatches:
    if isinstance(data, (tuple, list)) and len(data) == 2 and labels is None and isinstance(data[0], Tensor):
        data, labels = data
    if isinstance(data, Tensor):
        if labels is None:
            raise ValueError("labels must be given with a tensor of inputs, got None")
        checks.inputs("data", data)
        checks.labels("labels", labels, data, dims=1)
        if len(data) == 0:
            raise ValueError(f"data must have at least one row, got shape {tuple(data.shape)}")
        return _TensorBatches(data, labels, batch_size)
    if labels is not None:
        raise ValueError("labels must be None with a loader, which gives them itself")
    if not (isinstance(data, Iterable) and isinstance(data, Sized)):
        raise TypeError(
            f"data must be tensors or a loader with a length that gives (x, labels), got {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError("data must give at least one batch, got an empty loader")
    return _LoaderBatches(data, len(data))


class _Stage:
    """What one epoch trains: all layers at once, or one layer on what the frozen ones below it give."""

    def __init__(self, net: FFNet, only: int | None, optimizer: torch.optim.Optimizer | None) -> None:
        self.net, self.only, self.optimizer = net, only, optimizer
        self.trained = range(len(net)) if only is None else range(only, only + 1)
        self.layers = [net.stack[i] for i in self.trained]
        self.below = net[: self.trained.start] if self.trained.start else None
        self.from_input = net[: self.trained.stop]

    def step(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B,)
        negatives: Tensor,  # (B,)
    ) -> Tensor:  # (3, trained layers): loss, mean g of the positives, mean g of the negatives
        if self.below is None and self.optimizer is None:
            g_pos, g_neg, loss = self.from_input.label_step(x, labels, negatives)
            return torch.stack([loss, g_pos.mean(1), g_neg.mean(1)])
        pairs = torch.stack([labels, negatives], 1)
        if self.below is None:
            images = x.repeat_interleave(2, dim=0)
            y = overlay(images, pairs.flatten(), self.net.num_classes or 0, self.net.label_strength).flatten(1)
            sqnorm = None
        else:
            y, totals = self.below.climb_labels(x, pairs)
            sqnorm = totals[-1]
        sign = signs(len(x), len(x), y).view(2, -1).T.flatten()  # the two rows of an input stand together
        if self.optimizer is None:
            g, loss = self._fused(y, sqnorm, sign)
        else:
            g, loss = self._through(self.optimizer, y, sqnorm, sign)
        return torch.stack([loss, g[:, 0::2].mean(1), g[:, 1::2].mean(1)])

    def _fused(self, x: Tensor, sqnorm: Tensor | None, sign: Tensor) -> tuple[Tensor, Tensor]:
        totals, loss = ops.ff_network_step_(x, sign, self.layers, x_sqnorm=sqnorm)
        return totals / self._divisors(totals), loss

    def _divisors(self, totals: Tensor) -> Tensor:  # (trained layers, 1)
        return totals.new_tensor([[layer.divisor] for layer in self.layers])

    @torch.no_grad()
    def _through(
        self, optimizer: torch.optim.Optimizer, x: Tensor, sqnorm: Tensor | None, sign: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A step of a torch.optim optimizer: the gradients are written where it looks for them."""
        optimizer.zero_grad()
        totals, losses = [], []
        for layer in self.layers:
            options = layer.forward_options()
            y, total, p = ops.ff_forward(x, layer.weight, layer.bias, x_sqnorm=sqnorm, return_p=True, **options)
            loss, coef = logistic_loss(
                total, sign, divisor=layer.divisor, threshold=layer.threshold, temperature=layer.temperature
            )
            grad_weight, grad_bias = ops.ff_grad(x, p, coef, layer.weight, layer.bias, x_sqnorm=sqnorm, **options)
            layer.weight.grad = grad_weight
            if layer.bias is not None:
                layer.bias.grad = grad_bias
            totals.append(total)
            losses.append(loss)
            x, sqnorm = y, total
        optimizer.step()
        stacked = torch.stack(totals)
        return stacked / self._divisors(stacked), torch.stack(losses)


class _LearningRate:
    """Sets the learning rate of whatever optimizes: the layers' fused optimizers or one from torch.optim."""

    def __init__(
        self, net: FFNet, lr: float | Callable[[float], float] | None, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.lr, self.optimizer = lr, optimizer
        self.layers = net.stack
        self.before = [layer.optimizer for layer in self.layers]
        self.rates_before = [group["lr"] for group in optimizer.param_groups] if optimizer is not None else []
        self.rate: Tensor | None = None  # shared by the fused optimizers, so that a change costs no recompilation
        if lr is not None and optimizer is None:
            self.rate = torch.zeros((), dtype=torch.float32, device=self.layers[0].weight.device)
            for layer in self.layers:
                layer.optimizer = dataclasses.replace(layer.optimizer, lr=self.rate)

    def set(self, progress: float) -> None:
        if self.lr is None:
            return
        value = self.lr(progress) if callable(self.lr) else self.lr
        checks.number("lr", value, 0.0)
        if self.rate is not None:
            self.rate.fill_(value)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = value

    def value(self) -> float:
        rate = self.layers[0].optimizer.lr if self.optimizer is None else self.optimizer.param_groups[0]["lr"]
        return float(rate)

    def restore(self) -> None:
        for layer, optimizer in zip(self.layers, self.before, strict=True):
            layer.optimizer = optimizer
        if self.lr is not None and self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates_before, strict=True):
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
    lr: float | Callable[[float], float] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    callbacks: Iterable[Callback] = (),
    history: Sequence[Record] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train on labelled inputs: positives under their label, negatives under a uniformly drawn wrong one.

    Order and wrong labels of an epoch are drawn anew from (seed, epoch) alone: the same seed gives the same bits, and
    a training that stopped goes on from net.state_dict() and the records so far.

    Args:
        data, labels: x (B, K) or (B, C, H, W) with labels (B,); or a DataLoader, any sized iterable, of them.
        epochs: passes over the data; in "greedy" mode for each layer.
        mode: "simultaneous" trains every layer on every minibatch; "greedy" one layer after the other, input first.
        batch_size: inputs a minibatch (twice as many rows), for tensors; a loader has its own.
        seed: of the data's order (tensors only) and of the wrong labels.
        lr: overrides the optimizers' learning rate; a function gets the progress in [0, 1) before every step (in
            "greedy" mode that of the layer in training) and gives the rate.
        optimizer: any torch.optim optimizer over net.parameters(), instead of the layers' fused ones.
        validation: (x, labels), for the records' "error".
        callbacks: called with (net, records) after every epoch; a true result stops training ("greedy": the layer's).
        history: records of the epochs done already; training goes on after them.
        progress: show a progress bar.

    Returns:
        One record an epoch: "epoch" from 1, "layer" (None unless greedy); lists with an entry a layer (None where not
        trained) "loss", "goodness_positive", "goodness_negative" (means of g over the epoch); "lr" (the last one),
        "rows_per_second", "seconds" of training alone; with ``validation`` "error" in percent.

    Raises:
        TypeError, ValueError: a wrong argument, before anything has changed.
    """
    checks.count("epochs", epochs, 1, 2**31, "passes over the data")
    checks.option("mode", mode, MODES)
    checks.count("batch_size", batch_size, 1, 2**31, "inputs a minibatch")
    checks.count("seed", seed, -(2**63), 2**63, "any integer")
    if lr is not None and not callable(lr):
        checks.number("lr", lr, 0.0)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim optimizer, got {type(optimizer).__name__}")
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in net.parameters()):
            raise ValueError("optimizer must hold parameters of the net, got one that holds none of them")
    if net.num_classes is None:
        raise ValueError("fit needs a net with num_classes, to write labels over the input; it is None")
    _check_validation(validation)
    batches = _batches(data, labels, batch_size)
    records = list(history or ())
    rate = _LearningRate(net, lr, optimizer)
    try:
        for only in [None] if mode == "simultaneous" else range(len(net)):
            _fit_stage(
                _Stage(net, only, optimizer),
                batches,
                epochs,
                seed,
                rate,
                validation,
                list(callbacks),
                records,
                progress,
            )
    finally:
        rate.restore()
    return records


def _fit_stage(
    stage: _Stage,
    batches: _TensorBatches | _LoaderBatches,
    epochs: int,
    seed: int,
    rate: _LearningRate,
    validation: tuple[Tensor, Tensor] | None,
    callbacks: list[Callback],
    records: list[Record],  # extended
    progress: bool,
) -> None:
    net, weight = stage.net, stage.layers[0].weight
    if stage.only is not None and any(r["layer"] is not None and r["layer"] > stage.only for r in records):
        return  # a callback had ended this layer's training before its last epoch
    done = sum(r["layer"] == stage.only for r in records)
    title = "training" if stage.only is None else f"layer {stage.only + 1}/{len(net)}"
    with tqdm(
        total=epochs * len(batches), initial=done * len(batches), desc=title, unit="batch", disable=not progress
    ) as bar:
        for own_epoch in range(done, epochs):
            epoch = (stage.only or 0) * epochs + own_epoch + 1
            sums = torch.zeros(3, len(stage.layers), dtype=torch.float64, device=weight.device)
            rows, start = 0, time.perf_counter()
            for i, (x, labels, negatives) in enumerate(batches.epoch(seed, epoch, net.num_classes or 0)):
                rate.set((own_epoch + i / len(batches)) / epochs)
                x = x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
                sums += len(x) * stage.step(x, labels.to(weight.device), negatives.to(weight.device))
                rows += 2 * len(x)
                if bar.update():  # true when it is time to redraw: only then are values fetched from the device
                    bar.set_postfix_str(_status(sums, rows, time.perf_counter() - start, epoch), refresh=False)
            means = (2 * sums / rows).tolist()
            seconds = time.perf_counter() - start
            record: Record = {"epoch": epoch, "layer": stage.only}
            for name, values in zip(("loss", "goodness_positive", "goodness_negative"), means, strict=True):
                by_layer = dict(zip(stage.trained, values, strict=True))
                record[name] = [by_layer.get(layer) for layer in range(len(net))]
            record.update(lr=rate.value(), rows_per_second=rows / seconds, seconds=seconds)
            if validation is not None:
                record["error"] = error_percent(net, *validation, layers=range(stage.trained.stop))
            records.append(record)
            stop = [callback(net, records) for callback in callbacks]  # all are called
            if any(stop):
                return


def _status(sums: Tensor, rows: int, seconds: float, epoch: int) -> str:
    loss, positive, negative = (2 * sums / rows).tolist()

    def show(values: list[float]) -> str:
        return " ".join(f"{v:.3g}" for v in values)

    return f"epoch {epoch}, loss {show(loss)}, g+ {show(positive)}, g- {show(negative)}, {rows / seconds:,.0f} rows/s"
