"""Faults planted in the kernels' sources: the interpreter, the comparison with float64 or the counters catch each."""

import shutil

import ptx
import pytest

from . import emulate
from .test_kernels import arguments, assert_exact
from .test_minibatches import assert_same, minibatches, with_tiny_coefficients

pytestmark = [pytest.mark.needs("nvcc"), pytest.mark.slow]

STEP = ("ff_step_", (70, 70, 70), {"grid": 4})
# name: (file, source, with the fault, how it shows, what to run)
FAULTS = {
    "no barrier between the warps of a slab": (
        "slabs.cuh", "      __syncthreads();  // the step's slab", "      // the step's slab", "uninitialised", STEP),
    "a wait that leaves a copy out": (
        "slabs.cuh", "wait_for_copies<kAhead - 1>();", "wait_for_copies<kAhead>();", "not waited for", STEP),
    "fragments in the wrong order": (
        "products.cuh", "multiply<math>(sums + 16 * i + 4 * j, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);",
        "multiply<math>(sums + 16 * i + 4 * j, a[i], b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]);", "wrong", STEP),
    "a row too many": (
        "slabs.cuh", "? from.rows - row : 0", "? from.rows + 1 - row : 0", "out of range", STEP),
    "a column too many": (
        "slabs.cuh", "col < from.cols ?", "col <= from.cols ?", "out of range",
        ("ff_forward", (70, 71, 70), {})),
    "chunks in their places": (
        "slabs.cuh", "chunks == 8 ? chunk ^ (row & 7)", "chunks == 8 ? chunk", "bank conflicts", STEP),
    "no store mask": (
        "forward.cuh", "      if (b < rows) {\n        const int64_t to", "      {\n        const int64_t to",
        "out of range", STEP),
    "shared memory reused too early": (
        "stages.cuh", "      __syncthreads();  // the item before", "      // the item before", "not waited for",
        ("ff_step_", (70, 70, 70), {"grid": 1})),
    "no release in the grid's barrier": (
        "ptx.cuh", "atom.acq_rel.gpu", "atom.acquire.gpu", "race", STEP),
    "no acquire in the grid's barrier": (
        "ptx.cuh", "ld.acquire.gpu", "ld.relaxed.gpu", "race", STEP),
    "warps that arrive at the grid's barrier by themselves": (
        "block.cuh", "  constexpr uint32_t kTop = 0x80000000u;\n  __syncthreads();",
        "  constexpr uint32_t kTop = 0x80000000u;", "race", ("ff_update_", (70, 70, 70), {"grid": 4})),
    "no barrier between stages": (
        "stages.cuh", "if (stage > params.stage_begin) grid_barrier", "if (false) grid_barrier", "uninitialised", STEP),
    "a barrier that waits for one block too many": (
        "block.cuh", "kTop - (gridDim.x - 1)", "kTop - gridDim.x", "deadlock", STEP),
    "the step count raised by the first block to leave": (
        "stages.cuh", "last_to_arrive(params.workspace.words + kLeftWord, gridDim.x, flag) &&", "blockIdx.x == 0 &&",
        "race", STEP),
    "counters that are not ready for the next launch": (
        "block.cuh", "if (last) *counter = 0;", "", "words", STEP),
    "the sum of a split tile before its last part": (
        "update.cuh", "last_to_arrive(weight_counters(params, index) + tile, splits, flag)",
        "last_to_arrive(weight_counters(params, index) + tile, splits - 1, flag)", "uninitialised",
        ("ff_update_", (140, 70, 70), {"splits": 2, "grid": 4})),
}  # fmt: skip


def with_fault(tmp_path, file, source, fault, math="bf16"):
    folder = tmp_path / "csrc" / "cuda"
    shutil.copytree(emulate.SOURCES / "cuda", folder)
    text = (folder / file).read_text()
    assert text.count(source) >= 1
    (folder / file).write_text(text.replace(source, fault))
    return ptx.compile_cuda(folder / f"stages_{math}.cu", "sm_80", includes=[tmp_path / "csrc"])


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, tmp_path):
    file, source, fault, shows, (op, shape, launch) = FAULTS[name]
    module = with_fault(tmp_path, file, source, fault)
    given, reports = arguments(op, shape, "bf16"), []
    if shows in ("wrong", "bank conflicts", "words"):
        if shows == "words":
            with pytest.raises(AssertionError, match="tensor"):
                emulate.run(op, given, text=module, **launch)
            return
        results = emulate.run(op, given, text=module, reports=reports, **launch)
        if shows == "bank conflicts":
            assert reports[0].bank_conflicts > 0
        else:
            with pytest.raises(AssertionError, match="error"):
                assert_exact(op, given, "bf16", results)
    else:
        with pytest.raises(ptx.PtxFault) as caught:
            emulate.run(op, given, text=module, **launch)
        assert shows in caught.value.kind


# of several minibatches in a launch: (file, source, with the fault, how it shows, math)
OF_MINIBATCHES = {
    "a minibatch too close behind the one before": (
        "params.h", "constexpr int kBehind = 2;", "constexpr int kBehind = 1;", "race", "bf16"),
    "no barrier where a minibatch begins": (
        "stages.cuh", "if (stage > params.stage_begin) grid_barrier",
        "if (stage > params.stage_begin && stage % kBehind > 0) grid_barrier", "uninitialised", "bf16"),
    "one buffer for what a layer hands on": (
        "forward.cuh", "minibatch % kInTurn * layer.y_minibatch", "0 * layer.y_minibatch", "race", "bf16"),
    "a step count that stands still within the launch": (
        "update.cuh", "begin_step(layer.optimizer, minibatch - params.minibatches.begin)",
        "begin_step(layer.optimizer)", "other bits", "bf16"),
    "a step count that is raised once": (
        "stages.cuh", "layer.optimizer.step += static_cast<float>(steps)", "layer.optimizer.step += 1.f", "other steps",
        "bf16"),
    "the signs of the first minibatch": (
        "rows.cuh", "minibatch * params.minibatches.sign", "0", "other bits", "bf16"),
    "the range of the coefficients so far": (
        "rows.cuh", "kInTurn * index + minibatch % kInTurn", "kInTurn * index", "other bits", "fp16"),
    "a range that is never reset": (
        "rows.cuh", "*range_word(params, index, minibatch + 1) = 0;", ";", "other bits", "fp16"),
    "counters of all layers in one place": (
        "rows.cuh", "kRowWords + index * counter_count", "kRowWords + 0 * counter_count", "", "bf16"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_MINIBATCHES)
def test_planted_fault_of_minibatches_is_caught(name, tmp_path):
    file, source, fault, shows, math = OF_MINIBATCHES[name]
    module = with_fault(tmp_path, file, source, fault, math)
    given = minibatches(math, (40, 70, 66, 70), 3, 70)
    with_tiny_coefficients(given, slice(1, None))
    assert_same(given, grid=4)  # without the fault
    if shows.startswith("other"):
        with pytest.raises(AssertionError):
            assert_same(given, grid=4, text=module)
    else:
        with pytest.raises(ptx.PtxFault) as caught:
            assert_same(given, grid=4, text=module)
        assert shows in caught.value.kind
