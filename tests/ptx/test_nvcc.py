"""Compiling CUDA C++ to PTX, and the cache of what was compiled."""

import subprocess

import pytest
import torch

from . import compile_cuda, engine, kernels, nvcc, run

pytestmark = pytest.mark.needs("nvcc")


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """Counts the runs of the compiler, on a cache of its own."""
    engine.library()  # from the usual cache
    nvcc._nvcc_version()  # asked once, and not counted
    monkeypatch.setenv("FFKERNELS_TEST_CACHE", str(tmp_path / "cache"))
    runs = []
    original = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: runs.append(command) or original(command, **kwargs)
    )
    return runs


def test_cache_follows_sources_headers_and_flags(compilations, tmp_path):
    header, source = tmp_path / "value.h", tmp_path / "kernel.cu"
    header.write_text("#define VALUE 3\n")
    source.write_text('#include "value.h"\nextern "C" __global__ void k(int* x) { *x = VALUE; }\n')

    def value(**options):
        x = torch.zeros(1, dtype=torch.int32)
        run(compile_cuda(source, **options), "k", 1, 1, 0, [x])
        return x.item()

    assert (value(), value(), len(compilations)) == (3, 3, 1)
    header.write_text("#define VALUE 4\n")
    assert (value(), value(), len(compilations)) == (4, 4, 2)
    assert (value(arch="sm_90"), len(compilations)) == (4, 3)
    assert value(flags=["-DOTHER"]) == 4
    source.write_text(source.read_text().replace("VALUE;", "VALUE + 1;"))
    assert (value(), len(compilations)) == (5, 5)


def test_includes_and_names(tmp_path):
    (tmp_path / "half.h").write_text("template <class T> __device__ T half_of(T x) { return x / 2; }\n")
    text = compile_cuda(
        '#include "half.h"\ntemplate <class T> __global__ void k(T* x) { *x = half_of(*x); }\n'
        "template __global__ void k<float>(float*);\ntemplate __global__ void k<int>(int*);\n",
        includes=[tmp_path],
    )
    names = kernels(text)
    assert len(names) == 2
    for name, x in zip(sorted(names), (torch.tensor([5.0]), torch.tensor([5], dtype=torch.int32)), strict=True):
        half = x / 2 if x.is_floating_point() else x // 2
        run(text, name, 1, 1, 0, [x])
        assert torch.equal(x, half)


def test_errors_are_those_of_the_compiler():
    with pytest.raises(RuntimeError, match='identifier "undeclared" is undefined'):
        compile_cuda("__global__ void k() { undeclared(); }")
