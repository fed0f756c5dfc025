"""Runs the Triton backend's own launcher without a GPU: its launches compiled for an architecture, executed as PTX."""

import contextlib
import os

import ptx
import pytest
import torch

import ffkernels as ff
from ffkernels.triton import device, plan, tiles

ARCHS = (80, 90)
MODES = {  # dtype and precision, by the name of their products
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "medium": (torch.float32, "medium"),
    "exact": (torch.float32, "highest"),
}


def kind_of(mode):
    """The tile table's word for it."""
    return "16bit" if mode in ("bf16", "fp16") else mode


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """Compiled kernels in a cache of these tests; ptxas, whose result the interpreter does not run, is left out."""
    from triton.backends.nvidia.compiler import CUDABackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(CUDABackend, "make_cubin", lambda self, src, metadata, opt, capability: b"")
        yield


@contextlib.contextmanager
def chosen(tile, splits=1):
    """While open, every product runs on this tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose", lambda *args: tile)
        patch.setattr(plan, "choose_split", lambda *args: (tile, splits))
        plan.plan.cache_clear()
        yield
    plan.plan.cache_clear()


@contextlib.contextmanager
def on_ptx(arch, tile=None, splits=1, **run_options):
    """While open, the ops run on Triton kernels compiled for sm_<arch>; yields the reports of their launches.

    Fresh memory holds NaN, so that a value read before it was written does not go unnoticed.
    """
    assert "TRITON_CACHE_DIR" in os.environ, "needs the fixture compiled_once"
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with (
            device.stand_in(f"sm_{arch}"),
            ff.use_backend("triton"),
            chosen(tile, splits) if tile else contextlib.nullcontext(),
            ptx.triton_launches(arch, **run_options) as reports,
        ):
            yield reports
    finally:
        torch.use_deterministic_algorithms(deterministic)


def table(arch, mode, update=False):
    return tiles.candidates(f"sm_{arch}", kind_of(mode), update)
