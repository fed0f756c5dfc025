"""The plan's counts: against what the compiled kernels do in the PTX interpreter, and against the least possible."""

import importlib.util

import pytest
import torch
from triton_cases import assert_as_planned, recorded_plans

import ffkernels as ff
from ffkernels.benchmark.cases import CASES, layers_of, op_of
from ffkernels.benchmark.formats import FORMATS
from ffkernels.benchmark.planned import triton
from ffkernels.cost import DEVICES, limit, minimum, once, predicted
from ffkernels.triton import tiles

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# op, operands' dtype, precision, rows, inputs, outputs: whole tiles and ragged ones, split and not
LAYERS = [
    pytest.param(80, torch.bfloat16, "highest", (256, 192, 256), id="sm_80-bf16"),
    pytest.param(80, torch.float32, "high", (200, 176, 144), id="sm_80-tf32-ragged"),
    pytest.param(80, torch.bfloat16, "highest", (1024, 64, 64), id="sm_80-bf16-split"),
    pytest.param(90, torch.bfloat16, "highest", (256, 192, 256), id="sm_90-bf16"),
    pytest.param(90, torch.bfloat16, "highest", (200, 180, 140), id="sm_90-bf16-ragged"),
]


def step(arch, dtype, precision, shape):
    """The reports of a step's launches in the PTX interpreter, and its plan."""
    import ptx

    from ffkernels.triton import launch
    from ffkernels.triton.device import stand_in

    rows, depth, cols = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, depth).to(dtype), torch.randn(cols, depth).to(dtype)
    bias = torch.zeros(cols, dtype=dtype)
    optimizer = ff.Adam(lr=1e-3)
    state = optimizer.init_state(weight, bias)
    sign = torch.ones(rows)
    sign[rows // 2 :] = -1
    with stand_in(f"sm_{arch}"), ptx.triton_launches(arch) as reports, recorded_plans() as planned:
        launch.ff_step_(
            x, sign, weight, bias, list(state.values()), optimizer.kind, None, optimizer.hyper, 2.0, 1.0, "mean",
            None, "l2", 1e-4, "relu", None, None, precision,
        )  # fmt: skip
    return reports, planned


@pytest.mark.slow
@NEEDS_TRITON
@pytest.mark.parametrize(("arch", "dtype", "precision", "shape"), LAYERS)
def test_the_kernels_do_what_the_plan_says(arch, dtype, precision, shape):
    """On every tile of the table, and for labelled steps, test_triton_kernels.py asserts the first of it."""
    reports, planned = step(arch, dtype, precision, shape)
    assert_as_planned(reports, planned)
    assert len(reports) == 2 + (planned[-1].splits > 1)
    for found, launch in zip(reports, planned, strict=True):
        assert found.l2_unique_bytes == pytest.approx(launch.bytes_read + launch.bytes_written, rel=0.02)
        # threads of a block ask for the rows' factors several times, which weighs more the smaller the matrices are
        asked = launch.bytes_requested + launch.bytes_written
        assert asked <= found.global_bytes <= 1.15 * asked


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_launches_and_bytes_at_the_benchmark_shapes(case, fmt):
    """Two launches a layer, a third where the update's sum is split; at most 1.15 of the least possible bytes."""
    for device in DEVICES.values():
        launches = triton(case, fmt, device)
        splits = sum(launch.kernel == "reduce_kernel" for launch in launches)
        layers = len(case.sizes) - 1
        assert len(launches) - splits <= 2 * layers
        assert splits <= layers
        if case.kind == "network" and device.name == "H100":
            assert splits == 0
        least = minimum(op_of(case), layers_of(case, fmt.dtype))
        moved = sum(launch.bytes for launch in launches)
        assert moved <= 1.15 * least.bytes, device.name
        # what the tiles pad is all that is computed beyond the least; a one-hot product writes the labels
        computed = sum(launch.flops for launch in launches)
        assert least.flops <= computed


def test_the_largest_step_is_predicted_near_the_limit():
    """On H100 in bf16. The model does not know what a loop issues beside its products: docs/gpu.md."""
    case = next(case for case in CASES if case.name == "step 4096 x 2000->2000")
    fmt, device = FORMATS["bf16"], DEVICES["H100"]
    least = limit(once(op_of(case), layers_of(case, fmt.dtype)), device, fmt.rate)
    assert least >= 0.7 * predicted(triton(case, fmt, device), device)


def test_the_plan_stands_for_the_same_gpus():
    for device in DEVICES.values():
        gpu = tiles.DEVICES[device.arch]
        assert gpu.sms == device.multiprocessors
        # rates a clock, at one and the same clock
        assert gpu.flops_16bit / gpu.flops_tf32 == pytest.approx(device.rates["bf16"] / device.rates["tf32"], rel=0.03)
