"""What a training run is: one dataclass with every choice, from which net, optimizer and schedule are built."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import backends, checks
from .nn import FFLinear, FFNet
from .optim import SGD, Adam, AdamW, Optimizer
from .training import MODES

DATA = ("digits", "mnist")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "linear")

# What the fields that are None by default become. Chosen on rows held out of the training sets, never on the test sets.
EPOCHS = {"digits": 100, "mnist": 10}
BATCH_SIZE = {"digits": 50, "mnist": 100}
LR = {"adam": 0.003, "adamw": 0.003, "sgd": 0.003}
MOMENTUM = 0.9


@dataclass(frozen=True)
class TrainConfig:
    """Every choice of a training run; the command line has a flag for each.

    None means: decided by the data, the optimizer or the machine; `resolved` decides.

    Attributes:
        data: "digits" or "mnist"; data_dir: a folder of idx files instead of a download (see `data.load_mnist`).
        validation: rows held out from the end of the training set; every epoch's error is then measured on them
            instead of on the test set.
        hidden: the layers' widths.
        activation, normalize, goodness, temperature: as for `ff_step_`; threshold too, or "width": each layer's N.
        label_strength: the value written for the label (pixels are in [0, 1]).
        epochs, mode, batch_size, seed: as for `training.fit`; the seed also draws the initial weights.
        optimizer: "adam", "adamw" or "sgd"; lr, weight_decay, momentum (sgd only): its arguments.
        lr_schedule: "constant", or "linear": from lr to 0 over the run.
        precision: as for `ff_step_`; None: "medium" where the machine has matrix units, else torch's setting.
        backend: as for `use_backend`; None: the present setting.
        device: a torch device; None: the first GPU if torch sees one, else the CPU.
        threads: of the CPU; None: as many as torch would use.

    Raises:
        TypeError, ValueError: a value that is not allowed.
    """

    data: str = "digits"
    data_dir: str | None = None
    validation: int = 0
    hidden: tuple[int, ...] = (500, 500)
    activation: str = "relu"
    normalize: str = "rms"
    goodness: str = "sum"
    threshold: float | str = "width"
    temperature: float = 10.0
    label_strength: float = 1.0
    epochs: int | None = None
    mode: str = "simultaneous"
    batch_size: int | None = None
    optimizer: str = "adam"
    lr: float | None = None
    lr_schedule: str = "linear"
    momentum: float | None = None
    weight_decay: float = 0.0
    precision: str | None = None
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        checks.option("data", self.data, DATA)
        if self.data_dir is not None and self.data == "digits":
            raise ValueError("data_dir is for data 'mnist' (or idx files like it); 'digits' comes with scikit-learn")
        checks.count("validation", self.validation, 0, 2**31, "rows held out of the training set")
        if not self.hidden:
            raise ValueError("hidden must hold at least one layer's width")
        for i, width in enumerate(self.hidden):
            checks.count(f"hidden[{i}]", width, 1, 2**31, "a layer's width")
        checks.option("activation", self.activation, checks.ACTIVATIONS)
        checks.option("normalize", self.normalize, checks.NORMALIZE)
        checks.loss_options(self.threshold_of(1), self.temperature, self.goodness)
        checks.number("label_strength", self.label_strength)
        checks.option("mode", self.mode, MODES)
        for name in ("epochs", "batch_size", "threads"):
            if (value := getattr(self, name)) is not None:
                checks.count(name, value, 1, 2**31, "at least one")
        checks.count("seed", self.seed, 0, 2**63 - 1, "not negative")
        checks.option("optimizer", self.optimizer, OPTIMIZERS)
        checks.option("lr_schedule", self.lr_schedule, SCHEDULES)
        if self.momentum is not None and self.optimizer != "sgd":
            raise ValueError(f"momentum is for optimizer 'sgd', the optimizer is {self.optimizer!r}")
        self.build_optimizer()  # checks lr, momentum and weight_decay
        if self.precision is not None:
            checks.precision(self.precision)
        if self.backend is not None:
            checks.option("backend", self.backend, ("auto", *backends.BACKENDS))
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"device must be a torch device like 'cpu' or 'cuda', got {self.device!r}") from error

    def resolved(self) -> TrainConfig:
        """The same run with nothing left to the machine or to defaults that may change: what a run folder stores."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device is None else self.device
        precision = self.precision
        if precision is None and backends.has_matrix_units(torch.device(device)):
            precision = "medium"  # training shows no harm
        return dataclasses.replace(
            self,
            epochs=EPOCHS[self.data] if self.epochs is None else self.epochs,
            batch_size=BATCH_SIZE[self.data] if self.batch_size is None else self.batch_size,
            lr=LR[self.optimizer] if self.lr is None else self.lr,
            momentum=MOMENTUM if self.momentum is None and self.optimizer == "sgd" else self.momentum,
            precision=checks.precision(precision),
            backend=backends.current_backend() if self.backend is None else self.backend,
            device=device,
            threads=torch.get_num_threads() if self.threads is None else self.threads,
        )

    def threshold_of(self, width: int) -> float:
        """theta of a layer with ``width`` units."""
        if isinstance(self.threshold, str):
            checks.option("threshold", self.threshold, ("width",))
            return float(width)
        return self.threshold

    def build_optimizer(self) -> Optimizer:
        """The fused optimizer."""
        lr = LR[self.optimizer] if self.lr is None else self.lr
        if self.optimizer == "sgd":
            momentum = MOMENTUM if self.momentum is None else self.momentum
            return SGD(lr=lr, momentum=momentum, weight_decay=self.weight_decay)
        kind = AdamW if self.optimizer == "adamw" else Adam
        return kind(lr=lr, weight_decay=self.weight_decay)

    def build_net(self, inputs: int, num_classes: int) -> FFNet:
        """A net for ``inputs`` pixels on this run's device. The same seed gives the same weights on every device."""
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("activation", "normalize", "goodness", "temperature", "precision")
        }
        sizes = (inputs, *self.hidden)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers = [
                FFLinear(k, n, threshold=self.threshold_of(n), optimizer=self.build_optimizer(), **options)
                for k, n in itertools.pairwise(sizes)
            ]
        net = FFNet(layers, num_classes=num_classes, label_strength=self.label_strength)
        return net.to(self.device or "cpu")

    def learning_rate(self) -> Callable[[float], float] | None:
        """What fit takes as ``lr``: None leaves the optimizer's."""
        top = LR[self.optimizer] if self.lr is None else self.lr
        return (lambda progress: top * (1 - progress)) if self.lr_schedule == "linear" else None


def from_arguments(arguments: dict[str, Any]) -> TrainConfig:
    """The config that ``dataclasses.asdict`` made ``arguments`` of; ValueError names unknown ones."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"unknown arguments {unknown}; this version knows {sorted(known)}")
    return TrainConfig(**arguments)
