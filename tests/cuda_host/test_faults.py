"""Faults planted in the host code are caught: faults.py has them."""

import subprocess
import sys

import pytest

from . import faults
from .gpu import needs_kernels

pytestmark = [needs_kernels, pytest.mark.slow]


def test_every_planted_fault_is_caught():
    done = subprocess.run([sys.executable, faults.__file__], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(faults.FAULTS)} of {len(faults.FAULTS)} caught" in done.stdout
