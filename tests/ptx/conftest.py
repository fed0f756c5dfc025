"""Which tools the tests of the interpreter need. A machine that has them all skips nothing."""

import pytest

from . import engine, nvcc


def pytest_runtest_setup(item):
    missing = {
        "gxx": None if engine.compiler() else "no C++ compiler (g++) for the interpreter's engine",
        "nvcc": None if nvcc.nvcc() else "no nvcc to compile CUDA kernels",
        "triton": None if _has("triton") else "triton is not installed",
        "liger": None if _has("liger_kernel") else "liger-kernel is not installed (pip install --no-deps liger-kernel)",
    }
    needs = {"gxx", *(name for mark in item.iter_markers("needs") for name in mark.args)}
    for name in needs:
        if missing[name]:
            pytest.skip(missing[name])


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(tool, ...): tools without which the test is skipped: nvcc, triton, liger")
