"""What the kernels do to memory, counted by the interpreter."""

import pytest
import torch

from . import emulate
from .arithmetic import DTYPES
from .params import MATHS
from .test_kernels import arguments, network

pytestmark = pytest.mark.needs("nvcc")


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("widths", [(128, 64, 96), (100, 68, 34), (67, 35, 33)], ids=str)
@pytest.mark.parametrize("labels", [False, True])
def test_no_bank_conflicts(math, widths, labels):
    """Rows that 16, 8, 4 and (with 2-byte elements) only 2 bytes divide."""
    reports = []
    emulate.run("ff_network_step_", network(math, widths, 70, labels=labels), reports=reports)
    assert reports[0].bank_conflicts == 0, reports[0].conflicts()
    if math != "f32":
        assert reports[0].by_class["tensor"] > 0


@pytest.mark.parametrize("math", ["bf16", pytest.param("f32_bf16", marks=pytest.mark.slow)])
def test_memory_traffic_is_near_the_least(math):
    """A layer's step of 64 positive and 64 negative rows, 784 to 500 wide, with Adam: weight and moments once in, once
    out; x once in; y once out, and in again for the update.
    """
    given = arguments("ff_step_", (128, 784, 500), math, peers=False, sqnorm=False, optimizer="adam")
    reports = []
    emulate.run("ff_step_", given, reports=reports, sms=8)
    size = DTYPES.get(math, torch.float32).itemsize
    weight, moments = 2 * 784 * 500 * size, 2 * 2 * 784 * 500 * 4
    least = weight + moments + 128 * 784 * size + 2 * 128 * 500 * size
    assert len(reports) == 1  # launches
    assert least <= reports[0].l2_unique_bytes <= 1.03 * least


@pytest.mark.parametrize("math", ["bf16", "tf32"])
def test_tensor_operations_are_those_of_the_tiles(math):
    """Two products of whole tiles, and no more."""
    rows, depth, cols = 128, 192, 64
    reports = []
    emulate.run("ff_step_", arguments("ff_step_", (rows, depth, cols), math), reports=reports)
    assert reports[0].tensor_flops == 2 * (2 * rows * depth * cols)


def test_loads_take_few_instructions():
    """What each product of a warp costs in instructions, loads, epilogue and all."""
    reports = []
    emulate.run("ff_forward", arguments("ff_forward", (128, 784, 512), "bf16"), reports=reports)
    counts = reports[0].by_class
    assert sum(counts.values()) <= 14 * counts["tensor"]


def test_labelled_rows_share_their_product():
    """Positive and negative rows are multiplied once, but for the update of the tile that holds the labels' columns."""
    rows, depth, cols = 64, 192, 64
    reports = []
    emulate.run("ff_label_step_", arguments("ff_label_step_", (rows, depth, cols), "bf16"), reports=reports)
    forward, update = 2 * rows * depth * cols, 2 * rows * (depth + 64) * cols
    assert reports[0].tensor_flops == forward + update
