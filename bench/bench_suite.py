"""The suite of `python -m ffkernels bench` under pytest-benchmark: a group for each case, a line for each column.

pytest bench/bench_suite.py
pytest bench/bench_suite.py -k "step and 1024"
pytest bench/bench_suite.py --device cuda --format bf16 medium      on a GPU
pytest bench/bench_suite.py --device cuda --quick --output folder   few cases; run.json and run.md in folder

All columns of a case are timed interleaved before its first line; each line then replays the samples of its column to
pytest-benchmark, which times one function after the other.
"""

import pytest

from ffkernels.benchmark import columns, gpu
from ffkernels.benchmark.cases import CASES
from ffkernels.benchmark.formats import FORMATS
from ffkernels.benchmark.measure import FAILED


class Replay:
    """A function and a clock: each call of the function puts the clock forward by the next sample."""

    def load(self, samples):
        self.samples, self.now = iter(samples), 0.0

    def __call__(self):
        self.now += next(self.samples)

    def clock(self):
        return self.now


REPLAY = Replay()


def pytest_generate_tests(metafunc):
    """A line for each case, format (on a GPU) and column."""
    config = metafunc.config
    cases = [case for case in CASES if case.quick or not config.getoption("quick")]
    formats = [None]
    if config.getoption("device") == "cuda":
        formats = [FORMATS[name] for name in config.getoption("format")]
    lines = []
    for case in cases:
        for fmt in formats:
            found = columns.COLUMNS if fmt is None else gpu.columns(fmt)
            label = case.name if fmt is None else f"{case.name}, {fmt.name}"
            lines += [
                pytest.param(case, fmt, name, id=f"{label}-{name}")
                for name, column in found.items()
                if column.has(case)
            ]
    metafunc.parametrize(("case", "fmt", "column"), lines)


@pytest.mark.benchmark(timer=REPLAY.clock)
def bench_suite(benchmark, measured, case, fmt, column):
    samples, left_out = measured(case, fmt)
    if column in left_out:
        why = left_out[column]
        (pytest.fail if why.startswith(FAILED) else pytest.skip)(why)
    REPLAY.load(samples[column])
    benchmark.group = case.name if fmt is None else f"{case.name}, {fmt.name}"
    benchmark.pedantic(REPLAY, rounds=len(samples[column]))
