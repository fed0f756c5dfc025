"""The AMX kernels with their tile instructions computed in software, on machines that have no AMX."""

import re
import shutil
import subprocess

import edited
import processor
import pytest

TESTS = ("kernels", "threads", "memory", "training")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(edited.compiler()[0]) is None, reason="no C++ compiler")
@pytest.mark.skipif("avx512_bf16" not in processor.flags(), reason="needs AVX512-BF16, as AMX's kernels do")
def test_with_tiles_in_software(tmp_path):
    folder = tmp_path / "repository"
    edited.build_extension(folder, edited.AMX_IN_SOFTWARE, edited.AMX_FLAGS)
    files = [f"tests/test_cpu_{name}.py" for name in TESTS]
    run = edited.run_tests(folder, [*files, "-k", "amx", "-n", "0"], stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 800
