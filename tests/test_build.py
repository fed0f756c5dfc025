"""Building the package in every way a user may: wheels, sdist, each FFKERNELS_BUILD, missing and misused compilers."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
HAS_NVCC = shutil.which("nvcc") is not None or os.path.exists("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

RUN_FORWARD = """
import json, torch, ffkernels
from ffkernels import _extension
x, weight = torch.randn(5, 7), torch.randn(3, 7)
y, goodness = ffkernels.ff_forward(x, weight)
row_scale = 1 / (x.norm(dim=1, keepdim=True) + 1e-4)
assert torch.allclose(y, torch.relu(row_scale * (x @ weight.t())), atol=1e-5)
if _extension.unavailable() is None:
    assert torch.equal(y, torch.ops.ffkernels.ff_forward.cpu(
        x, weight, None, None, "l2", 1e-4, "relu", "highest", False)[0])
print(json.dumps({"file": ffkernels.__file__, "unavailable": _extension.unavailable(),
                  "info": _extension.build_info(), "devices": _extension.cuda_devices()}))
"""


def run(*command, cwd, check=True, **environment):
    """Runs a command under the given environment variables; None takes a variable away."""
    unset = ("FFKERNELS_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    # The development versions, in isolated builds too (which newer pips constrain by a variable of its own).
    env |= {"PIP_CONSTRAINT": "constraints.txt", "PIP_BUILD_CONSTRAINT": "constraints.txt"}
    env |= {key: str(value) for key, value in environment.items()}
    result = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not check or result.returncode == 0, result.stdout
    return result


def setup_py(source, *arguments, **options):
    return run(sys.executable, "setup.py", *arguments, cwd=source, **options)


def build_wheel(source, folder, *options, requirement=".", **environment):
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), *options, requirement),
        cwd=source,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def install(wheel, folder):
    """Unpacks a wheel into a folder of its own and runs a forward pass with it; what the extension there says."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), str(wheel), cwd=ROOT)
    report = json.loads(run(sys.executable, "-c", RUN_FORWARD, cwd=folder, PYTHONPATH=folder).stdout.splitlines()[-1])
    assert Path(report["file"]).is_relative_to(folder)
    return report


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(ROOT, tmp_path / "a source tree", ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `pip wheel .` makes, build isolation and all."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    return build_wheel(source, folder, TORCH_CUDA_ARCH_LIST="8.0")  # all of them take minutes


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("ffkernels/_C.abi3.so", tmp_path_factory.mktemp("library")))


@needs_compiler
def test_wheel_holds_the_package(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert re.fullmatch(rf"ffkernels-[\d.]+-cp310-abi3-{platform}\.whl", wheel.name)
    files = contents(wheel)
    assert {"ffkernels/_C.abi3.so", "ffkernels/py.typed", "ffkernels/__init__.py"} <= files
    assert all(file.startswith(("ffkernels/", "ffkernels-")) for file in files)


@needs_compiler
def test_wheel_runs_in_a_fresh_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", str(wheel), cwd=ROOT)
    report = json.loads(run(python, "-c", RUN_FORWARD, cwd=tmp_path).stdout.splitlines()[-1])
    assert Path(report["file"]).is_relative_to(tmp_path / "venv")
    assert report["unavailable"] is None
    assert (report["info"]["cuda"] is not None) == HAS_NVCC


@needs_compiler
def test_library_asks_for_the_stable_abi_only(library):
    symbols = run("nm", "-D", "--undefined-only", str(library), cwd=ROOT).stdout.split("\n")
    names = [re.split(r"[ @]+", line.strip())[1] for line in symbols if line]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [
        name for name in names if re.match(r"_?Py|cu[A-Z]|cuda|cudart|__cuda|_ZNK?\d?\d?(2at|3c10|5torch)", name)
    ]
    needed = run("readelf", "-d", str(library), cwd=ROOT).stdout
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"NEEDED.*lib(torch_cuda|c10|cudart|cuda|python)", needed)


@needs_compiler
def test_library_exports_nothing(library):
    exported = run("nm", "-D", "--defined-only", str(library), cwd=ROOT).stdout.splitlines()
    # Weak symbols are templates of the standard library and torch's headers that a linker may merge.
    assert [line for line in exported if " T " in line] == []


@needs_compiler
def test_sdist_builds_into_a_wheel(source, tmp_path):
    for name in (".clang-format", ".pre-commit-config.yaml", ".ci/run"):  # `make lint` and a test read them
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    make_sdist = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    # Made without compilers, it still has all sources.
    run(sys.executable, "-c", make_sdist, cwd=source, FFKERNELS_BUILD="none")
    (sdist,) = tmp_path.glob("*.tar.gz")
    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(sdist, unpacked)
    (folder,) = unpacked.iterdir()
    # what the README's commands, the documents and the tests need
    missing = {path.name for path in source.iterdir()} - {path.name for path in folder.iterdir()}
    assert missing == set()
    for name in ("csrc", "tests", "docs", "examples", "bench", ".ci"):
        assert {p.relative_to(source) for p in (source / name).rglob("*")} <= {
            p.relative_to(folder) for p in folder.rglob("*")
        }
    wheel = build_wheel(ROOT, tmp_path, "--no-build-isolation", requirement=str(sdist), FFKERNELS_BUILD="cpu")
    assert "ffkernels/_C.abi3.so" in contents(wheel)


