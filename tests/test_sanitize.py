"""The sanitizers report what is planted in the CPU kernels, and nothing else (`make sanitize` runs all of it)."""

import shutil

import edited
import pytest
import sanitize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(edited.compiler()[0]) is None, reason="no C++ compiler"),
]


@pytest.mark.parametrize("fault", sanitize.FAULTS.values(), ids=list(sanitize.FAULTS))
def test_a_planted_fault_is_caught(fault, tmp_path):
    assert sanitize.caught(fault, tmp_path / "build")


@pytest.mark.parametrize("sanitizer", [sanitize.MEMORY, sanitize.THREADS])
def test_without_one_nothing_is_reported(sanitizer, tmp_path):
    edits = sanitize.RED_ZONES if sanitizer == sanitize.MEMORY else []
    driver = sanitize.build_driver(tmp_path / "build", sanitizer, edits, ("portable",))
    done = sanitize.run_driver(driver, "portable")
    assert (done.returncode, done.stdout, done.stderr) == (0, "portable clean\n", "")


def test_an_edit_that_finds_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"'no such line' stands 0 times in csrc/cpu/layer.h"):
        edited.copy_of_sources(tmp_path / "build", [edited.Edit("cpu/layer.h", "no such line", "")])
