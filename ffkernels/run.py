"""A training run in a folder: what it was asked for, its metrics, checkpoints and pictures, and how it goes on.

config.json     the arguments, the data's fingerprint, versions, and what the machine could run
metrics.jsonl   fit's records, a line of JSON an epoch
checkpoint-*.pt weights, optimizer state and records after the last two epochs
error.png, goodness.png, result.json            when training has ended
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends, checkpoint, plots, spool
from .batches import epoch_generator
from .config import TrainConfig, from_arguments
from .data import Dataset
from .hybrid import ImageNegatives
from .labels import wrong_labels
from .negatives import DrawnOnce, Negatives
from .nn import FFNet
from .training import Callback, Record, error_percent

FORMAT = 1  # of config.json and of the checkpoints' content


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message names it and says what to do."""


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON; numbers that JSON does not have (nan, inf) become null."""

    def plain(v: Any) -> Any:
        if isinstance(v, dict):
            return {str(key): plain(item) for key, item in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(item) for item in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What config.json says of the data: enough to know them again."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "rows_train": len(dataset.x_train),
        "rows_test": len(dataset.x_test),
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
    }


class RunFolder:
    """A folder that holds one run. Make it with `create` or `open`.

    Attributes:
        path: the folder. config: the run's choices, resolved. data: what config.json says of the data. launch: which
        torchrun has begun it, if one has.
    """

    def __init__(self, path: Path, config: TrainConfig, data: dict[str, Any], launch: str | None = None) -> None:
        self.path, self.config, self.data, self.launch = path, config, data, launch

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig, dataset: Dataset, launch: str | None = None) -> RunFolder:
        """Start a run in a folder that is new or holds no run.

        Raises:
            RunError: the folder holds a run already.
            OSError: it cannot be made or written.
        """
        path = Path(path)
        if path.is_dir() and ((path / "config.json").exists() or checkpoint.checkpoints(path)):
            raise RunError(f"{path} holds a run already: continue it with --resume {path}, or name another folder")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, config.resolved(), describe_data(dataset), launch)
        folder._write_config()
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run that ``path`` holds.

        Raises:
            RunError: there is none, or its config.json cannot be read.
        """
        path = Path(path)
        file = path / "config.json"
        if not file.is_file():
            raise RunError(f"{path} holds no run (it has no config.json)")
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
            if missing := sorted({"name", "fingerprint", "image_shape", "num_classes"} - set(content["data"])):
                raise ValueError(f"its data have no {missing}")
            return cls(path, from_arguments(content["arguments"]), dict(content["data"]), content.get("launch"))
        except KeyError as error:
            raise RunError(f"{file} cannot be used: it has no {error}") from error
        except (ValueError, TypeError) as error:
            raise RunError(f"{file} cannot be used: {error}") from error

    def _write_config(self) -> None:
        from . import __version__

        content = {
            "format": FORMAT,
            "arguments": dataclasses.asdict(self.config),
            "data": self.data,
            "versions": {"ffkernels": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            "machine": backends.info(),
            **({} if self.launch is None else {"launch": self.launch}),
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        checkpoint.write_atomic(self.path / "config.json", to_json(content, indent=2).encode() + b"\n")

    def extend(self, epochs: int) -> None:
        """Let the run go on to ``epochs`` in all, as if it had been asked for them from the start.

        Raises:
            RunError: that would not be the same run: the learning rate or the order of layers follows from the total.
        """
        planned = self.config.epochs or 0
        if epochs == planned:
            return
        c = self.config
        if epochs < planned or c.lr_schedule != "constant" or c.warmup or c.mode != "simultaneous":
            raise RunError(
                f"epochs is {planned} in {self.path}, got {epochs}: a run can only be given more epochs, and only with "
                f"lr_schedule 'constant', no warmup and mode 'simultaneous'; this one has {c.lr_schedule!r}, "
                f"{c.warmup:g} and {c.mode!r}"
            )
        self.config = dataclasses.replace(self.config, epochs=epochs)
        self._write_config()

    def check_data(self, dataset: Dataset) -> None:
        """RunError if ``dataset`` is not what the run was started on."""
        if describe_data(dataset)["fingerprint"] != self.data["fingerprint"]:
            raise RunError(f"the data are not those that {self.path} was started on ({self.data['name']!r})")

    def build_net(self) -> FFNet:
        """The run's net as it was before training."""
        return self.config.build_net(tuple(self.data["image_shape"]), self.data["num_classes"])

    def save_epoch(self, net: FFNet, history: list[Record]) -> None:
        """Write what the last epoch gave. A crash at any moment loses no more than that epoch."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(to_json(history[-1]) + "\n")
        content = {"format": FORMAT, "net": dict(net.state_dict()), "history": history}
        checkpoint.save_numbered(self.path, len(history), content)

    def restore(self, net: FFNet) -> list[Record]:
        """Put the last checkpoint's weights and optimizer state into ``net``, which `build_net` made; write nothing.

        Returns:
            The records so far; [] where no epoch was completed.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
            RunError: the checkpoint is not of this net.
        """
        content = checkpoint.load_latest(self.path)
        if content is None:
            return []
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
            net.load_state_dict(content["net"])
            return list(content["history"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(f"the checkpoint in {self.path} does not fit its config.json: {error}") from error

    def rewind(self, history: list[Record]) -> None:
        """Make metrics.jsonl hold just ``history``: it may be a line ahead of the checkpoint, or cut off."""
        lines = "".join(to_json(record) + "\n" for record in history)
        checkpoint.write_atomic(self.path / "metrics.jsonl", lines.encode())

    def load_net(self) -> FFNet:
        """The run's net after its last epoch; with its averaged weights if it keeps an average.

        Raises:
            RunError: no epoch was completed, or the checkpoint is not of this net. CheckpointError: none can be used.
        """
        net = self.build_net()
        if not self.restore(net):
            raise RunError(f"{self.path} has no checkpoint yet: its training has not completed an epoch")
        if net.average is not None:
            net.average.copy_to(net)
        return net


def split(dataset: Dataset, validation: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x and labels to train on, and the pair on which every epoch's error is measured."""
    if validation == 0:
        return dataset.x_train, dataset.y_train, (dataset.x_test, dataset.y_test)
    left = len(dataset.x_train) - validation
    if left < 1:
        raise ValueError(f"validation must be less than the {len(dataset.x_train)} training rows, got {validation}")
    held_out = (dataset.x_train[left:], dataset.y_train[left:])
    return dataset.x_train[:left], dataset.y_train[:left], held_out


def check_spooled(config: TrainConfig, dataset: Dataset, spool_dir: str | Path) -> None:
    """What `train` would raise for this ``spool_dir``, before there is a folder of the run."""
    if Path(spool_dir).exists() and not Path(spool_dir).is_dir():
        raise NotADirectoryError(f"spool_dir must be a folder, {spool_dir} is a file")
    spool.check(
        config.build_net(dataset.image_shape, dataset.num_classes), config.mode,
        config.build_negatives(dataset.image_shape), loss=config.build_losses(),
        augment=config.build_augment(dataset.image_shape),
        constraint=config.build_constraint(dataset.image_shape, dataset.num_classes),
    )  # fmt: skip


def goodness_pairs(
    net: FFNet, dataset: Dataset, negatives: Negatives | DrawnOnce | ImageNegatives, seed: int
) -> tuple[Tensor, Tensor]:  # (L, B'), (L, B') on the CPU
    """g of every layer for the test rows as positives and as negatives, 1024 rows at a time.

    Positives are images under their own label and negatives under a uniformly drawn wrong one; without labels images
    as they are and what ``negatives`` makes of them.
    """
    weight, draws = net.stack[0].weight, epoch_generator(seed, 0, "picture")
    x, own = dataset.x_test, dataset.y_test
    if isinstance(negatives, ImageNegatives):
        inputs = [x, negatives.images(x, draws)]
        goodness = [[net.goodness(rows.to(weight.device)) for rows in each.split(1024)] for each in inputs]
    else:
        labels = [own, wrong_labels(own, dataset.num_classes, draws)]
        goodness = [
            [
                net.label_goodness(rows.to(weight.device), given[:, None].to(weight.device))[:, :, 0]
                for rows, given in zip(x.split(1024), each.split(1024), strict=True)
            ]
            for each in labels
        ]
    positive, negative = (torch.cat(parts, dim=1).cpu() for parts in goodness)
    return positive, negative


def draw(folder: RunFolder, net: FFNet, dataset: Dataset, history: list[Record]) -> None:
    """Write error.png and goodness.png (test rows). ImportError: matplotlib is not installed."""
    config = folder.config
    sizes = "-".join(str(n) for n in (dataset.x_test.shape[1], *config.hidden))
    title = f"{dataset.name}, {sizes}, {config.mode}, seed {config.seed}"
    measured_on = "validation" if config.validation else "test"
    plots.error_curve(folder.path / "error.png", history, title=title, measured_on=measured_on)
    plots.goodness_histograms(
        folder.path / "goodness.png",
        *goodness_pairs(net, dataset, config.build_negatives(dataset.image_shape), config.seed),
        [config.threshold_of(width) for width in config.hidden],
        title=f"{title}, after epoch {len(history)}",
        unit=f"{config.goodness} of squares",
    )


def train(
    folder: RunFolder,
    dataset: Dataset,
    *,
    progress: bool = True,
    report: Callable[[Record], None] = lambda record: None,
    spool_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Train the folder's run to its end, from its last checkpoint if it has one.

    Args:
        dataset: what the run was started on.
        progress: show a progress bar. report: called with the record of every epoch when that is saved.
        spool_dir: as for `training.fit`.

    Returns:
        What result.json holds: "test_error" and, with held out rows, "validation_error" (percent), "epochs",
        "training_seconds" (training alone, over all sittings), "parameters" (their number).

    Raises:
        RunError, CheckpointError, OSError: the folder cannot be used. ValueError: the config does not fit the data.

    A UserWarning says so where matplotlib is missing and no pictures are drawn.
    """
    config = folder.config
    folder.check_data(dataset)
    dataset = config.prepare(dataset)
    x, y, measured_on = split(dataset, config.validation)
    net = folder.build_net()
    history = folder.restore(net)
    folder.rewind(history)

    def save(net: FFNet, history: list[Record]) -> None:
        folder.save_epoch(net, history)
        report(history[-1])

    callbacks: list[Callback] = [save]
    history = net.fit(
        x, y, epochs=config.epochs, head_epochs=config.head_epochs, mode=config.mode, batch_size=config.batch_size,
        seed=config.seed, schedule=config.build_schedule(), loss=config.build_losses(),
        negatives=config.build_negatives(dataset.image_shape), selection=config.build_selection(),
        augment=config.build_augment(dataset.image_shape),
        constraint=config.build_constraint(dataset.image_shape, dataset.num_classes), validation=measured_on,
        validate_every=config.validate_every, callbacks=callbacks, history=history, progress=progress,
        spool_dir=spool_dir,
    )  # fmt: skip
    if net.average is not None:
        net.average.copy_to(net)
    return finish(folder, net, dataset, history)


def finish(folder: RunFolder, net: FFNet, dataset: Dataset, history: list[Record]) -> dict[str, Any]:
    """Measure the test error of a trained net, write result.json and the pictures; what `train` returns.

    ``dataset``: as `TrainConfig.prepare` gives it.
    """
    result = {
        "test_error": error_percent(net, dataset.x_test, dataset.y_test),
        **({"validation_error": history[-1]["error"]} if folder.config.validation else {}),
        "epochs": len(history),
        "training_seconds": sum(r["seconds"] for r in history),
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    checkpoint.write_atomic(folder.path / "result.json", to_json(result, indent=2).encode() + b"\n")
    try:
        draw(folder, net, dataset, history)
    except ImportError as error:
        warnings.warn(f"no pictures: {error}", stacklevel=2)
    return result
