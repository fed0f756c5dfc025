"""Negative labels: what the negative rows carry instead of their image's own label.

A function of one's own does as well: whatever takes `Negatives`' arguments and returns labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .batches import epoch_generator
from .head_step import draw_other_labels
from .labels import wrong_labels


class Negatives(Protocol):
    """Gives each row of a minibatch the label of its negative."""

    def __call__(
        self,
        labels: Tensor,  # (B,): the true ones
        num_classes: int,
        generator: torch.Generator,  # on the CPU; its draws make the training repeatable
        logits: Tensor | None,  # (B, C): the net's softmax head on these images, where it has one
    ) -> Tensor:  # (B,)
        ...


@dataclass(frozen=True)
class UniformLabels:
    """One of the other labels, each as likely (Hinton 2022, section 3.3)."""

    def __call__(
        self, labels: Tensor, num_classes: int, generator: torch.Generator, logits: Tensor | None
    ) -> Tensor:  # (B,)
        return wrong_labels(labels, num_classes, generator)


@dataclass(frozen=True)
class PermutedLabels:
    """The same labels in another order, so that some are right: one of C, if the classes are of one size.

    As the widely copied program has them (github.com/mpezeshki/pytorch_forward_forward, main.py).
    """

    def __call__(
        self, labels: Tensor, num_classes: int, generator: torch.Generator, logits: Tensor | None
    ) -> Tensor:  # (B,)
        return labels[torch.randperm(len(labels), generator=generator).to(labels.device)]


@dataclass(frozen=True)
class DrawnOnce:
    """Negatives' labels for the whole training set, drawn before the first step and the same in all epochs.

    `fit` takes it as ``negatives``, with tensors. In greedy training with the training set as one minibatch the input
    of the layers above the first then never changes, and is computed once.

    Args:
        negatives: what draws them, without a head's help: `UniformLabels` or `PermutedLabels`.
    """

    negatives: Negatives

    def draw(
        self,
        labels: Tensor,  # (B,): of the whole training set
        num_classes: int,
        seed: int,
    ) -> Tensor:  # (B,)
        return self.negatives(labels, num_classes, epoch_generator(seed, 0, "negatives"), None)


@dataclass(frozen=True)
class HardLabels:
    """Another label, as likely as the net's softmax head finds it on the neutral label (Hinton 2022, section 3.3).

    Labels that the net confuses are drawn most often: "hard" negatives. The true label is left out before the
    probabilities are made, so it is never drawn.
    """

    def __call__(
        self, labels: Tensor, num_classes: int, generator: torch.Generator, logits: Tensor | None
    ) -> Tensor:  # (B,)
        if logits is None:
            raise ValueError("HardLabels needs a net with a softmax head, trained beside the layers, for likely labels")
        draws = torch.rand(len(labels), generator=generator, dtype=torch.float32).to(logits.device)
        return draw_other_labels(logits, labels, draws)
