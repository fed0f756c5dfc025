"""One case: every column made, checked and timed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Case
from .check import Truth, require_right
from .columns import COLUMNS
from .limit import bandwidth, limit
from .problem import Problem
from .timing import Timed, interleaved

SECONDS = 20.0  # for each case: medians of large cases, too, are of several rounds then


@dataclass(frozen=True)
class Measurement:
    """What was found for one case."""

    case: Case
    samples: dict[str, list[float]]  # seconds a call of each column, a round each
    errors: dict[str, dict[str, float]]  # relative, of each column's first result
    left_out: dict[str, str]  # columns that cannot run here, and why
    bandwidth: float  # bytes a second at the case's working set
    limit: dict[str, float]  # seconds, for each precision

    def record(self) -> dict[str, Any]:
        """What a report shows, as JSON holds it."""
        case = self.case
        return {
            "name": case.name,
            "kind": case.kind,
            "batch": case.batch,
            "sizes": list(case.sizes),
            "optimizer": repr(case.optimizer) if case.trains else None,
            "flops": case.flops,
            "bytes": case.bytes_moved,
            "working_set": case.working_set,
            "bandwidth": self.bandwidth,
            "limit": self.limit,
            "rounds": len(next(iter(self.samples.values()))),
            "seconds": {
                name: {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
                for name, samples in self.samples.items()
            },
            "errors": self.errors,
            "left_out": self.left_out,
        }


def measure(case: Case, peaks: dict[str, float], seconds: float) -> Measurement:
    """Check every column of ``case`` and time them for about ``seconds``.

    Raises:
        RuntimeError: a column gave a wrong result.
    """
    from torch._inductor.exc import InductorError, InvalidCxxCompiler  # loads all of torch.compile

    torch.compiler.reset()  # compiled code of other cases would count as recompilations
    problem = Problem(case)
    truth = Truth(problem)
    timed, errors, left_out = {}, {}, {}
    for name, column in COLUMNS.items():
        if not column.has(case):
            continue
        made = column.make(problem)
        try:
            with column.settings():
                result = made.run()
        except InductorError as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler):
                raise
            left_out[name] = f"torch.compile found no C++ compiler: {error.inner_exception}"
            continue
        if column.precision is not None:
            errors[name] = truth.errors(made, result)
            require_right(f"{case.name}, {name}", errors[name], column.precision)
        timed[name] = Timed(made.run, column.settings)
    del truth
    samples = interleaved(timed, seconds)
    rate = bandwidth(case.working_set)
    return Measurement(case, samples, errors, left_out, rate, {p: limit(case, peak, rate) for p, peak in peaks.items()})
