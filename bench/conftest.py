"""What the benchmarks share: the path to the tests' cases, threads, and the tables after the timings."""

import sys
from pathlib import Path

import pytest
import torch

from ffkernels.benchmark.measure import SECONDS, Run
from ffkernels.benchmark.report import text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

THREADS = torch.get_num_threads()
RUN = pytest.StashKey[Run]()  # of bench_suite.py


def pytest_configure(config):
    torch.set_num_threads(1)  # calls of a microsecond only wait for other threads


@pytest.fixture(scope="session")
def measured(request):
    """A function that measures a case with all threads, or gives what it has found for it before."""
    found = {}

    def get(case):
        if case not in found:
            torch.set_num_threads(THREADS)
            try:
                if RUN not in request.config.stash:
                    request.config.stash[RUN] = Run()
                found[case] = request.config.stash[RUN].add(case, SECONDS)
            finally:
                torch.set_num_threads(1)
        return found[case]

    return get


def pytest_terminal_summary(terminalreporter, config):
    """The tables of bench_suite.py; and what a call costs beyond its kernel, where bench_overhead.py pairs them."""
    run = config.stash.get(RUN, None)
    if run is not None:
        terminalreporter.section("ffkernels, torch and the machine's limit")
        terminalreporter.line(text(run.as_json()))
    session = getattr(config, "_benchmarksession", None)
    medians = {(b.group, b.extra_info.get("what")): b.stats.median * 1e6 for b in getattr(session, "benchmarks", [])}
    calls = [group for group, what in medians if what == "call"]
    if not calls:
        return
    terminalreporter.section("overhead of a call over its kernel, us (medians, 1 x 1, CPU)")
    terminalreporter.line(f"{'op':32} {'call':>8} {'kernel':>8} {'overhead':>9}")
    for group in calls:
        call, kernel = medians[group, "call"], medians.get((group, "kernel"), float("nan"))
        terminalreporter.line(f"{group:32} {call:8.1f} {kernel:8.1f} {call - kernel:9.1f}")
