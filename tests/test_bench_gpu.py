"""The suite on a GPU, as far as it can be seen without one: its columns, tables, commands; and the predicted tables."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ffkernels import cli
from ffkernels.benchmark import gpu, predict, report
from ffkernels.benchmark.cases import CASES, Case
from ffkernels.benchmark.formats import FORMATS
from ffkernels.benchmark.measure import FAILED, checked
from ffkernels.benchmark.problem import Problem
from ffkernels.benchmark.timing import ROUNDS, Timed, interleaved, wall
from ffkernels.benchmark.torch_columns import Autograd
from ffkernels.cost import DEVICES

ROOT = Path(__file__).resolve().parents[1]
STEP = Case("step", 6, (40, 20))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def test_columns_of_every_format_and_why_they_cannot_run(monkeypatch):
    for fmt in FORMATS.values():
        found = gpu.columns(fmt)
        assert tuple(found) == gpu.COLUMNS
        assert found["mm"].precision is None
        assert {column.precision for name, column in found.items() if name != "mm"} == {fmt.tolerance}
    refused = gpu.columns(FORMATS["fp16"])["triton"].unavailable
    monkeypatch.setattr("ffkernels.backends.unavailable", lambda backend: "not today")
    assert refused(STEP) == "not today"


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("case", [STEP, Case("labels", 6, (40, 20, 30))], ids=lambda case: case.kind)
def test_torchs_columns_are_right_in_every_format(case, fmt):
    """On a CPU, without what only a GPU has."""
    columns = {name: column for name, column in gpu.columns(fmt).items() if name in ("autograd", "mm")}
    timed, errors, left_out = checked(Problem(case, dtype=fmt.dtype, sets=3), columns)
    assert timed.keys() == {"autograd", "mm"}
    assert {"goodness", "loss", "moment"} <= errors["autograd"].keys()
    assert ("change" in errors["autograd"]) == (fmt.dtype == torch.float32)
    assert not left_out


def test_a_column_that_cannot_run_is_left_out_with_the_reason():
    column = gpu.columns(FORMATS["bf16"])["autograd"]
    without = type(column)(column.make, kinds=column.kinds, unavailable=lambda case: "no kernel")
    assert checked(Problem(STEP), {"autograd": without}) == ({}, {}, {"autograd": "no kernel"})


class Wrong(Autograd):
    def step(self):
        return super().step() | {"loss": torch.zeros(1)}


class Broken(Autograd):
    def step(self):
        raise ValueError("out of resource\nand more")


@pytest.fixture
def pretended(monkeypatch):
    """A run whose GPU is this CPU, with three columns: one is right, one wrong, and one raises."""
    own = gpu.columns(FORMATS["medium"])["autograd"]
    made = {"autograd": Autograd, "triton": Wrong, "cuda": Broken}
    monkeypatch.setattr(gpu, "columns", lambda fmt: {name: replace(own, make=make) for name, make in made.items()})
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setattr(gpu, "environment", lambda device: MACHINE)
    monkeypatch.setattr(gpu, "Events", lambda device, rotate: wall())
    return gpu.GpuRun("cpu")


def test_columns_that_fail_or_are_wrong_cost_the_others_nothing(pretended):
    found = pretended.add(STEP, FORMATS["medium"], 0.0)
    assert found.samples.keys() == {"autograd"}
    assert found.left_out.keys() == {"triton", "cuda"}
    assert all(why.startswith(FAILED) for why in found.left_out.values())
    assert "in step" in found.left_out["cuda"]
    assert "in step\n    raise ValueError" in found.left_out["cuda"]  # where it failed
    reasons = gpu.text(pretended.as_json()).splitlines()[-2:]
    assert reasons[0] == f"cuda is left out: failed in {STEP.name}: ValueError: out of resource"
    assert reasons[1].startswith(f"triton is left out: failed in {STEP.name}: RuntimeError: {STEP.name}, triton: the")
    json.dumps(pretended.as_json())


def test_a_case_of_which_every_column_fails_is_an_error(pretended, monkeypatch):
    broken = {"cuda": replace(gpu.columns(None)["cuda"])}
    monkeypatch.setattr(gpu, "columns", lambda fmt: broken)
    with pytest.raises(RuntimeError, match="ValueError: out of resource"):
        pretended.add(STEP, FORMATS["medium"], 0.0)
    assert pretended.as_json()["cases"] == []


def test_the_environment_is_that_of_the_gpu_in_use(monkeypatch):
    """nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves."""
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="580.1, 1980 MHz, 2619 MHz, 700 W\n")

    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=1, L2_cache_size=2, uuid="ab-cd"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.environment(torch.device("cuda"))
    assert "--id=GPU-ab-cd" in asked[0]
    assert found["gpu"] == "NVIDIA H100"
    assert (found["arch"], found["driver_version"], found["clocks_max_sm"]) == ("sm_90", "580.1", "1980 MHz")


def test_inputs_take_turns():
    problem = Problem(STEP, sets=3)
    seen = []
    for _ in range(4):
        seen.append(problem.x)
        problem.rotate()
    assert seen[0] is seen[3]
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], Problem(STEP).x)  # more inputs change neither the first nor the parameters
    assert torch.equal(problem.weights[0], Problem(STEP).weights[0])


def test_a_sample_may_be_one_call():
    now = [0.0]

    def run():
        now[0] += 1e-3

    samples = interleaved({"a": Timed(run, torch.no_grad)}, 0.0, wall(lambda: now[0]), least=0.0)
    assert samples == {"a": pytest.approx([1e-3] * ROUNDS[0])}
    assert now[0] == pytest.approx((2 + ROUNDS[0]) * 1e-3)


MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "multiprocessors": 132, "system": "Linux x86_64", "ffkernels": "1",
    "torch": "2", "runtime": "CUDA 13.0", "triton": "3", "python": "3", "driver_version": "580",
}  # fmt: skip


def measured(**seconds):
    samples = {name: [value, 3 * value, 2 * value] for name, value in seconds.items()}
    return gpu.GpuMeasurement(CASES[4], FORMATS["bf16"], samples, {}, {"cuda": "not built"})


def test_a_run_as_a_table():
    found = measured(autograd=400e-6, compile=200e-6, triton=100e-6)
    record = found.record(gpu.datasheet(MACHINE["gpu"], MACHINE["multiprocessors"]))
    assert record["seconds"]["triton"] == pytest.approx({"median": 200e-6, "min": 100e-6, "max": 300e-6})
    assert record["limit"] == pytest.approx(4 * 8192 * 2000 * 2000 / 989.4e12)
    run = {"date": "2026-01-02", "machine": MACHINE, "cases": [record]}
    lines = gpu.text(run).splitlines()
    assert lines[0].startswith("NVIDIA H100 80GB HBM3 (sm_90, 132 multiprocessors), driver 580")
    assert lines[3].split()[:3] == ["case", "format", "autograd"]
    cells = lines[4].split()
    assert cells[-10:] == ["800.0", "-", "400.0", "-", "200.0", "-", "-", "-", "2.00x", "66%"]
    assert lines[-1] == "cuda is left out: not built"
    assert "| step 4096 x 2000->2000 | bf16 | 800.0 | - | 400.0 | - | 200.0 |" in gpu.markdown(run)
    unknown = {**run, "cases": [found.record(gpu.datasheet("Some GPU", 132))]}
    assert gpu.text(unknown).splitlines()[4].split()[-1] == "-"


def test_datasheets_are_found_by_the_gpus_own_names():
    names = {
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H200": "H200", "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA B200": "B200", "AMD Instinct MI300X": "MI300X",
    }  # fmt: skip
    assert {name: gpu.datasheet(name, DEVICES[key].multiprocessors).name for name, key in names.items()} == names
    assert gpu.datasheet("NVIDIA GeForce GTX 1080", 20) is None


def test_a_gpu_that_shares_its_name_with_a_faster_one_has_no_datasheet_here():
    assert gpu.datasheet("NVIDIA H100 80GB HBM3", 132).name == "H100"
    assert gpu.datasheet("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60) is None
    assert gpu.datasheet("NVIDIA H100 PCIe", 114) is None
    assert gpu.datasheet("NVIDIA GH200 480GB", 132) is None, "which is no H200"


@NO_GPU
def test_without_a_gpu_one_line_says_so(capsys):
    assert gpu.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("needs a GPU: torch")
    assert cli.main(["bench", "--device", "cuda", "--quick"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: needs a GPU: torch")


@NO_GPU
def test_make_gpu_stops_before_it_builds():
    """The recipe of `make gpu`, with this Python in place of the one in .venv."""
    recipe = [line for line in subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/installed", "gpu"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines() if "-m ffkernels.benchmark.gpu" in line or "pytest" in line]  # fmt: skip
    assert len(recipe) == 3
    assert all(
        line.endswith("|| failed=1; \\") for line in recipe[1:]
    )  # tests that fail leave the times to be measured
    assert recipe[0].endswith("-m ffkernels.benchmark.gpu")
    done = subprocess.run(
        [sys.executable, "-m", "ffkernels.benchmark.gpu"], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert len(done.stdout.splitlines()) == 1


def test_predictions_are_labelled_and_written(tmp_path, capsys):
    document, source = tmp_path / "gpu.md", tmp_path / "run.json"
    document.write_text("\n".join(mark.format("predicted") for mark in (report.BEGIN, report.END)))
    options = ["--only", "step 4096", "network 100", "--format", "bf16"]
    assert cli.main(["bench", "--predict", *options, "--json", str(source), "--markdown", str(document)]) == 0
    printed = capsys.readouterr().out
    assert "Counted, not measured" in printed
    assert "Predicted, not measured" in printed
    assert "| step 4096 x 2000->2000 | bf16 |" in document.read_text()
    run = json.loads(source.read_text())
    assert run["predicted"] is True
    step, network = run["cases"]
    assert step["devices"].keys() == DEVICES.keys()
    on = step["devices"]["H100"]
    assert on["seconds"]["triton"] > on["limit"] == pytest.approx(4 * 8192 * 2000 * 2000 / 989.4e12)
    assert on["plans"]["triton"]["launches"] == 2
    assert on["plans"]["cuda"]["launches"] == 1
    assert "cuda" not in step["devices"]["MI300X"]["plans"]
    assert network["devices"]["A100"]["plans"]["triton"]["launches"] == 8
    assert network["autograd"]["launches"] > 100
    assert cli.main(["bench", "--from", str(source)]) == 0
    assert capsys.readouterr().out == printed == predict.text(run) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "bf16"], "--format goes with --device cuda or --predict"),
        (["--predict", "--png", "run.png"], "--png draws runs on a CPU"),
    ],
)
def test_usage_errors(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *options])
    assert message in capsys.readouterr().err
