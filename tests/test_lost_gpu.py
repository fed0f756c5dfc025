"""What conftest.py does where a kernel's fault has cost a process its GPU: a stand-in for the wait says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
import torch

faults = []

def wait():
    if faults:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.synchronize = wait

@pytest.mark.skipif(False, reason="needs a GPU")
@pytest.mark.parametrize("i", range(6))
def test_kernel(i):
    if i == 2:
        faults.append(i)

def test_on_a_cpu(): faults.clear()
"""


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_test_that_lost_it_is_named_and_ends_its_process(tmp_path, processes):
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-n", str(processes), "-m", "gpu", "--rootdir",
         str(tmp_path), "-c", os.devnull, "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert "test_it.py::test_kernel[2]: this process has lost the GPU: CUDA error: an illegal" in told
    assert done.returncode == 1
    if processes:  # the tests behind it have a new one
        assert re.search(r"1 failed, 6 passed", told), told  # the one that failed had passed before
    else:
        assert "4 passed" not in told
