"""What the benchmarks share: the path to the tests' cases, threads, and the tables after the timings."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ffkernels.benchmark import gpu, report
from ffkernels.benchmark.command import FORMATS_ON_GPU, QUICK_SECONDS
from ffkernels.benchmark.formats import FORMATS
from ffkernels.benchmark.measure import SECONDS, Run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

THREADS = torch.get_num_threads()
RUN = pytest.StashKey[Run | gpu.GpuRun]()  # of bench_suite.py


def pytest_addoption(parser):
    group = parser.getgroup("ffkernels")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the suite runs")
    group.addoption("--quick", action="store_true", help="few cases of the suite, a short time each")
    group.addoption("--format", nargs="+", choices=list(FORMATS), default=list(FORMATS_ON_GPU),
                    help="on a GPU: tensors of bf16 or fp16, or of float32 at this precision")  # fmt: skip
    group.addoption("--output", metavar="DIR", help="write the suite's numbers to run.json and run.md there")


def pytest_configure(config):
    torch.set_num_threads(1)  # calls of a microsecond only wait for other threads
    if config.getoption("device") == "cuda" and (reason := gpu.unavailable()):
        raise pytest.UsageError(reason)


@pytest.fixture(scope="session")
def measured(request):
    """A function that measures a case with all threads, or gives what it has found for it before: samples, left out."""
    found, config = {}, request.config
    seconds = QUICK_SECONDS if config.getoption("quick") else SECONDS

    def get(case, fmt):
        if (case, fmt) not in found:
            torch.set_num_threads(THREADS)
            try:
                if RUN not in config.stash:
                    config.stash[RUN] = Run() if fmt is None else gpu.GpuRun()
                run = config.stash[RUN]
                one = run.add(case, seconds) if fmt is None else run.add(case, fmt, seconds)
                found[case, fmt] = one.samples, one.left_out
            except Exception as error:  # every line of the case has it, and none measures again
                found[case, fmt] = error
            finally:
                torch.set_num_threads(1)
        if isinstance(found[case, fmt], Exception):
            raise found[case, fmt]
        return found[case, fmt]

    return get


def pytest_terminal_summary(terminalreporter, config):
    """The tables of bench_suite.py; and what a call costs beyond its kernel, where bench_overhead.py pairs them."""
    run = config.stash.get(RUN, None)
    if run is not None:
        show, content = (gpu if isinstance(run, gpu.GpuRun) else report), run.as_json()
        terminalreporter.section("ffkernels, torch and the machine's limit")
        terminalreporter.line(show.text(content))
        if config.getoption("output"):
            folder = Path(config.getoption("output"))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps(content, indent=2) + "\n")
            (folder / "run.md").write_text(show.markdown(content) + "\n")
            terminalreporter.line(f"written: {folder / 'run.json'}, {folder / 'run.md'}")
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
