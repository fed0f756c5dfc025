"""Runs the Triton backend's own launcher without a GPU: its launches compiled for an architecture, executed as PTX."""

import contextlib
import math
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
def chosen(tile, splits=1, update=None):
    """While open, every product runs on this tile; updates on one of their own if it is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose", lambda *args: tile)
        patch.setattr(plan, "choose_split", lambda *args: (update or tile, splits))
        plan.plan.cache_clear()
        yield
    plan.plan.cache_clear()


@contextlib.contextmanager
def on_ptx(arch, tile=None, splits=1, update=None, **run_options):
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
            chosen(tile, splits, update) if tile else contextlib.nullcontext(),
            ptx.triton_launches(arch, **run_options) as reports,
        ):
            yield reports
    finally:
        torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def recorded_plans():
    """While open, collects the launches that are planned."""
    planned, original = [], plan.plan

    def recorded(*args):
        launches = original(*args)
        planned.extend(launches)
        return launches

    recorded.cache_clear = original.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "plan", recorded)
        yield planned


def assert_as_planned(reports, planned):
    """The PTX interpreter's counts of what the kernels did are those that the cost model has of them."""
    assert [r.kernel for r in reports] == [launch.kernel for launch in planned]
    assert [math.prod(r.grid) for r in reports] == [launch.blocks for launch in planned]
    for found, launch in zip(reports, planned, strict=True):
        moved = launch.bytes_read + launch.bytes_written
        ends = 32 * sum(r.bytes_touched > 0 for r in found.regions)  # whole sectors are counted: a tensor ends in one
        assert abs(found.l2_unique_bytes - moved) <= 0.02 * moved + ends, launch.kernel
        flops = 0 if launch.rate == "fp32" else launch.flops
        if launch.kernel == "label_update_kernel":  # warps that a narrow product has no part for repeat another's
            assert found.tensor_flops >= flops
        else:
            assert found.tensor_flops == flops, launch.kernel


def table(arch, mode, update=False, labelled=False):
    return tiles.candidates(f"sm_{arch}", kind_of(mode), update, labelled)
