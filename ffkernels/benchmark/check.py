"""What a case must give, in float64, and how far a column's result is from it: no wrong result is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import Problem
from .torch_columns import Autograd, Result

# Largest relative error (Frobenius norm) of a result whose products have this precision. Kernels are tested far more
# closely elsewhere; this is to see that all columns do the same work.
TOLERANCE = {"highest": 1e-4, "high": 1e-3, "medium": 3e-2}


def _flat(value: Any) -> Tensor:
    """A result as one tensor: results are tensors or, nested, their parts."""
    if isinstance(value, Tensor):
        return value.detach().double().flatten()
    return torch.cat([_flat(part) for part in value])


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm())


def _changes(column: Any, problem: Problem) -> list[Tensor]:
    return [after.double() - before.double() for after, before in zip(column.weights, problem.weights, strict=True)]


class Truth:
    """The result of a case in float64, by autograd."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        column = Autograd(problem, torch.float64)
        if problem.case.kind == "predict":
            with torch.no_grad():
                self.by_label = column.goodness_by_label()  # (B, C)
            return
        self.result = {name: _flat(value) for name, value in column.run().items()}
        if problem.case.trains:
            self.moments = [m.clone() for m in column.moments()]
            with torch.no_grad():
                self.changes = _changes(column, problem)

    def errors(self, column: Any, result: Result) -> dict[str, float]:
        """Relative errors of what ``column`` gave, ``result``, and of what it changed, after its first run."""
        if self.problem.case.kind == "predict":
            return {"prediction": self._regret(result["prediction"])}
        found = {name: _distance(_flat(value), self.result[name]) for name, value in result.items()}
        if self.problem.case.trains:
            pairs = zip(column.moments(), self.moments, strict=True)
            found["moment"] = max(_distance(m.double(), expected) for m, expected in pairs)
            with torch.no_grad():
                changes = _changes(column, self.problem)
            if self.problem.dtype == torch.float32:  # 16 bits of a weight do not hold the change of one step
                found["change"] = max(map(_distance, changes, self.changes))
        return found

    def _regret(
        self,
        prediction: Tensor,  # (B,)
    ) -> float:
        """Goodness that the predicted labels lack, in parts of what labels differ by: a near tie may go either way."""
        if prediction.shape != self.by_label.shape[:1]:
            return float("inf")
        best, worst = self.by_label.amax(1), self.by_label.amin(1)
        chosen = self.by_label.gather(1, prediction[:, None]).squeeze(1)
        return float((best - chosen).mean() / (best - worst).mean())


def allowed(quantity: str, precision: str) -> float:
    """The largest error of ``quantity``. Adam's first step is the gradient's sign: where rounding turns one, the change
    of a weight is wrong by twice itself, though only as many of them as the gradient's error is large."""
    tolerance = TOLERANCE[precision]
    return 2 * tolerance**0.5 if quantity == "change" else tolerance


def require_right(name: str, errors: dict[str, float], precision: str) -> None:
    """Raise RuntimeError if an error is too large."""
    for quantity, error in errors.items():
        if not error <= allowed(quantity, precision):
            raise RuntimeError(
                f"{name}: the result is wrong and will not be timed: relative error {error:.2g} of {quantity}, "
                f"allowed {allowed(quantity, precision):.2g}"
            )
