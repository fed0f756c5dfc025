"""The tensors of a case: the same for every column."""

from __future__ import annotations

import torch

from ..labels import wrong_labels
from ..nn import signs
from .cases import CLASSES, Case


class Problem:
    """Inputs and initial parameters, float32, from a fixed seed.

    Inputs are like pixels (four of five are 0); weights are such that under the usual normalisation the goodness of
    every layer lies around the usual threshold, so that no coefficient vanishes.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        g = torch.Generator().manual_seed(0)
        rows, width = case.products[0][0], case.sizes[0]
        x = torch.rand(rows, width, generator=g)
        self.x = x.mul_(torch.rand(rows, width, generator=g) < 0.2)  # (rows, K): positive rows first, or images
        self.weights = [torch.randn(n, k, generator=g) * 2 for _, k, n in case.products]
        self.biases = [torch.randn(n, generator=g) * 0.1 for _, _, n in case.products]
        if case.labelled:
            self.labels = torch.randint(CLASSES, (rows,), generator=g)
            self.wrong = wrong_labels(self.labels, CLASSES, g)
        self.sign = signs(case.batch, case.batch, self.x)
