"""The columns of the table: every way in which a case is computed and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import network, ops
from ..backends import use_backend
from ..checks import PRECISIONS
from ..nn import FFNet
from .cases import CLASSES, Case
from .problem import Problem
from .torch_columns import STRENGTH, THRESHOLD, Autograd, Compiled, Eager, Result

TRAINING = ("step", "network", "labels")  # kinds of cases
FUSED = tuple(f"ffkernels {p}" for p in PRECISIONS)


class Fused:
    """ffkernels, one call a run."""

    def __init__(self, problem: Problem, precision: str) -> None:
        case = problem.case
        self.problem = problem
        self.net = FFNet.from_sizes(
            case.sizes, num_classes=CLASSES, label_strength=STRENGTH, threshold=THRESHOLD, goodness="mean",
            optimizer=case.optimizer, precision=precision, device=problem.device, dtype=problem.dtype,
        )  # fmt: skip
        self.weights: list[Tensor] = [layer.weight for layer in self.net.stack]
        self.run: Callable[[], Result] = getattr(self, f"_{case.kind}")
        self.reset()

    def reset(self) -> None:
        """Parameters and state as they were at first, in the same memory."""
        for layer, w, b in zip(self.net.stack, self.problem.weights, self.problem.biases, strict=True):
            layer.weight.copy_(w)
            assert layer.bias is not None
            layer.bias.copy_(b)
            for t in layer.state.values():
                t.zero_()

    def moments(self) -> list[Tensor]:
        """The first moment of each layer's weight."""
        return [s["exp_avg"] if "exp_avg" in s else s["momentum_buffer"] for s in (la.state for la in self.net.stack)]

    def _forward(self) -> Result:
        layer = self.net.stack[0]
        y, goodness = ops.ff_forward(self.problem.x, layer.weight, layer.bias, **layer.forward_options())
        return {"y": y, "goodness": goodness}

    def _step(self) -> Result:
        layer = self.net.stack[0]
        y, goodness, loss = ops.ff_step_(
            self.problem.x, self.problem.sign, layer.weight, layer.bias, layer.state, layer.optimizer,
            **layer.step_options(),
        )  # fmt: skip
        return {"y": y, "goodness": goodness, "loss": loss}

    def _network(self) -> Result:
        goodness, loss = network.ff_network_step_(self.problem.x, self.problem.sign, self.net.stack)
        return {"goodness": goodness, "loss": loss}

    def _labels(self) -> Result:
        goodness, loss = network.ff_network_step_(
            self.problem.x, None, self.net.stack, labels=(self.problem.labels, self.problem.wrong),
            num_classes=CLASSES, strength=STRENGTH,
        )  # fmt: skip
        return {"goodness": goodness, "loss": loss}

    def _predict(self) -> Result:
        return {"prediction": self.net.predict(self.problem.x)}


class Products:
    """The matrix products of a case alone, through torch.mm into memory that is there: nothing to check."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        case = problem.case
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for (rows, k, n), w in zip(case.products, problem.weights, strict=True):
            first = rows == len(problem.x) and k == case.sizes[0]
            x = problem.x.to(dtype) if first else torch.rand(rows, k, device=problem.device).to(dtype)
            y = torch.rand(rows, n, device=problem.device).to(dtype)
            self.calls.append((x, w.to(dtype).t(), torch.empty_like(y)))
            if case.trains:
                self.calls.append((y.t(), x, torch.empty(n, k, dtype=dtype, device=problem.device)))

    def run(self) -> Result:
        for a, b, out in self.calls:
            torch.mm(a, b, out=out)
        return {}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Column:
    """How a column is made, and the settings of the process under which it runs."""

    make: Callable[[Problem], Any]  # .run() computes the case once; .weights, .moments() hold what training has changed
    settings: Callable[[], AbstractContextManager[Any]] = nullcontext
    precision: str | None = "highest"  # of the result; None: there is none to check
    kinds: tuple[str, ...] | None = None  # of the cases that have this column; None: all
    unavailable: Callable[[Case], str | None] = lambda case: None  # why it cannot run here; None: it can

    def has(self, case: Case) -> bool:
        return self.kinds is None or case.kind in self.kinds


def _fused(precision: str) -> Column:
    return Column(lambda problem: Fused(problem, precision), lambda: use_backend("cpu"), precision)


COLUMNS: dict[str, Column] = {
    "autograd": Column(Autograd, kinds=TRAINING),  # without training it is the eager one
    "eager": Column(Eager),
    "compile": Column(Compiled),
    "compile medium": Column(Compiled, lambda: matmul_precision("medium"), "medium"),
    "reference": Column(lambda problem: Fused(problem, "highest"), lambda: use_backend("reference")),
    **{name: _fused(p) for name, p in zip(FUSED, PRECISIONS, strict=True)},
    "mm float32": Column(lambda problem: Products(problem, torch.float32), precision=None),
    "mm bf16": Column(lambda problem: Products(problem, torch.bfloat16), precision=None),
}
