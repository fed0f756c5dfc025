"""Presets: training runs with a name, each a TrainConfig with defaults of its own.

``python -m ffkernels train --preset NAME`` runs one, any flag overrides its field, and ``--list-presets`` shows them
all. A new preset is a subclass of TrainConfig with a docstring, and an entry in PRESETS.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from .config import TrainConfig


@dataclass(frozen=True)
class Usual(TrainConfig):
    """The widely copied program: 784-500-500, one layer after the other, Adam .03, the whole training set as one batch.

    github.com/mpezeshki/pytorch_forward_forward, main.py: pixels standardised, the label written as the largest of
    them, its negatives' labels drawn once, mean of squares against a threshold of 2, inputs of length 1; 1,000 steps a
    layer on the first 50,000 images.
    """

    data: str = "mnist"
    validation: int = 10_000
    validate_every: int = 50
    standardize: tuple[float, ...] = (0.1307, 0.3081)
    label_strength: float = 2.8215
    negatives: str = "permuted"
    negatives_once: bool = True
    normalize: str = "l2"
    goodness: str = "mean"
    threshold: float | str = 2.0
    temperature: float = 1.0
    epochs: int | None = 1000
    mode: str = "greedy"
    batch_size: int | None = 50_000
    lr: float | None = 0.03
    lr_schedule: str = "constant"


@dataclass(frozen=True)
class Hinton(TrainConfig):
    """Hinton's supervised network (2022, section 3.3): label in the image, hard negatives, peer normalisation.

    784-1000-1000 on standardised pixels with noise, a softmax on both layers, which are trained at once and learn from
    the hardest of the images; the label is written as twice the largest pixel. Each unit of the first layer sees a
    window of 10 x 10 pixels, as in his section 3.2. He reports 1.36 % after 60 epochs with four layers of 2,000 that
    see all pixels.
    """

    data: str = "mnist"
    standardize: tuple[float, ...] = (0.1307, 0.3081)
    noise: float = 0.5
    hidden: tuple[int, ...] = (1000, 1000)
    receptive_field: int = 10
    init: str = "normal"
    threshold: float | str = "half-width"
    temperature: float = 30.0
    label_strength: float = 5.643
    peer: float = 0.03
    negatives: str = "hard"
    selected: float = 0.4
    selected_floor: float = 0.2
    head_layers: tuple[int, ...] = (1, 2)
    head_weight_decay: float = 0.001
    predict: str = "both"
    predict_layers: tuple[int, ...] = (2,)
    average: float = 0.995
    epochs: int | None = 28
    validate_every: int = 5
    batch_size: int | None = 250
    optimizer: str = "hinton_sgd"
    lr: float | None = 0.04
    weight_decay: float = 0.015
    warmup: float = 0.1


@dataclass(frozen=True)
class HintonJitter(Hinton):
    """`hinton` on images that are moved by up to one pixel, turned by up to 15 degrees, stretched by up to 15 %.

    Hinton reports 0.64 % after 500 epochs with moves alone, of up to two pixels.
    """

    affine: tuple[float, ...] = (15.0, 0.15, 1.0)
    noise: float = 0.0
    selected_floor: float = 0.1
    weight_decay: float = 0.006
    epochs: int | None = 135
    validate_every: int = 10


@dataclass(frozen=True)
class Unsupervised(TrainConfig):
    """Hinton's unsupervised network (2022, section 3.2): hybrid images as negatives, then a softmax on frozen layers.

    784-1000-1000-1000; the softmax sees all layers. He reports 1.37 % after 100 epochs with four layers of 2,000, of
    which the softmax sees the last three.
    """

    data: str = "mnist"
    hidden: tuple[int, ...] = (1000, 1000, 1000)
    init: str = "normal"
    threshold: float | str = "half-width"
    temperature: float = 20.0
    peer: float = 0.03
    negatives: str = "hybrid"
    head_layers: tuple[int, ...] = (1, 2, 3)
    head_lr: float = 0.3
    head_weight_decay: float = 0.001
    head_epochs: int = 12
    predict: str = "head"
    epochs: int | None = 15
    batch_size: int | None = 125
    optimizer: str = "hinton_sgd"
    lr: float | None = 0.01
    weight_decay: float = 0.004
    warmup: float = 0.1


@dataclass(frozen=True)
class Recurrent(TrainConfig):
    """Hinton's network with top-down connections (2022, section 3.4): the label above, the image below, 5 iterations.

    784-500-500, hard negatives from a softmax on the pass upwards; learns from iterations 3 and 4. He reports 1.31 %
    after 60 epochs with layers of 2,000.
    """

    data: str = "mnist"
    recurrent: bool = True
    learned: tuple[int, ...] = (3, 4)
    init: str = "normal"
    label_strength: float = 3.0
    negatives: str = "hard"
    head_layers: tuple[int, ...] = (1, 2)
    epochs: int | None = 15
    validate_every: int = 5
    batch_size: int | None = 125
    lr: float | None = 0.002
    warmup: float = 0.1


PRESETS: dict[str, type[TrainConfig]] = {
    "usual": Usual, "hinton": Hinton, "hinton-jitter": HintonJitter, "unsupervised": Unsupervised,
    "recurrent": Recurrent,
}  # fmt: skip


def differences(preset: type[TrainConfig]) -> dict[str, Any]:
    """The fields in which a preset differs from TrainConfig, with its values."""
    usual = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    return {f.name: f.default for f in dataclasses.fields(preset) if f.default != usual[f.name]}


def describe() -> str:
    """What --list-presets prints: each preset's docstring, and its fields as the flags that would set them."""
    parts = []
    for name, preset in PRESETS.items():
        flags = [_flag(field, value) for field, value in differences(preset).items()]
        whole = " ".join(flag.replace(" ", "\0") for flag in flags)  # a line ends after a flag's values
        wrapped = [line.replace("\0", " ") for line in textwrap.wrap(whole, 96, break_on_hyphens=False)]
        parts.append("\n  ".join([name, *filter(None, (inspect.getdoc(preset) or "").splitlines()), *wrapped]))
    return "\n\n".join(parts)


def _flag(field: str, value: Any) -> str:
    name = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
