"""Builds the compiled extension ffkernels/_C.abi3.so; everything else about the package is in pyproject.toml.

Environment variables:
    FFKERNELS_BUILD       auto (default): whatever the compilers found here allow; cpu, cuda: exactly this, or an error;
                          none: no extension, the package runs on its reference path
    TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX"; default: those of DEFAULT_CUDA_ARCHS that nvcc knows
    MAX_JOBS              how many files to compile at once
    CXX, CUDA_HOME        the C++ compiler and the CUDA toolkit to use, in place of the first found

The extension uses torch's stable C++ ABI only and nothing of Python's, so one build serves every Python and torch that
the package accepts. torch.utils.cpp_extension is not used: with a CPU-only torch it hides CUDA and does not track the
headers of .cu files, and it insists on the CUDA version that torch was built with, though nothing here needs that.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)  # the oldest torch whose stable ABI the extension asks for
PYTHON_TAG = "cp310"
DEFAULT_CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
BUILD_CHOICES = ("auto", "cpu", "cuda", "none")
# Neither -fno option changes a result: they say that errno and the floating-point exception flags are not read.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra"),
]
# A symbol that nothing provides is an error when linking, and not when a user first loads the extension.
LINKER_OPTIONS = "-z,defs,--exclude-libs,ALL" if sys.platform == "linux" else ""
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


class BuildError(SystemExit):
    def __init__(self, message: str):
        super().__init__(f"ffkernels: error: {message}")


def output_of(*command: str) -> str | None:
    """What a command prints, or None if it cannot be run."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


class CxxCompiler:
    """The C++ compiler, or in `missing` why there is none."""

    def __init__(self) -> None:
        named = os.environ.get("CXX")
        self.missing = f"no C++ compiler ({f'CXX={named!r} does not run' if named else 'c++, g++, clang++'})"
        if sys.platform == "win32":
            self.missing = "the extension is not supported on Windows"
            return
        for candidate in [named] if named else ["c++", "g++", "clang++"]:
            self.command = shlex.split(candidate)
            banner = output_of(*self.command, "--version")
            if banner:
                self.version = banner.splitlines()[0]
                self.missing = ""
                return


