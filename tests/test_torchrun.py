"""Training as users start it, with torchrun: what is printed and written, and runs that torchrun picks up again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from ranks import LIMIT, environment

from ffkernels import checkpoint, cli

pytestmark = pytest.mark.slow
EPOCHS = 12
TRAIN = [
    "--data", "digits", "--hidden", 40, 32, "--epochs", EPOCHS, "--batch-size", 128, "--lr", 0.01,
    "--precision", "highest",
]  # fmt: skip
MARK = "FFKERNELS_TEST_LAUNCH"  # in the environment of all processes of a launch


class Launch:
    """One torchrun of two processes; used as a context manager, after which none of its processes is there."""

    def __init__(self, folder, *arguments, restarts=0, timeout=60):
        self.mark, self.seen = uuid.uuid4().hex, set()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
            "--max-restarts", restarts, "-m", "ffkernels", "train", *arguments,
            "--timeout", timeout,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            list(map(str, command)), env=environment(**{MARK: self.mark}), cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def pids(self):
        """Its processes that are alive, with their environment."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"{MARK}={self.mark}".encode() in variables:
                    found[int(entry.name)] = variables
        self.seen |= found.keys()
        return found

    def rank(self, rank, attempt):
        """The process id of a rank once it has been started for the ``attempt``-th time."""
        wanted = {f"RANK={rank}".encode(), f"TORCHELASTIC_RESTART_COUNT={attempt}".encode()}
        return next(pid for pid, variables in self.pids().items() if wanted <= set(variables))

    def until(self, run, number):
        """Wait for the checkpoint of epoch ``number`` in the run folder, or for a later one."""
        end, wanted = time.monotonic() + LIMIT, f"checkpoint-{number:06d}"
        while time.monotonic() < end and self.process.poll() is None:
            if run.is_dir() and any(path.name >= wanted for path in checkpoint.checkpoints(run)):
                return
            time.sleep(0.02)
        raise AssertionError(f"no {wanted}; torchrun has ended with {self.process.poll()}")

    def end(self):
        """What it printed, once it has ended well."""
        text = self.process.communicate(timeout=LIMIT)[0]
        assert self.process.returncode == 0, text
        return text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def left_behind(launch, folder):
    """Processes, shared memory and temporary files of a launch that has ended."""
    shared = [p.name for p in Path("/dev/shm").iterdir() if any(str(pid) in p.name for pid in launch.seen)]
    return [*launch.pids(), *shared, *(p.name for p in folder.rglob(".*.tmp"))]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder in which an undisturbed run was started, and what that printed."""
    folder = tmp_path_factory.mktemp("whole")
    with Launch(folder, *TRAIN) as launch:
        text = launch.end()
        assert left_behind(launch, folder) == []
    return folder, text


def test_one_process_speaks_and_there_is_one_run_folder(whole, tmp_path):
    folder, text = whole
    (run,) = (folder / "runs").iterdir()
    assert len(re.findall(r"run folder", text)) == 1
    assert re.findall(r"^epoch (\d+)/12: loss", text, re.MULTILINE) == [str(n + 1) for n in range(EPOCHS)]
    assert len(re.findall(r"^test error: ", text, re.MULTILINE)) == 1
    assert json.loads((run / "result.json").read_text())["epochs"] == EPOCHS
    assert cli.main(["train", *map(str, TRAIN), "--run-dir", str(tmp_path / "alone"), "--quiet"]) == 0
    found, expected = metrics(run), metrics(tmp_path / "alone")
    assert [r["epoch"] for r in found] == [r["epoch"] for r in expected] == [*range(1, EPOCHS + 1)]
    for ours, theirs in zip(found[:3], expected[:3], strict=True):  # later on the rounding of sums may have grown
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert abs(found[-1]["error"] - expected[-1]["error"]) < 3
    assert expected[-1]["error"] < 30  # of ten digits; a guess has 90


def test_a_run_whose_ranks_are_killed_and_stopped_ends_as_an_undisturbed_one(whole, tmp_path):
    """torchrun starts the processes again, which go on from the last checkpoint: the same bits in the end."""
    (undisturbed,), run = (whole[0] / "runs").iterdir(), tmp_path / "run"
    with Launch(tmp_path, *TRAIN, "--run-dir", run, restarts=2, timeout=5) as launch:
        launch.until(run, 3)
        os.kill(launch.rank(1, 0), signal.SIGKILL)
        launch.until(run, 7)
        stopped, other = launch.rank(1, 1), launch.rank(0, 1)
        os.kill(stopped, signal.SIGSTOP)
        while other in launch.pids():
            time.sleep(0.05)
        os.kill(stopped, signal.SIGKILL)  # as torchrun does, too, half a minute later
        text = launch.end()
        assert left_behind(launch, tmp_path) == []
    assert len(re.findall(r"run folder", text)) == 3
    assert re.search(r"rank 1 died or was stopped \(no sign of life\); rank 0 stops", text)
    found, expected = checkpoint.load_latest(run), checkpoint.load_latest(undisturbed)
    assert len(found["history"]) == EPOCHS
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert {**ours, "seconds": 0, "rows_per_second": 0} == {**theirs, "seconds": 0, "rows_per_second": 0}
    assert found["net"].keys() == expected["net"].keys()
    assert all(torch.equal(t, expected["net"][name]) for name, t in found["net"].items())
    assert [r["epoch"] for r in metrics(run)] == [*range(1, EPOCHS + 1)]
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, undisturbed)]
    assert results[0]["test_error"] == results[1]["test_error"]
