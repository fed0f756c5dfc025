"""One case, every column made, checked and timed; and a run of several."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Case
from .check import Truth, require_right
from .columns import COLUMNS, Column
from .limit import bandwidth, peaks, require_extension
from .machine import machine
from .problem import Problem
from .report import with_ratios
from .timing import Timed, interleaved

FAILED = "failed"  # how the reason begins why a column is left out that should not be
SECONDS = 20.0  # for each case: medians of large cases, too, are of several rounds then


def checked(
    problem: Problem, columns: dict[str, Column], go_on: bool = False
) -> tuple[dict[str, Timed], dict[str, dict[str, float]], dict[str, str]]:
    """Make and run every column once.

    Args:
        go_on: leave out a column that fails, or gives a wrong result, and go on with the others.

    Returns:
        What is to be timed; the relative errors of each column's first result; the columns that cannot run here, with
        the reason, which begins with FAILED where one has failed.

    Raises:
        RuntimeError: a column gave a wrong result.
    """
    from torch._inductor import config  # loads all of torch.compile
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    torch.compiler.reset()  # compiled code of other cases would count as recompilations
    case, truth = problem.case, Truth(problem)
    timed, errors, left_out = {}, {}, {}
    # What an earlier run compiled for this machine's own instruction set is wrong under a lower one, which the key of
    # torch's cache does not hold (seen with torch 2.13).
    kept = config.fx_graph_cache and not os.environ.get("ATEN_CPU_CAPABILITY")
    for name, column in columns.items():
        if not column.has(case):
            continue
        if reason := column.unavailable(case):
            left_out[name] = reason
            continue
        try:
            with column.settings(), config.patch(fx_graph_cache=kept):
                made = column.make(problem)
                result = made.run()
            if column.precision is not None:
                found = truth.errors(made, result)
                require_right(f"{case.name}, {name}", found, column.precision)
                errors[name] = found
        except Exception as error:  # of a kernel, a compiler or torch: they have no one type
            if isinstance(error, InductorError) and isinstance(error.inner_exception, InvalidCxxCompiler):
                left_out[name] = f"torch.compile found no C++ compiler: {error.inner_exception}"
            elif go_on:
                first = next(iter(str(error).splitlines()), "")
                left_out[name] = f"{FAILED} in {case.name}: {type(error).__name__}: {first}\n{traceback.format_exc()}"
            else:
                raise
            continue
        timed[name] = Timed(made.run, column.settings)
    return timed, errors, left_out


@dataclass(frozen=True)
class Measurement:
    """What was found for one case."""

    case: Case
    samples: dict[str, list[float]]  # seconds a call of each column, a round each
    errors: dict[str, dict[str, float]]  # relative, of each column's first result
    left_out: dict[str, str]  # columns that cannot run here, and why
    bandwidth: float  # bytes a second at the case's working set

    def record(self) -> dict[str, Any]:
        """What was found, as JSON holds it."""
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
            "rounds": len(next(iter(self.samples.values()))),
            "seconds": {
                name: {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
                for name, samples in self.samples.items()
            },
            "errors": self.errors,
            "left_out": self.left_out,
        }


def measure(case: Case, seconds: float) -> Measurement:
    """Check every column of ``case`` and time them for about ``seconds``.

    Raises:
        RuntimeError: a column gave a wrong result.
    """
    timed, errors, left_out = checked(Problem(case), COLUMNS)
    rate = bandwidth(case.working_set)
    samples = interleaved(timed, seconds)
    # other programs only make it less: the best of two moments
    return Measurement(case, samples, errors, left_out, max(rate, bandwidth(case.working_set)))


class Run:
    """A run of several cases."""

    def __init__(self) -> None:
        require_extension()
        self.date, self.machine = time.strftime("%Y-%m-%d"), machine()
        self.peak = peaks()
        self.records: list[dict[str, Any]] = []

    def add(self, case: Case, seconds: float) -> Measurement:
        """Measure a case; and the machine's peak again, of which the highest counts."""
        found = measure(case, seconds)
        self.peak = {precision: max(peak, self.peak[precision]) for precision, peak in peaks().items()}
        self.records.append(found.record())
        return found

    def as_json(self) -> dict[str, Any]:
        """All that was found, with the limits and ratios that follow from it."""
        return {
            "date": self.date,
            "machine": self.machine,
            "peak": self.peak,
            "cases": [with_ratios(record, self.peak) for record in self.records],
        }
