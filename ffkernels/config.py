"""What a training run is: one dataclass with every choice, from which net, optimizer and schedule are built."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .augment import Affine, Chain, Noise, Shift
from .average import WeightAverage
from .data import Dataset, standardize
from .head import SoftmaxHead
from .hybrid import BLURS, HybridImages, ImageNegatives
from .layer import FFLinear
from .loss import Hinge, Loss, PairSoftplus, SymBa
from .negatives import DrawnOnce, HardLabels, Negatives, PermutedLabels, UniformLabels
from .nn import PREDICT, FFNet
from .optim import SGD, Adam, AdamW, HintonSGD, Optimizer
from .receptive import ReceptiveFields
from .recurrent import RecurrentFFNet, check_dynamics
from .schedule import Schedule
from .selection import HardInputs
from .training import MODES

DATA = ("digits", "mnist")
INIT = ("uniform", "normal")
LOSSES = ("logistic", "symba", "pair", "hinge")
DIRECTIONS = ("maximize", "minimize")
HEADLESS = ("uniform", "permuted")  # wrong labels that no head has a say in
NEGATIVES = (*HEADLESS, "hard", "hybrid")
OPTIMIZERS = ("adam", "adamw", "sgd", "hinton_sgd")
# As a share of each layer's width. Half of it is the goodness (sum of squares) that "normal" initial weights give.
THRESHOLDS = {"width": 1.0, "half-width": 0.5}
SCHEDULES = {"constant": 1.0, "linear": 0.0, "constant-linear": 0.5}  # share of the run after which the rate falls

# What the fields that are None by default become. Chosen on rows held out of the training sets, never on the test sets.
EPOCHS = {"digits": 100, "mnist": 10}
BATCH_SIZE = {"digits": 50, "mnist": 100}
LR = {"adam": 0.003, "adamw": 0.003, "sgd": 0.003, "hinton_sgd": 0.04}
MOMENTUM = 0.9


@dataclass(frozen=True)
class TrainConfig:
    """Every choice of a training run; the command line has a flag for each.

    None means: decided by the data, the optimizer or the machine; `resolved` decides.

    Layers are numbered from 1 here, the first one above the pixels.

    Attributes:
        data: "digits" or "mnist"; data_dir: a folder of idx files instead of a download (see `data.load_mnist`).
        validation: rows held out from the end of the training set; errors are then measured on them instead of on the
            test set. validate_every: epochs from one measurement to the next.
        standardize: mean and deviation, by which all pixels are standardised (`data.standardize`); none: they stay in
            [0, 1]. The label's strength is in the units that result.
        shift: pixels by which every image may be moved each time (`Shift`); 0: none. affine: or by how many degrees it
            may be turned, by which share stretched and by how many pixels moved (`Affine`); none: not at all.
        noise: standard deviation of what is added to every pixel each time (`Noise`), in the units of the net's input.
        hidden: the layers' widths.
        receptive_field: side in pixels of the window of the image that each unit of the first layer sees
            (`ReceptiveFields`); 0: all of it.
        init: initial weights "uniform", as nn.Linear's, or "normal", N(0, 1 / inputs) with biases 0.
        activation, normalize, goodness, temperature: as for `ff_step_`; threshold too, or by each layer's N: "width",
            "half-width".
        direction: whether the positives' goodness is to "maximize" or to "minimize".
        dropout: of each layer's input but the first. peer: strength of peer normalisation; 0: none.
        label_strength: the value written for the label (pixels are in [0, 1], if not standardised).
        loss: "logistic", or without the fused step "symba" and "pair" (with alpha), "pair" and "hinge" (with margin).
        negatives: "uniform", "permuted" (`PermutedLabels`) or "hard": drawn from the head's softmax; or "hybrid":
            mixtures of two images, with which the layers learn without labels (``blurs``: see `hybrid_images`) and the
            head labels what they give.
        negatives_once: the same wrong labels in all epochs (`DrawnOnce`), "uniform" or "permuted" ones.
        selected: share of each minibatch that the layers learn from, drawn by `HardInputs` from what the head makes of
            it; 1: all. selected_floor: its floor.
        head_layers: layers that a softmax head looks at; none: no head. head_lr, head_weight_decay: of its HintonSGD.
            head_epochs: train it for so many epochs after the layers instead of beside them.
        recurrent: every layer also sees the layer above, the last one the label (`RecurrentFFNet`); damping, learned,
            judged: as there.
        predict: by "goodness", "head" or "both"; predict_layers: whose goodness counts, all if none is named;
            candidates: labels whose goodness is measured, chosen by the head, all if None.
        average: largest decay of the average of the weights that is used for prediction; 0: the weights themselves.
        epochs, mode, batch_size, seed: as for `training.fit`; the seed also draws the initial weights.
        optimizer: "adam", "adamw", "sgd" or "hinton_sgd"; lr, weight_decay, momentum (the latter two): its arguments.
        lr_schedule: "constant", "linear" (from lr to 0 over the run) or "constant-linear" (over its second half);
            warmup: share of the run in which the rate first rises from 0.
        precision: as for `ff_step_`; None: "medium" where it multiplies bf16, else torch's setting.
        backend: as for `use_backend`; None: the present setting.
        device: a torch device; None: the first GPU if torch sees one, else the CPU.
        threads: of the CPU; None: as many as torch would use.

    Raises:
        TypeError, ValueError: a value that is not allowed.
    """

    data: str = "digits"
    data_dir: str | None = None
    validation: int = 0
    validate_every: int = 1
    standardize: tuple[float, ...] = ()
    shift: int = 0
    affine: tuple[float, ...] = ()
    noise: float = 0.0
    hidden: tuple[int, ...] = (500, 500)
    receptive_field: int = 0
    recurrent: bool = False
    damping: float = 0.3
    learned: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    judged: tuple[int, ...] = (3, 4, 5)
    init: str = "uniform"
    activation: str = "relu"
    normalize: str = "rms"
    goodness: str = "sum"
    threshold: float | str = "width"
    temperature: float = 10.0
    direction: str = "maximize"
    peer: float = 0.0
    dropout: float = 0.0
    label_strength: float = 1.0
    loss: str = "logistic"
    alpha: float = 1.0
    margin: float = 1.0
    negatives: str = "uniform"
    negatives_once: bool = False
    blurs: int = BLURS
    selected: float = 1.0
    selected_floor: float = 0.1
    head_layers: tuple[int, ...] = ()
    head_lr: float = 0.2
    head_weight_decay: float = 0.003
    head_epochs: int = 0
    predict: str = "goodness"
    predict_layers: tuple[int, ...] = ()
    candidates: int | None = None
    average: float = 0.0
    epochs: int | None = None
    mode: str = "simultaneous"
    batch_size: int | None = None
    optimizer: str = "adam"
    lr: float | None = None
    lr_schedule: str = "linear"
    warmup: float = 0.0
    momentum: float | None = None
    weight_decay: float = 0.0
    precision: str | None = None
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "standardize", "affine", "head_layers", "predict_layers", "learned", "judged"):
            if not isinstance(value := getattr(self, name), Sequence) or isinstance(value, str):
                raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        self._check_data_and_machine()
        self._check_net()
        self._check_training()

    def _check_data_and_machine(self) -> None:
        checks.option("data", self.data, DATA)
        if self.data_dir is not None and self.data == "digits":
            raise ValueError("data_dir is for data 'mnist' (or idx files like it); 'digits' comes with scikit-learn")
        checks.count("validation", self.validation, 0, 2**31, "rows held out of the training set")
        checks.count("validate_every", self.validate_every, 1, 2**31, "epochs from one measurement to the next")
        if len(self.standardize) not in (0, 2):
            raise ValueError(f"standardize must hold a mean and a deviation, or nothing, got {self.standardize}")
        if self.standardize:
            checks.number("standardize[0]", self.standardize[0])
            checks.number("standardize[1]", self.standardize[1], 0.0, above=True)
        checks.count("shift", self.shift, 0, 2**15, "the largest move in pixels")
        if len(self.affine) not in (0, 3):
            raise ValueError(f"affine must hold degrees, a share and pixels, or nothing, got {self.affine}")
        self.build_augment((1, 1, 1))  # checks affine and noise
        if self.shift and self.affine:
            raise ValueError(f"shift must be 0 with affine, which has a move of its own, got {self.shift}")
        if self.precision is not None:
            checks.precision(self.precision)
        if self.backend is not None:
            checks.option("backend", self.backend, ("auto", *backends.BACKENDS))
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"device must be a torch device like 'cpu' or 'cuda', got {self.device!r}") from error

    def _check_net(self) -> None:
        if not self.hidden:
            raise ValueError("hidden must hold at least one layer's width")
        for i, width in enumerate(self.hidden):
            checks.count(f"hidden[{i}]", width, 1, 2**31, "a layer's width")
        for name in ("recurrent", "negatives_once"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_dynamics(self.damping, self.learned, self.judged)
        if self.recurrent:
            usual = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
            for name in ("mode", "loss", "dropout", "receptive_field"):
                if (value := getattr(self, name)) != usual[name]:
                    raise ValueError(f"{name} must be {usual[name]!r} for a recurrent net, got {value!r}")
        checks.count("receptive_field", self.receptive_field, 0, 2**15, "the side of a window in pixels")
        checks.option("init", self.init, INIT)
        checks.option("activation", self.activation, checks.ACTIVATIONS)
        checks.option("normalize", self.normalize, checks.NORMALIZE)
        checks.loss_options(self.threshold_of(1), self.temperature, self.goodness)
        checks.option("direction", self.direction, DIRECTIONS)
        checks.number("peer", self.peer, 0.0)
        checks.dropout(self.dropout)
        checks.number("label_strength", self.label_strength)
        for name in ("head_layers", "predict_layers"):
            for layer in getattr(self, name):
                checks.count(name, layer, 1, len(self.hidden), "layers are numbered from 1")
        if len(set(self.head_layers)) != len(self.head_layers):
            raise ValueError(f"head_layers must name each layer once, got {self.head_layers}")
        checks.option("predict", self.predict, PREDICT)
        if self.candidates is not None:
            checks.count("candidates", self.candidates, 1, 2**31, "labels whose goodness is measured")
        for name, without in (
            ("negatives", HEADLESS),
            ("selected", (1.0,)),
            ("predict", ("goodness",)),
            ("candidates", (None,)),
        ):
            if not self.head_layers and (value := getattr(self, name)) not in without:
                raise ValueError(f"{name} {value!r} needs a softmax head: name the layers it looks at in head_layers")

    def _check_training(self) -> None:
        checks.option("loss", self.loss, LOSSES)
        checks.option("negatives", self.negatives, NEGATIVES)
        if self.negatives_once and self.negatives not in HEADLESS:
            raise ValueError(
                f"negatives_once must be False for negatives {self.negatives!r}, which follow the training"
            )
        self.build_losses()  # checks alpha and margin
        checks.option("mode", self.mode, MODES)
        checks.count("head_epochs", self.head_epochs, 0, 2**31, "epochs that train the head alone")
        HybridImages(blurs=self.blurs)
        if self.negatives == "hybrid" and (self.predict != "head" or not self.head_epochs or self.recurrent):
            raise ValueError(
                "negatives 'hybrid' needs predict 'head', head_epochs and no recurrent net: the layers see no labels"
            )
        checks.share("selected", self.selected)
        checks.number("selected_floor", self.selected_floor, 0.0, above=True)
        beside = self.negatives == "hard" or self.selected < 1 or self.average
        if self.head_epochs and (beside or not self.head_layers):
            raise ValueError(
                "head_epochs must be 0 but for a net with head_layers, without average, without negatives 'hard' and "
                "with all inputs selected"
            )
        if self.head_layers and self.mode == "greedy" and not self.head_epochs:
            raise ValueError("mode must be 'simultaneous' with a head, which looks at several layers at once")
        checks.number("average", self.average, 0.0)
        if self.average >= 1:
            raise ValueError(f"average must be a decay in [0, 1), got {self.average!r}")
        for name in ("epochs", "batch_size", "threads"):
            if (value := getattr(self, name)) is not None:
                checks.count(name, value, 1, 2**31, "at least one")
        checks.count("seed", self.seed, 0, 2**63 - 1, "not negative")
        checks.option("optimizer", self.optimizer, OPTIMIZERS)
        checks.option("lr_schedule", self.lr_schedule, tuple(SCHEDULES))
        Schedule(warmup=self.warmup)
        if self.momentum is not None and self.optimizer not in ("sgd", "hinton_sgd"):
            raise ValueError(f"momentum is for optimizer 'sgd' or 'hinton_sgd', the optimizer is {self.optimizer!r}")
        self.build_optimizer()  # checks lr, momentum and weight_decay
        HintonSGD(lr=self.head_lr, weight_decay=self.head_weight_decay)

    def resolved(self) -> TrainConfig:
        """The same run with nothing left to the machine or to defaults that may change: what a run folder stores."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device is None else self.device
        precision = self.precision
        if precision is None and backends.has_bf16_products(torch.device(device)):
            precision = "medium"  # training shows no harm
        return dataclasses.replace(
            self,
            epochs=EPOCHS[self.data] if self.epochs is None else self.epochs,
            batch_size=BATCH_SIZE[self.data] if self.batch_size is None else self.batch_size,
            lr=LR[self.optimizer] if self.lr is None else self.lr,
            momentum=MOMENTUM if self.momentum is None and "sgd" in self.optimizer else self.momentum,
            precision=checks.precision(precision),
            backend=backends.current_backend() if self.backend is None else self.backend,
            device=device,
            threads=torch.get_num_threads() if self.threads is None else self.threads,
        )

    def threshold_of(self, width: int) -> float:
        """theta of a layer with ``width`` units."""
        if isinstance(self.threshold, str):
            checks.option("threshold", self.threshold, tuple(THRESHOLDS))
            return width * THRESHOLDS[self.threshold]
        return self.threshold

    def prepare(self, dataset: Dataset) -> Dataset:
        """The data as this run's net takes them."""
        x_train, x_test = (self.pixels(x) for x in (dataset.x_train, dataset.x_test))
        return dataclasses.replace(dataset, x_train=x_train, x_test=x_test)

    def pixels(
        self,
        x: Tensor,  # (B, K) in [0, 1]
    ) -> Tensor:  # as x
        """Images as this run's net takes them."""
        return standardize(x, *self.standardize) if self.standardize else x

    def build_optimizer(self) -> Optimizer:
        """The fused optimizer."""
        lr = LR[self.optimizer] if self.lr is None else self.lr
        if self.optimizer in ("sgd", "hinton_sgd"):
            momentum = MOMENTUM if self.momentum is None else self.momentum
            form = SGD if self.optimizer == "sgd" else HintonSGD
            return form(lr=lr, momentum=momentum, weight_decay=self.weight_decay)
        kind = AdamW if self.optimizer == "adamw" else Adam
        return kind(lr=lr, weight_decay=self.weight_decay)

    def build_losses(self) -> list[Loss] | None:
        """What fit takes as ``loss``: None for the fused logistic loss."""
        if self.loss == "hinge":
            return [Hinge(self.margin, self.threshold_of(width)) for width in self.hidden]
        if self.loss == "symba":
            return [SymBa(self.alpha)] * len(self.hidden)
        return [PairSoftplus(self.alpha, self.margin)] * len(self.hidden) if self.loss == "pair" else None

    def build_negatives(self, image_shape: tuple[int, int, int]) -> Negatives | DrawnOnce | ImageNegatives:
        if self.negatives == "hybrid":
            return HybridImages(image_shape, self.blurs)
        kinds: dict[str, type[Negatives]] = {
            "uniform": UniformLabels, "permuted": PermutedLabels, "hard": HardLabels,
        }  # fmt: skip
        labels = kinds[self.negatives]()
        return DrawnOnce(labels) if self.negatives_once else labels

    def build_selection(self) -> HardInputs | None:
        return HardInputs(self.selected, self.selected_floor) if self.selected < 1 else None

    def build_augment(self, image_shape: tuple[int, int, int]) -> Chain | None:
        pieces: list[Shift | Affine | Noise] = []
        if self.shift:
            pieces.append(Shift(self.shift, image_shape, self.pixels(torch.zeros(())).item()))  # black in their units
        if self.affine:
            degrees, scale, pixels = self.affine
            pieces.append(Affine(degrees, scale, pixels, image_shape))
        if self.noise:
            pieces.append(Noise(self.noise))
        return Chain(tuple(pieces)) if pieces else None

    def build_constraint(self, image_shape: tuple[int, int, int], num_classes: int) -> ReceptiveFields | None:
        if not self.receptive_field:
            return None
        labels = 0 if self.negatives == "hybrid" else num_classes
        return ReceptiveFields(self.receptive_field, image_shape, self.hidden[0], num_classes=labels, seed=self.seed)

    def build_schedule(self) -> Schedule:
        return Schedule(warmup=self.warmup, decay_from=SCHEDULES[self.lr_schedule])

    def build_net(self, image_shape: tuple[int, int, int], num_classes: int) -> FFNet:
        """A net for flat images on this run's device. The same seed gives the same weights on every device."""
        inputs = math.prod(image_shape)
        names = ("activation", "normalize", "goodness", "temperature", "precision", "peer")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            above = (*self.hidden[1:], num_classes) if self.recurrent else (0,) * len(self.hidden)
            layers = [
                FFLinear(
                    k + above[i], n, threshold=self.threshold_of(n), optimizer=self.build_optimizer(),
                    dropout=self.dropout if i else 0.0, **options,
                )
                for i, (k, n) in enumerate(itertools.pairwise((inputs, *self.hidden)))
            ]  # fmt: skip
            if self.init == "normal":
                for layer in layers:
                    torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                    if layer.bias is not None:
                        torch.nn.init.zeros_(layer.bias)
        head = None
        if self.head_layers:
            chosen = [layer - 1 for layer in self.head_layers]
            optimizer = HintonSGD(lr=self.head_lr, weight_decay=self.head_weight_decay)
            head = SoftmaxHead(self.hidden, num_classes, layers=chosen, optimizer=optimizer)
        options = {  # of the net
            "num_classes": num_classes, "label_strength": None if self.negatives == "hybrid" else self.label_strength,
            "minimize": self.direction == "minimize", "head": head, "predict_by": self.predict,
            "candidates": self.candidates,
            "predict_layers": [layer - 1 for layer in self.predict_layers] or None,
        }  # fmt: skip
        if self.recurrent:
            dynamics: dict[str, Any] = {"damping": self.damping, "learned": self.learned, "judged": self.judged}
            net: FFNet = RecurrentFFNet(layers, **options, **dynamics)
        else:
            net = FFNet(layers, **options)
        if (constraint := self.build_constraint(image_shape, num_classes)) is not None:
            constraint.begin(net)
        if self.average:
            net.average = WeightAverage(net, decay=self.average)
        try:
            return net.to(self.device or "cpu")
        except AssertionError as error:  # torch's own, where it was built without CUDA
            raise RuntimeError(f"device {self.device!r} cannot be used here: {error}") from error


def from_arguments(arguments: dict[str, Any]) -> TrainConfig:
    """The config that ``dataclasses.asdict`` made ``arguments`` of; ValueError names unknown ones."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"unknown arguments {unknown}; this version knows {sorted(known)}")
    return TrainConfig(**arguments)
