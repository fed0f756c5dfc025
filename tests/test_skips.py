"""A skip is a failure where nothing may be skipped (conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

TESTS = """
import pytest

@pytest.mark.skip(reason="needs a GPU of sm_90")
def test_gpu(): pass

@pytest.mark.skip(reason="no compiler")
def test_marked(): pass

def test_called(): pytest.skip("not today")

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


@pytest.mark.parametrize(
    ("value", "outcome"), [("1", "1 failed, 1 skipped, 1 xfailed, 1 error"), ("", "3 skipped, 1 xfailed")]
)
def test_skips_fail_where_none_is_allowed(tmp_path, value, outcome):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, conftest.NO_SKIP: value, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout, done.stdout


def test_what_a_fault_is_looked_for_with_is_collected_without_cpu_kernels():
    """cuda_host/faults.py runs its tests, in a full run only, with an extension that has none."""
    code = "import sys, pytest; from ffkernels import _extension; _extension.cpu_isa = None; "
    code += "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/cuda_host']))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_allows_none():
    script = Path(__file__).parents[1] / ".ci" / "run"
    assert f"export {conftest.NO_SKIP}=1" in script.read_text()
