"""Copies of the repository with edits in the C++ sources, what is built from them, and the tests run with that."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Edit(NamedTuple):
    file: str  # under csrc/
    pattern: str  # occurs once
    replacement: str


# With these AMX's tile instructions are computed in software (cpu/tiles.h), so that its kernels run on any machine that
# has AVX512-BF16, which the rest of them needs, and so that sanitizers see what the tiles load and store.
AMX_IN_SOFTWARE = [
    Edit("cpu/isa.cpp", r"\(!bf16 \|\| !amx [^;]*\) return", "(void(amx), void(&tiles_permitted), !bf16) return")
]
AMX_FLAGS = ["-include", str(ROOT / "tests" / "cpu" / "tiles.h")]


def copy_of_sources(folder: Path, edits: Iterable[Edit]) -> Path:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for edit in edits:
        file = folder / "csrc" / edit.file
        text, count = re.subn(edit.pattern, edit.replacement, file.read_text())
        if count != 1:
            raise RuntimeError(f"{edit.pattern!r} stands {count} times in csrc/{edit.file}, not once")
        file.write_text(text)
    return folder / "csrc"


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def build_extension(folder: Path, edits: Iterable[Edit], flags: Sequence[str]) -> None:
    """Copy the package and its tests to ``folder`` and build the extension there, for the CPU, with more flags."""
    copy_of_sources(folder, edits)
    for name in ("ffkernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    setup = (folder / "setup.py").read_text()
    (folder / "setup.py").write_text(setup.replace('"-O3"', '"-O1"'))  # half the time to compile
    environment = os.environ | {"CXX": " ".join([*compiler(), *flags]), "FFKERNELS_BUILD": "cpu"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def run_tests(
    folder: Path, arguments: Sequence[str], environment: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess:
    """Run pytest in ``folder``, with the environment's additions; ``options`` are subprocess.run's."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | (environment or {}), **options)
