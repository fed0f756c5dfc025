"""The Makefile: what it says of itself, and when it builds again."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "make", "touch", "rm", "test", "cat", "find", "echo", "cp", "mkdir", "chmod", "env")
# stands in for Python: makes .venv with itself as its interpreter, and notes everything else
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; else echo "$*" >> calls; fi
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path):
    """Runs make in a copy of what it looks at, with few programs on PATH; gives what its Python was called with."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    program(tmp_path / "bin" / "python3", PYTHON)

    def run(*targets, **settings):
        (tmp_path / "calls").write_text("")
        environment = {"PATH": str(tmp_path / "bin"), **settings}
        subprocess.run([shutil.which("make"), "-s", *targets], cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "calls").read_text().splitlines()

    return run


def test_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()) - {"help", "FORCE"}
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make ([a-z]+)", shown)) == targets


def test_it_builds_once_and_again_when_what_it_is_built_with_changes(make, tmp_path):
    build = "setup.py build_ext --inplace"
    first = make("train")
    assert [call for call in first if call.startswith(("-m pip", "setup.py"))][-1] == build
    assert first[-1].startswith("-m ffkernels train")
    assert make("train") == first[-1:]
    program(tmp_path / "bin" / "c++", "#!/bin/sh\n")  # a compiler has been installed
    assert make("train") == [build, first[-1]]
    assert make("train") == first[-1:]
    assert make("train", FFKERNELS_BUILD="none") == [build, first[-1]]
    (tmp_path / "csrc" / "new.cpp").write_text("")
    os.utime(tmp_path / "csrc" / "new.cpp", (2**32, 2**32))
    assert build in make("train", FFKERNELS_BUILD="none")
