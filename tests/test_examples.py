"""The examples run and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_drop_in_fails_where_losses_differ():
    done = run("drop_in.py", "--steps", "8", "--width", "64", "--tolerance", "-1")
    assert done.returncode == 1


def test_drop_in_help():
    done = run("drop_in.py", "--help")
    assert done.returncode == 0
    assert "--steps" in done.stdout
    assert "same losses, step by step" in done.stdout