@pytest.mark.parametrize(
    ("environment", "notice"),
    [
        ({"FFKERNELS_BUILD": "none"}, "FFKERNELS_BUILD=none"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler (CXX='/nowhere/c++' does not run)"),
        ({"PATH": "/nowhere"}, "no C++ compiler (c++, g++, clang++)"),
    ],
)
def test_without_a_compiler_the_package_falls_back(source, tmp_path, environment, notice):
    (source / "ffkernels" / "_C.abi3.so").write_bytes(b"left behind by an earlier build")
    output = setup_py(source, "--version", **environment).stdout
    assert output.count(f"ffkernels: installing without the compiled extension: {notice}") == 1
    wheel = build_wheel(source, tmp_path, "--no-build-isolation", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [file for file in contents(wheel) if file.endswith(".so")]
    report = install(wheel, tmp_path / "installed")
    assert "not built" in report["unavailable"]
    assert report["info"] is report["devices"] is None


@needs_compiler
@pytest.mark.parametrize("environment", [{"FFKERNELS_BUILD": "cpu"}, {"CUDA_HOME": "/nowhere"}])
def test_without_nvcc_or_with_choice_cpu_there_is_no_cuda(source, tmp_path, environment):
    wheel = build_wheel(source, tmp_path, "--no-build-isolation", **environment)
    report = install(wheel, tmp_path / "installed")
    assert report["unavailable"] is None
    assert report["info"]["cuda"] is None
    assert report["info"]["cuda_archs"] == []
    assert report["devices"]["error"] == "built without CUDA"


@needs_nvcc
@needs_compiler
def test_listed_architectures_are_built(source):
    output = setup_py(
        source, "build_ext", "--inplace", FFKERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX"
    ).stdout
    assert "cuda_archs: 8.0 9.0a+PTX" in output
    assert "warning" not in output
    (cuobjdump, *_) = [
        *glob.glob(sysconfig.get_path("purelib") + "/triton/backends/nvidia/bin/cuobjdump"),
        "/usr/local/cuda/bin/cuobjdump",
    ]
    library = str(source / "ffkernels" / "_C.abi3.so")
    found = {
        kind: set(re.findall(r"sm_\w+", run(cuobjdump, f"--list-{kind}", library, cwd=source).stdout))
        for kind in ("elf", "ptx")
    }
    assert found == {"elf": {"sm_80", "sm_90a"}, "ptx": {"sm_90a"}}


@needs_nvcc
@needs_compiler
def test_only_what_changed_is_built_again(source):
    def compiled():
        output = setup_py(source, "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST="8.0").stdout
        return {Path(name).name for name in re.findall(r"compile (\S+)\.o", output)}, "link" in output

    everything = {path.name for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert compiled() == (everything, True)
    assert compiled() == (set(), False)
    with open(source / "csrc" / "cuda" / "device.h", "a") as header:
        header.write("// a change\n")
    assert compiled() == ({"ops.cpp", "device.cu"}, True)


WRONG_VALUES = [
    ({"FFKERNELS_BUILD": "gpu"}, "FFKERNELS_BUILD='gpu': must be one of auto, cpu, cuda, none"),
    ({"FFKERNELS_BUILD": "cpu", "CXX": "/nowhere/c++"}, "FFKERNELS_BUILD=cpu, but no C++ compiler"),
    ({"FFKERNELS_BUILD": "cuda", "CXX": "/nowhere/c++"}, "FFKERNELS_BUILD=cuda, but no C++ compiler"),
    ({"FFKERNELS_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "FFKERNELS_BUILD=cuda, but no nvcc (CUDA_HOME='/nowhere'"),
    ({"FFKERNELS_BUILD": "cpu", "MAX_JOBS": "0"}, "MAX_JOBS='0': must be a positive number"),
    ({"FFKERNELS_BUILD": "cpu", "MAX_JOBS": "all"}, "MAX_JOBS='all': must be a positive number"),
]


@needs_compiler
@pytest.mark.parametrize(("environment", "message"), WRONG_VALUES)
def test_wrong_values_are_errors(source, environment, message):
    result = setup_py(source, "build_ext", check=False, **environment)
    assert result.returncode != 0
    assert f"ffkernels: error: {message}" in result.stdout
    assert "Traceback" not in result.stdout


@needs_nvcc
@needs_compiler
@pytest.mark.parametrize("archs", ["3.5", "8.0;ninety", "90", "Hopper"])
def test_unknown_architectures_are_errors(source, archs):
    result = setup_py(source, "build_ext", check=False, TORCH_CUDA_ARCH_LIST=archs)
    assert result.returncode != 0
    assert re.search(
        r"ffkernels: error: TORCH_CUDA_ARCH_LIST: nvcc [\d.]+ does not know .*; allowed: .*9\.0", result.stdout
    )


@needs_compiler
def test_max_jobs_reaches_ninja_and_its_failure_is_an_error(source, tmp_path):
    (tmp_path / "ninja").mkdir()
    (tmp_path / "ninja" / "__init__.py").touch()
    (tmp_path / "ninja" / "__main__.py").write_text("import sys; print('ninja', *sys.argv[1:]); sys.exit(1)")
    environment = {"FFKERNELS_BUILD": "cpu", "MAX_JOBS": "3", "PYTHONPATH": tmp_path}
    result = setup_py(source, "build_ext", check=False, **environment)
    assert re.search(r"^ninja -C .* -j 3$", result.stdout, re.MULTILINE)
    assert result.returncode != 0
    assert "ffkernels: error: compilation failed" in result.stdout
