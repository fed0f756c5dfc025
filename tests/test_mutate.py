"""Faults planted in the kernels are caught: mutate.py has them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import mutate
import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("half", ["o", ""], ids=["first", "second"])
def test_faults_in_the_triton_kernels_are_caught(half):
    """In two parts, which may run on two cores."""
    names = [fault.name for fault in mutate.TRITON]
    chosen = names[::2] if half else names[1::2]
    command = [sys.executable, str(Path(mutate.__file__)), "triton", "--jobs", "1", "--only", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(chosen)} of {len(chosen)} caught" in done.stdout


def test_there_are_enough_faults_and_each_can_be_planted(tmp_path):
    assert len(mutate.TRITON) >= 12
    assert len({fault.name for fault in mutate.TRITON}) == len(mutate.TRITON)
    for fault in mutate.TRITON:
        source = tmp_path / fault.file
        source.parent.mkdir(parents=True, exist_ok=True)
        before = (mutate.ROOT / fault.file).read_text()
        source.write_text(before)
        mutate.plant(fault, tmp_path)
        assert source.read_text() != before


def test_a_fault_that_has_no_place_is_an_error(tmp_path):
    (tmp_path / "kernel.py").write_text("a a")
    fault = mutate.Fault("twice", "kernel.py", "a", "b", ())
    with pytest.raises(RuntimeError, match=r"'a' stands 2 times in kernel\.py, not once"):
        mutate.plant(fault, tmp_path)


def test_only_a_failed_check_counts_as_caught(tmp_path):
    def verdict(status, output):
        (tmp_path / "output").write_text(output)
        return mutate._verdict(status, tmp_path)

    assert verdict(1, "E   AssertionError: 1 != 2") == verdict(1, "E       assert 1 == 2") == "caught"
    assert verdict(1, "ptx.driver.PtxFault: k: race") == verdict(1, "E   Failed: DID NOT RAISE x") == "caught"
    assert verdict(0, "3 passed") == "survives"
    assert verdict(1, "E   SyntaxError: invalid syntax").startswith("pytest ended with 1")
    assert verdict(4, "not found").startswith("pytest ended with 4")
