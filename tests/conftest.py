"""What all tests share: seeds, threads, a backend to run on, and skips that fail where nothing may be skipped."""

import os
import random
import sys

import command_line
import hypothesis
import idx_files
import pytest
import torch

import ffkernels as ff
from ffkernels import _extension

NO_SKIP = "FFKERNELS_CI"  # .ci/run sets it
NEEDS_GPU = "needs a GPU"
ALLOWED = (NEEDS_GPU, "needs AVX512-BF16")  # no software makes up for these

# The same examples in every run; the fixtures below only set what no example changes.
hypothesis.settings.register_profile(
    "ffkernels",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ffkernels")


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # they share the cores
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        skipped = (mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
        if getattr(params.get("target"), "device", "cpu") != "cpu" or NEEDS_GPU in skipped:
            item.add_marker("gpu")


def pytest_report_header(config):
    extension = _extension.unavailable() or "loaded"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, extension: {extension}"


def forbid_skip(report):
    """Turn a report's skip into a failure, unless hardware is what was missing."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    path, line, message = report.longrepr
    reason = message.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: skipped ({reason}), but {NO_SKIP}=1 allows only {ALLOWED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if os.environ.get(NO_SKIP) == "1":
        forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if os.environ.get(NO_SKIP) == "1":
        forbid_skip(report)
    return report


@pytest.fixture(autouse=True)
def _same_start():
    """Fixed seeds; and every test leaves the process's settings as they were."""
    random.seed(0)
    torch.manual_seed(0)
    settings = (ff.current_backend(), torch.get_default_dtype(), torch.get_float32_matmul_precision())
    yield
    assert (ff.current_backend(), torch.get_default_dtype(), torch.get_float32_matmul_precision()) == settings


@pytest.fixture(autouse=True)
def _gpu_is_alive(request):
    """A kernel's fault is told to whoever asks the GPU next, and no call of this process succeeds afterwards: so each
    test waits for its own, and ends the process where it must. pytest-xdist starts another for the next tests."""
    yield
    if request.node.get_closest_marker("gpu") is None:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid}: this process has lost the GPU: {error}"
        if not hasattr(request.config, "workerinput"):
            pytest.exit(message, returncode=1)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(message, file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture
def target(request):
    """The backend, device and dtype that `cases.on_backends` asks for; the backend is switched on meanwhile."""
    with ff.use_backend(request.param.backend):
        yield request.param


def pytest_generate_tests(metafunc):
    # asked for by the tests that need it alone: faults.py collects tests with an extension that has no CPU kernels
    if "everywhere" in metafunc.fixturenames:
        isas = (_extension.cpu_isa() or {"available": []})["available"]
        metafunc.parametrize("everywhere", ["reference", *(f"cpu-{isa}" for isa in isas)], indirect=True)


@pytest.fixture
def everywhere(request, monkeypatch):
    """The name of a backend that is switched on: the reference, and the CPU kernels with each instruction set."""
    backend, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("FFKERNELS_CPU_ISA", isa)
    with ff.use_backend(backend):
        yield backend


# -- of the command line's tests


@pytest.fixture
def settings_of_commands():
    """The commands set threads and backend for their process."""
    threads = torch.get_num_threads()
    with ff.use_backend(ff.current_backend()):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_dir(tmp_path):
    """A folder with idx files of 24 and 12 images of 4 x 5 pixels in three classes."""
    idx_files.write_folder(tmp_path / "tiny", rows=(24, 12), size=(4, 5), classes=3)
    return tmp_path / "tiny"


@pytest.fixture
def run_dir(data_dir, tmp_path, capsys, settings_of_commands):
    """A finished run."""
    from ffkernels import cli  # which imports all that commands take

    options = command_line.options(data_dir)
    assert cli.main(["train", *options, "--run-dir", str(tmp_path / "run"), "--quiet"]) == 0
    capsys.readouterr()
    return tmp_path / "run"
