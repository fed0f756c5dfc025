"""Triton kernels in Triton's own interpreter, on the CPU. TRITON_INTERPRET=1 has to be set first: other processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ffkernels as ff

ROOT = Path(__file__).parent.parent
STEPS = 20


def interpreted(*command):
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env.pop("FFKERNELS_BACKEND", None)
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True)


# Which tests of test_ops.py: every op, in the dtypes that the interpreter multiplies, on what is cheap to interpret.
# Larger sizes, bf16 and TF32 run as compiled code in test_triton_kernels.py.
CHOSEN = (
    "test_shapes and not 255",
    "test_options and float32-bias",
    "test_every_optimizer_over_steps",
    "test_one_row_one_column",
    "test_no_rows",
    "test_an_update_without_rows",
    "test_layouts and float32 and (ff_forward or ff_grad)",
    "test_a_bad_row_spoils_no_other",
    "test_nan_reaches_the_loss",
    "test_zero_rows and float32",
    "test_huge_goodness",
    "test_small_coefficients",
)


@pytest.mark.slow
def test_ops():
    pytest.importorskip("triton")
    chosen = " or ".join(f"({part})" for part in CHOSEN)
    done = interpreted(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py", "-m", "not slow", "-W",
        "ignore:invalid value encountered:RuntimeWarning", "-k",  # numpy's, of infinite inputs
        f"triton and ({chosen})",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    assert int(counted[1]) > 150


def losses_of_training():
    """Losses of a small network on handwritten digits, as the present backend trains it."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data[: 32 * STEPS // 2], dtype=torch.float32) / 16
    y = torch.tensor(digits.target[: 32 * STEPS // 2])
    torch.manual_seed(0)
    net = ff.FFNet.from_sizes([64, 32, 16], num_classes=10, optimizer=ff.Adam(lr=0.02), precision="highest")
    losses = []
    for step in range(STEPS):
        rows = slice(32 * (step % (STEPS // 2)), 32 * (step % (STEPS // 2) + 1))
        wrong = (y[rows] + 1 + step % 9) % 10
        losses.append(net.label_step(x[rows], y[rows], wrong).loss)
    return torch.stack(losses)  # (STEPS, layers)


@pytest.mark.slow
def test_training_follows_the_reference():
    pytest.importorskip("triton")
    with ff.use_backend("reference"):
        expected = losses_of_training()
    done = interpreted(__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
    assert losses.shape == expected.shape == (STEPS, 2)
    assert (expected[-1] < expected[0]).all(), "the reference itself must learn"
    assert torch.allclose(losses, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    with ff.use_backend("triton"):
        for layers in losses_of_training().tolist():
            print(*layers)
