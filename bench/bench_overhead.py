"""What a call costs before its kernel runs: each op at 1 x 1 through its public function and straight to its kernel.

pytest bench/bench_overhead.py
"""

import cases
import pytest
import torch

import ffkernels as ff
from ffkernels import backends

PAIRS = [(op, t) for op in cases.OPS for t in cases.targets(op, (torch.float32,)) if t.device == "cpu"]


def arguments(op):
    """A layer of one row, one input and one output; the label ops with one class."""
    given = cases.arguments(op, rows=1, depth=1, cols=1, optimizer="adam")
    for name in ("x_sqnorm", "row_term", "col_term"):
        given.pop(name, None)
    if "label" in op:
        given["num_classes"] = 1
        given |= {name: torch.zeros_like(t) for name, t in given.items() if name.startswith("labels")}
    return given


@pytest.mark.parametrize("what", ["call", "kernel"])
@pytest.mark.parametrize(("op", "target"), PAIRS, ids=lambda value: getattr(value, "backend", value))
def bench_overhead(benchmark, op, target, what):
    benchmark.group, benchmark.extra_info["what"] = f"{op} ({target.backend})", what
    given = arguments(op)
    with ff.use_backend(target.backend), torch.no_grad():
        if what == "call":
            function = getattr(ff, op)
            benchmark(lambda: function(**given))
        else:
            args, kernel = cases.flat(op, given), backends.kernel(op, given["x"])
            benchmark(lambda: kernel(*args))