class CudaCompiler:
    """nvcc and what it can compile for, or in `missing` why there is none."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if home:
            self.path = os.path.join(home, "bin", "nvcc")
            self.missing = f"no nvcc (CUDA_HOME={home!r} has no bin/nvcc that runs)"
        else:
            self.path = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
            self.missing = "no nvcc (neither on PATH nor in /usr/local/cuda/bin; CUDA_HOME is not set)"
        release = re.search(r"release ([\d.]+)", output_of(self.path, "--version") or "")
        codes = output_of(self.path, "--list-gpu-code")
        if release and codes:
            self.version = release[1]
            self.supported = set(re.findall(r"sm_(\d+)", codes))
            self.missing = ""

    def archs(self) -> list[str]:
        """The architectures to compile for, as TORCH_CUDA_ARCH_LIST writes them."""
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        if not listed:
            known = [arch for arch in DEFAULT_CUDA_ARCHS if arch.replace(".", "") in self.supported]
            if not known:
                raise BuildError(f"nvcc {self.version} supports none of {DEFAULT_CUDA_ARCHS}; set TORCH_CUDA_ARCH_LIST")
            return [*known[:-1], f"{known[-1]}+PTX"]
        for arch in listed:
            number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
            if not number or number[1] + number[2] not in self.supported:
                allowed = ", ".join(f"{code[:-1]}.{code[-1]}" for code in sorted(self.supported, key=int))
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST: nvcc {self.version} does not know {arch!r}; allowed: {allowed}, each with "
                    "or without a trailing 'a', 'f' or '+PTX'"
                )
        return listed


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def choose_build() -> tuple[CxxCompiler | None, CudaCompiler | None]:
    """The compilers to build with; neither for the package without its extension."""
    choice = os.environ.get("FFKERNELS_BUILD", "auto")
    if choice not in BUILD_CHOICES:
        raise BuildError(f"FFKERNELS_BUILD={choice!r}: must be one of {', '.join(BUILD_CHOICES)}")
    if choice == "none":
        print("ffkernels: installing without the compiled extension: FFKERNELS_BUILD=none", file=sys.stderr)
        return None, None
    cxx = CxxCompiler()
    if cxx.missing:
        if choice != "auto":
            raise BuildError(f"FFKERNELS_BUILD={choice}, but {cxx.missing}")
        print(f"ffkernels: installing without the compiled extension: {cxx.missing}", file=sys.stderr)
        return None, None
    if choice == "cpu":
        return cxx, None
    nvcc = CudaCompiler()
    if nvcc.missing:
        if choice == "cuda":
            raise BuildError(f"FFKERNELS_BUILD=cuda, but {nvcc.missing}")
        return cxx, None
    return cxx, nvcc


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("the build needs torch; install it first, or leave out --no-build-isolation")
    return Path(spec.submodule_search_locations[0])


def escape(text: object) -> str:
    """Text as a path or value in a ninja file."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def joined(arguments: list[str]) -> str:
    """Arguments as a command line in a ninja file."""
    return shlex.join(arguments).replace("$", "$$")


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the file's time alone where nothing changed, so that ninja does not rebuild."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildWithNinja(build_ext):
    """Compiles and links through ninja, so that only what changed is built again."""

    def build_extension(self, ext: Extension) -> None:
        # setuptools makes an editable build in a new temporary folder: no object would ever be found again.
        folder = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        archs = nvcc.archs() if nvcc else []
        torch = torch_directory()
        info = {
            "version": self.distribution.get_version(),
            "compiler": cxx.version,
            "cuda": nvcc.version if nvcc else None,
            "cuda_archs": archs,
            "torch": re.search(r"__version__ = '(.*)'", (torch / "version.py").read_text())[1],
            "torch_abi": ".".join(map(str, TORCH_TARGET)),
            "sources": ext.sources,
        }
        write_if_changed(folder / "build_info.inc", f'R"json({json.dumps(info)})json"\n')
        write_if_changed(folder / "build.ninja", ninja_file(ext.sources, archs, torch, folder, target))
        print(f"ffkernels: building {target.name}")
        for key, value in info.items():
            print(f"    {key}: {' '.join(value) if isinstance(value, list) else value}", flush=True)
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not re.fullmatch(r"[1-9]\d*", jobs):
            raise BuildError(f"MAX_JOBS={jobs!r}: must be a positive number")
        if importlib.util.find_spec("ninja") is None:
            raise BuildError("the build needs ninja; install it first, or leave out --no-build-isolation")
        command = [sys.executable, "-m", "ninja", "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode != 0:
            raise BuildError("compilation failed, see above (FFKERNELS_BUILD=cpu leaves CUDA out, none leaves out all)")


def ninja_file(sources: list[str], archs: list[str], torch: Path, folder: Path, target: Path) -> str:
    shared = [
        f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
        *(["-DFFKERNELS_WITH_CUDA"] if nvcc else []),
        *("-I", str(ROOT / "csrc"), "-I", str(folder), "-isystem", str(torch / "include")),
    ]
    libraries = ["-L", str(torch / "lib"), "-ltorch_cpu"]
    compilers = {".cpp": [*cxx.command, *CXX_FLAGS, *shared]}
    linker = [*cxx.command, "-shared", *([f"-Wl,{LINKER_OPTIONS}"] if LINKER_OPTIONS else [])]
    if nvcc:
        host = ["-ccbin", cxx.command[-1]]
        compilers[".cu"] = [nvcc.path, *host, *NVCC_FLAGS, *gencode_flags(archs), *shared]
        # nvcc knows where its libraries are. The static runtime looks for the driver when it is first used, so the
        # extension loads on machines without one.
        linker = [nvcc.path, *host, "-shared", "-nodlink", "--cudart=static", f"-Xlinker={LINKER_OPTIONS}"]
    lines = []
    for suffix, command in compilers.items():
        lines += [f"rule compile{suffix}", f"  command = {joined(command)} -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $out"]
    lines += ["rule link", f"  command = {joined(linker)} $in {joined(libraries)} -o $out", "  description = link $out"]
    for source in sources:
        lines.append(f"build {escape(source)}.o: compile{Path(source).suffix} {escape(ROOT / source)}")
    lines.append(f"build {escape(target)}: link {' '.join(f'{escape(source)}.o' for source in sources)}")
    return "\n".join(lines) + "\n"


cxx, nvcc = choose_build()
sources = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".cpp", ".cu") and (nvcc or path.parent.name != "cuda")
)
setup(
    ext_modules=[Extension("ffkernels._C", sources, py_limited_api=True)] if cxx else [],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
)
