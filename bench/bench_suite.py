"""The suite of `python -m ffkernels bench` under pytest-benchmark: a group for each case, a line for each column.

pytest bench/bench_suite.py
pytest bench/bench_suite.py -k "step and 1024"

All columns of a case are timed interleaved before its first line; each line then replays the samples of its column to
pytest-benchmark, which times one function after the other.
"""

import pytest

from ffkernels.benchmark.cases import CASES
from ffkernels.benchmark.columns import COLUMNS


class Replay:
    """A function and a clock: each call of the function puts the clock forward by the next sample."""

    def load(self, samples):
        self.samples, self.now = iter(samples), 0.0

    def __call__(self):
        self.now += next(self.samples)

    def clock(self):
        return self.now


REPLAY = Replay()
LINES = [
    pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in COLUMNS if COLUMNS[name].has(case)
]


@pytest.mark.benchmark(timer=REPLAY.clock)
@pytest.mark.parametrize(("case", "column"), LINES)
def bench_suite(benchmark, measured, case, column):
    found = measured(case)
    if column in found.left_out:
        pytest.skip(found.left_out[column])
    samples = found.samples[column]
    REPLAY.load(samples)
    benchmark.group = case.name
    benchmark.extra_info["errors"] = found.errors.get(column)
    benchmark.pedantic(REPLAY, rounds=len(samples))
