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


def test_ci_allows_none():
    script = Path(__file__).parents[1] / ".ci" / "run"
    assert f"export {conftest.NO_SKIP}=1" in script.read_text()
