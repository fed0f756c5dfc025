"""The command line: one clear line for everything that goes wrong, and how a run that was stopped goes on."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from command_line import options
from idx_files import idx_bytes, write_folder

from ffkernels import cli, training

pytestmark = pytest.mark.usefixtures("settings_of_commands")


def one_error_line(capsys):
    captured = capsys.readouterr()
    assert re.fullmatch(r"error: .+\n", captured.err)
    return captured.err


def test_runtime_errors_are_one_line_and_exit_1(data_dir, run_dir, tmp_path, capsys):
    train = ["train", *options(data_dir), "--run-dir", str(tmp_path / "new")]
    predict = ["predict", "--run", str(run_dir)]
    np.save(tmp_path / "small.npy", np.zeros((2, 7), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((2, 20), np.int32))
    np.save(tmp_path / "object.npy", np.array([{}, {}]), allow_pickle=True)
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "labels").write_bytes(idx_bytes((2,), (0, 1)))
    images = str(data_dir / "t10k-images-idx3-ubyte.gz")
    for arguments, message in (
        ([*train[:-1], str(run_dir)], "holds a run already: continue it with --resume"),
        ([*train, "--data-dir", "/nowhere"], "data folder /nowhere does not exist"),
        ([*train, "--validation", "24"], "validation must be less than the 24 training rows"),
        ([*train[:-1], str(data_dir / "train-images-idx3-ubyte.gz" / "x")], "train-images"),
        (["train", "--resume", str(tmp_path)], "holds no run"),
        (["predict", "--run", str(tmp_path), "--data", "mnist"], "holds no run"),
        ([*predict, "--input", str(tmp_path / "absent.npy")], "absent.npy: no such file"),
        ([*predict, "--input", str(tmp_path / "absent")], "absent: no such file"),
        ([*predict, "--input", str(tmp_path / "bad.npy")], "bad.npy: not a usable .npy file"),
        ([*predict, "--input", str(tmp_path / "object.npy")], "object.npy: not a usable .npy file"),
        ([*predict, "--input", str(tmp_path / "ints.npy")], "ints.npy: must hold unsigned bytes or floating-point"),
        ([*predict, "--input", str(tmp_path / "small.npy")], "has 7 pixels an image, the run in .* trained on 20"),
        ([*predict, "--input", images, "--labels", str(tmp_path / "labels")], "labels: 2 labels, but .* has 12 images"),
        ([*predict, "--input", images, "--labels", str(tmp_path / "small.npy")], r"must hold integers of shape \(B,\)"),
        (
            [*predict, "--input", images, "--output", "/nowhere/labels.txt"],
            "labels.txt cannot be written: there is no fold",
        ),
        ([*predict, "--input", images, "--output", str(tmp_path)], "is a folder, must be a file to be written"),
        ([*predict, "--input", images, "--json", "/nowhere/p.json"], "/nowhere/p.json cannot be written"),
        ([*predict, "--input", images, "--device", "meta"], "device 'meta' cannot be used here: "),
        ([*train, "--json", "/nowhere/t.json"], "/nowhere/t.json cannot be written: there is no folder /nowhere"),
        ([*train, "--device", "xpu"], "device 'xpu' cannot be used here: .*not compiled with XPU"),
        ([*train, "--device", "meta"], "device 'meta' cannot be used here: "),
        ([*train, "--device", "mps"], "device 'mps' cannot be used here: "),
        ([*train, "--spool-dir", str(tmp_path / "s")], "mode must be 'greedy' with spool_dir"),
        ([*train, "--mode", "greedy", "--shift", "1", "--spool-dir", str(tmp_path / "s")], "augment must be None with"),
        ([*train, "--mode", "greedy", "--spool-dir", images], "spool_dir must be a folder, .*ubyte.gz is a file"),
    ):
        assert cli.main(arguments) == 1
        assert re.search(message, one_error_line(capsys))
        with pytest.raises((OSError, ValueError, RuntimeError), match=message):
            cli.main([*arguments, "--debug"])
        capsys.readouterr()
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", [AssertionError, RuntimeError])  # torch without CUDA, and with CUDA but without a GPU
def test_a_device_that_is_not_there_is_one_line(data_dir, tmp_path, capsys, monkeypatch, kind):
    def absent(*args, **options):
        raise kind("Torch not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(torch, "empty", absent)
    assert cli.main(["train", *options(data_dir), "--device", "cuda", "--run-dir", str(tmp_path / "run")]) == 1
    expected = "error: device 'cuda' cannot be used here: Torch not compiled with CUDA enabled\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


def main_without_reader(arguments, monkeypatch):
    """The command line's status where standard output is a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        status = cli.main(arguments)
        stream.flush()  # as the interpreter does at its end
    return status


@pytest.mark.parametrize("arguments", ["info", "--help", "train --list-presets", "--version"])
def test_output_whose_reader_has_left_ends_in_silence(arguments, monkeypatch, capsys):
    assert main_without_reader(arguments.split(), monkeypatch) == 141
    assert capsys.readouterr().err == ""


def test_training_whose_reader_has_left_says_how_to_go_on(data_dir, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    assert main_without_reader(["train", *options(data_dir), "--run-dir", str(path)], monkeypatch) == 141
    said = "the reader of the output has left; continue with: python -m ffkernels train --resume "
    assert capsys.readouterr().err == f"{said}{path}\n"
    assert (path / "config.json").exists()


def test_more_classes_than_pixels_leave_no_run(tmp_path, capsys):
    write_folder(tmp_path / "few", rows=(8, 8), size=(1, 3), classes=5)
    assert cli.main(["train", *options(tmp_path / "few"), "--run-dir", str(tmp_path / "run")]) == 1
    assert "num_classes must be in [2, 3]" in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")
def test_a_damaged_checkpoint_is_a_warning_then_an_error(run_dir, data_dir, capsys):
    predict = ["predict", "--run", str(run_dir), "--data-dir", str(data_dir)]
    (run_dir / "checkpoint-000002.pt").write_bytes(b"")
    assert cli.main(predict) == 0
    assert re.fullmatch(r"warning: .*000002\.pt: truncated.*using checkpoint-000001\.pt.*\n", capsys.readouterr().err)
    (run_dir / "checkpoint-000001.pt").write_bytes(b"")
    assert cli.main(predict) == 1
    assert "has no usable checkpoint" in one_error_line(capsys)


def test_interrupted_between_epochs_says_how_to_go_on(data_dir, tmp_path, capsys, monkeypatch):
    real, path = training.error_percent, tmp_path / "run"

    def interrupted_in_the_second_epoch(*args, **kwargs):
        if list(path.glob("checkpoint-*")):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "error_percent", interrupted_in_the_second_epoch)
    assert cli.main(["train", *options(data_dir), "--run-dir", str(path)]) == 130
    expected = f"\ninterrupted; continue with: python -m ffkernels train --resume {path}\n"
    assert capsys.readouterr().err == expected
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(path), "--quiet"]) == 0
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(data_dir, tmp_path):
    path = tmp_path / "run"
    arguments = [*options(data_dir), "--epochs", "100000", "--run-dir", str(path), "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ffkernels", "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit it ignored
    )
    try:
        deadline = time.monotonic() + 180
        while not list(path.glob("checkpoint-*.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
        process.communicate()  # closes the pipes, whatever happened
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == f"interrupted; continue with: python -m ffkernels train --resume {path}"
    subprocess.run(
        [sys.executable, "-m", "ffkernels", "predict", "--run", path, "--data-dir", data_dir],
        check=True, capture_output=True,
    )  # fmt: skip
