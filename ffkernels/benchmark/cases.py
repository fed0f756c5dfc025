"""What is measured, and the least arithmetic and memory traffic that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch

from ..cost import Layer
from ..optim import SGD, Adam

FLOAT = 4  # bytes: all tensors are float32
CLASSES = 10

# The rate matters to no time. SGD's is large because the gradient of a mean over the columns is small, and a step must
# change float32 weights by more than their rounding for its result to be checked.
_ADAM, _MOMENTUM = Adam(lr=1e-3), SGD(lr=100.0, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    kind is "forward" or "step" (one layer), "network" (a step of all layers), "labels" (the same on images under a true
    and a wrong label) or "predict" (the best of all labels for each image).
    """

    kind: str
    batch: int  # positive rows, and as many negative ones; images of "labels" and "predict"
    sizes: tuple[int, ...]  # the input's width, then each layer's
    optimizer: SGD | Adam = field(default=_ADAM)
    quick: bool = False  # part of the short run

    @property
    def name(self) -> str:
        if len(self.sizes) == 2:
            return f"{self.kind} {self.batch} x {self.sizes[0]}->{self.sizes[1]}"
        runs = [(width, len(list(same))) for width, same in groupby(self.sizes)]
        widths = "-".join(f"{n}x{width}" if n > 2 else "-".join([str(width)] * n) for width, n in runs)
        return f"{self.kind} {self.batch} x {widths}"

    @property
    def trains(self) -> bool:
        return self.kind not in ("forward", "predict")

    @property
    def labelled(self) -> bool:
        return self.kind in ("labels", "predict")

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(rows, K, N) of each layer's forward product: layer 1 needs each image once, whatever its labels."""
        rows = self.batch * CLASSES if self.kind == "predict" else 2 * self.batch
        first = self.batch if self.labelled else rows
        return [(rows if i else first, k, n) for i, (k, n) in enumerate(pairwise(self.sizes))]

    @property
    def flops(self) -> int:
        """Of the matrix products alone; training has a second one in each layer, of the same size."""
        return 2 * (2 if self.trains else 1) * sum(rows * k * n for rows, k, n in self.products)

    @property
    def bytes_moved(self) -> int:
        """Every input read once and every result written once; vectors of a row or a column are left out."""
        weights = sum(k * n for _, k, n in self.products)
        passes = 2 * (1 + self.slots) if self.trains else 1  # weights and moments are read and written
        return FLOAT * (self._rows_of_x + self._rows_of_y + passes * weights)

    @property
    def working_set(self) -> int:
        """Bytes of all these tensors."""
        weights = sum(k * n for _, k, n in self.products)
        return FLOAT * (self._rows_of_x + self._rows_of_y + (1 + self.slots) * weights)

    @property
    def slots(self) -> int:
        """Tensors like the weight in the optimizer's state."""
        if not self.trains:
            return 0
        return sum(not name.endswith("_bias") for name in self.optimizer.state_names(True)) - 1  # one is the step

    @property
    def _rows_of_x(self) -> int:  # elements
        rows, k, _ = self.products[0]
        return rows * k

    @property
    def _rows_of_y(self) -> int:  # elements; a network's step and a prediction give no y
        rows, _, n = self.products[0]
        return rows * n if self.kind in ("forward", "step") else 0


def op_of(case: Case) -> str:
    """The op that computes it; of a prediction the first one of each pass."""
    return {
        "forward": "ff_forward",
        "step": "ff_step_",
        "network": "ff_network_step_",
        "labels": "ff_network_step_",
        "predict": "ff_label_forward",
    }[case.kind]


def layers_of(case: Case, dtype: torch.dtype) -> list[Layer]:
    """Its layers as the cost model takes them."""
    rows = case.batch * (CLASSES if case.kind == "predict" else 2)
    return [
        Layer(
            rows, k, n, dtype, case.slots, images=case.batch if case.labelled and i == 0 else None, sqnorm_given=i > 0
        )
        for i, (k, n) in enumerate(pairwise(case.sizes))
    ]


def _layers(kind: str) -> list[Case]:
    return [
        Case(kind, 64, (784, 500), quick=True),
        Case(kind, 128, (784, 2000), quick=True),
        Case(kind, 128, (2000, 2000)),
        Case(kind, 1024, (2000, 2000), quick=kind == "step"),
        Case(kind, 4096, (2000, 2000)),
        Case(kind, 50000, (784, 500)),
    ]


CASES = [
    *_layers("step"),
    Case("network", 64, (784, 500, 500), quick=True),
    Case("network", 128, (784, 500, 500)),
    Case("network", 100, (784, 2000, 2000, 2000, 2000), _MOMENTUM),
    Case("labels", 128, (784, 500, 500)),
    Case("predict", 10000, (784, 500, 500)),
    *_layers("forward"),
]
