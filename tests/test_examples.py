"""The examples run and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffkernels import plots

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *args):
    return subprocess.run([sys.executable, EXAMPLES / name, *args], capture_output=True, text=True, check=False)


def test_drop_in_shows_equal_losses():
    done = run("drop_in.py", "--steps", "8", "--width", "64")
    assert done.returncode == 0, done.stderr
    header, *rows, last = done.stdout.splitlines()
    assert header.split() == ["step", "autograd", "ffkernels"]
    losses = [[float(value) for value in row.split()] for row in rows]
    assert [int(step) for step, _, _ in losses] == list(range(1, 9))
    for _, usual, fused in losses:
        assert fused == pytest.approx(usual, rel=1e-5)
    assert losses[-1][1] < losses[0][1]
    assert float(re.fullmatch(r"largest relative difference: (.*)", last)[1]) < 1e-5


def test_drop_in_fails_where_losses_differ():
    done = run("drop_in.py", "--steps", "8", "--width", "64", "--tolerance", "-1")
    assert done.returncode == 1


def test_drop_in_help():
    done = run("drop_in.py", "--help")
    assert done.returncode == 0
    assert "--steps" in done.stdout
    assert "same losses, step by step" in done.stdout


def pixels(path):
    """Width and height of a PNG."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_explore_trains_and_draws(tmp_path):
    done = run("explore.py", "--epochs", "8", "--width", "60", "--out", tmp_path / "made" / "here")
    assert done.returncode == 0, done.stderr
    error = float(re.search(r"test error: (.*) %", done.stdout)[1])
    assert error < 50  # after so few epochs; chance is 90
    assert sorted(p.name for p in (tmp_path / "made" / "here").iterdir()) == [
        "error.png", "goodness.png", "receptive_fields.png",
    ]  # fmt: skip
    for path in (tmp_path / "made" / "here").iterdir():
        assert min(pixels(path)) > 300


def test_custom_losses_train_and_agree():
    done = run("custom_loss.py", "--epochs", "8", "--width", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"^(.*?) +test error +(.*) %$", done.stdout, re.MULTILINE))
    assert list(found) == ["logistic, built in", "squared hinge", "by autograd"]
    assert all(float(error) < 50 for error in found.values())
    assert float(found["squared hinge"]) == pytest.approx(float(found["by autograd"]), abs=1.0)


def test_receptive_fields_are_the_weights_as_images(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
    weight = torch.arange(5 * 14.0).reshape(5, 14) - 20  # two columns more than pixels
    plots.receptive_fields("x.png", weight, (2, 2, 3), title="t", most=4)
    panels = [axes.images for axes in figures[0].axes]
    assert [len(images) for images in panels] == [1, 1, 1, 1]
    for unit, (image,) in enumerate(panels):
        expected = weight[unit, :12].reshape(2, 2, 3).mean(0)
        assert torch.equal(torch.tensor(image.get_array().tolist()), expected)
        low, high = image.get_clim()
        assert high == -low == expected.abs().max()
    with pytest.raises(ValueError, match=r"at least 18 columns, the pixels of images \(2, 3, 3\), got shape \(5, 14\)"):
        plots.receptive_fields("x.png", weight, (2, 3, 3), title="t")
