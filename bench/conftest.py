"""What the benchmarks share: the path to the tests' cases, threads, and the overhead table after the timings."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def pytest_configure(config):
    torch.set_num_threads(1)  # calls of a microsecond only wait for other threads


def pytest_terminal_summary(terminalreporter, config):
    """What a call costs beyond its kernel: medians of the benchmarks that bench_overhead.py pairs."""
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
