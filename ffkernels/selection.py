"""Selecting those inputs of a minibatch that a step is spent on, by what the head makes of them on the neutral pass.

A function of one's own does as well: whatever takes `Selection`'s arguments and returns rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import checks
from .head_step import draw_hard_inputs


class Selection(Protocol):
    """Chooses the inputs of a minibatch that the layers learn from; the head has learned from all of them."""

    def __call__(
        self,
        labels: Tensor,  # (B,): the true ones
        generator: torch.Generator,  # on the CPU; its draws make the training repeatable
        logits: Tensor,  # (B, C): the net's softmax head on these inputs
    ) -> Tensor:  # (B',) int64: rows of the minibatch, at least one
        ...


@dataclass(frozen=True)
class HardInputs:
    """A share of the minibatch, in which inputs that the head labels wrongly are more likely to be.

    round(share B) inputs, at least one, are drawn without replacement, the next one always with a probability that is
    proportional to floor + 1 - p, p being the head's probability of the true label: the larger the loss, the more
    often is it learned from (Jiang et al. 2019, "Accelerating deep learning by focusing on the biggest losers"). They
    are not weighted to make up for it. The draws are keys log(u) / weight, of which the largest win (Efraimidis &
    Spirakis 2006).

    Args:
        share: in (0, 1]. floor: > 0; the larger, the more uniform the draws.

    Raises:
        TypeError, ValueError: a value that is not allowed.
    """

    share: float = 0.4
    floor: float = 0.1

    def __post_init__(self) -> None:
        checks.share("share", self.share)
        checks.number("floor", self.floor, 0.0, above=True)

    def __call__(self, labels: Tensor, generator: torch.Generator, logits: Tensor) -> Tensor:  # (B',), ascending
        rows = len(labels)
        draws = torch.rand(rows, generator=generator, dtype=torch.float64).to(logits.device)
        return draw_hard_inputs(logits, labels, draws, self.floor, max(1, round(self.share * rows)))
