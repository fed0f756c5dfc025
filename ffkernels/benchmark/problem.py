"""The tensors of a case: the same for every column."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer import signs
from .cases import CLASSES, Case


class Problem:
    """Inputs and initial parameters from a fixed seed.

    Inputs are like pixels (four of five are 0); weights are such that under the usual normalisation the goodness of
    every layer lies around the usual threshold, so that no coefficient vanishes.

    Args:
        sets: how many inputs there are to take turns, so that none is found in a cache because the last run left it
            there.
    """

    def __init__(
        self, case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, sets: int = 1
    ) -> None:
        self.case, self.device, self.dtype = case, torch.device(device), dtype
        g = torch.Generator().manual_seed(0)
        rows, width = case.products[0][0], case.sizes[0]

        def pixels() -> Tensor:
            x = torch.rand(rows, width, generator=g)
            return self._placed(x.mul_(torch.rand(rows, width, generator=g) < 0.2))

        first = pixels()
        self.weights = [self._placed(torch.randn(n, k, generator=g) * 2) for _, k, n in case.products]
        self.biases = [self._placed(torch.randn(n, generator=g) * 0.1) for _, _, n in case.products]
        if case.labelled:
            labels = torch.randint(CLASSES, (rows,), generator=g)
            # labels.wrong_labels does the same and looks at values, which count.py's tensors do not have
            wrong = (labels + torch.randint(1, CLASSES, (rows,), generator=g)) % CLASSES
            self.labels, self.wrong = labels.to(self.device), wrong.to(self.device)
        self.inputs = [first, *(pixels() for _ in range(sets - 1))]  # each (rows, K): positive rows first, or images
        self.sign = signs(case.batch, case.batch, first)
        self.turn = 0

    def _placed(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype)

    @property
    def x(self) -> Tensor:
        """The input whose turn it is."""
        return self.inputs[self.turn]

    def rotate(self) -> None:
        """Go on to the next input."""
        self.turn = (self.turn + 1) % len(self.inputs)
