"""The cost model: counts by hand, the usual implementation counted, times that follow from rates and assumptions."""

import pytest
import torch

from ffkernels import cost
from ffkernels.benchmark.cases import CASES, Case
from ffkernels.benchmark.count import Counter, autograd
from ffkernels.cost import DEVICES, Launch, Layer, Work, limit, minimum, once, predicted, rate_name

A_CHIP = cost.Device(
    "a chip", "sm_1", 10, 1e12, 1 << 20, 4e12, {"bf16": 1e14, "fp16": 1e14, "tf32": 5e13, "fp32": 1e13}, 3e-6, "here"
)
BF16 = Layer(rows=64, inputs=30, outputs=20)
FLOAT = Layer(rows=64, inputs=30, outputs=20, dtype=torch.float32, slots=1, bias=False, sqnorm_given=True)
LABELLED = Layer(rows=64, inputs=30, outputs=20, images=32)


def test_forward_by_hand():
    x, w, b, y = 64 * 30, 20 * 30, 20, 64 * 20
    assert minimum("ff_forward", BF16) == Work(2 * 64 * 30 * 20, 2 * (x + w + b), 2 * y + 4 * 64)
    assert minimum("ff_forward", FLOAT) == Work(2 * 64 * 30 * 20, 4 * (x + w) + 4 * 64, 4 * y + 4 * 64)
    assert once("ff_forward", BF16) == minimum("ff_forward", BF16)


def test_gradient_and_update_by_hand():
    x, w, b, y, rows = 64 * 30, 20 * 30, 20, 64 * 20, 64
    flops, operands = 2 * 64 * 30 * 20, 2 * (x + y) + 4 * rows + 4 * rows  # x, y, coefficients, squared norms
    assert minimum("ff_grad", BF16) == Work(flops, operands, 2 * (w + b))
    parameters = 2 * (w + b) + 2 * 4 * (w + b) + 4  # Adam: two float32 moments, and the step
    assert minimum("ff_update_", BF16) == Work(flops, operands + parameters, parameters)
    assert minimum("ff_update_", FLOAT).bytes_written == 4 * w + 4 * w + 4


@pytest.mark.parametrize("layer", [BF16, FLOAT], ids=["bf16", "float32"])
def test_a_step_is_its_two_products(layer):
    parts = minimum("ff_forward", layer) + minimum("ff_update_", layer)
    step = minimum("ff_step_", layer)
    assert (step.flops, step.launches) == (parts.flops, 2)
    assert step.bytes == parts.bytes + 4 * layer.rows + 4  # signs and the loss


def test_a_step_on_a_chip_that_forgets_nothing():
    x, w, b, y, rows = 64 * 30, 20 * 30, 20, 64 * 20, 64
    parameters = 10 * (w + b) + 4
    assert once("ff_step_", BF16) == Work(
        4 * 64 * 30 * 20, 2 * x + 4 * rows + parameters, parameters + 2 * y + 4 * rows + 4
    )
    assert once("ff_step_", BF16).bytes < minimum("ff_step_", BF16).bytes


def test_a_network_reads_its_input_and_parameters_and_writes_goodness():
    layers = [Layer(64, 30, 20), Layer(64, 20, 10, sqnorm_given=True)]
    parameters = sum(10 * (k * n + n) + 4 for k, n in ((30, 20), (20, 10)))
    assert once("ff_network_step_", layers) == Work(
        4 * 64 * (30 * 20 + 20 * 10), 2 * 64 * 30 + 4 * 64 + parameters, parameters + 2 * (4 * 64 + 4)
    )
    parts = [minimum("ff_step_", layer) for layer in layers]
    assert minimum("ff_network_step_", layers) == parts[0] + parts[1]


def test_labels_share_the_products_and_the_rows_of_x():
    x, w, b, y = 32 * 30, 20 * 30, 20, 64 * 20
    assert minimum("ff_label_forward", LABELLED) == Work(2 * 32 * 30 * 20, 2 * (x + w + b) + 8 * 64, 2 * y + 4 * 64)
    assert once("ff_label_step_", LABELLED).flops == 4 * 32 * 30 * 20
    assert once("ff_label_step_", LABELLED).bytes_read == 2 * x + 8 * 64 + 10 * (w + b) + 4


@pytest.mark.parametrize(
    ("dtype", "precision", "rate"),
    [
        (torch.bfloat16, "highest", "bf16"),
        (torch.float16, "medium", "fp16"),
        (torch.float32, "highest", "fp32"),
        (torch.float32, "high", "tf32"),
        (torch.float32, "medium", "bf16"),
    ],
)
def test_the_rate_of_a_product(dtype, precision, rate):
    assert rate_name(dtype, precision) == rate


def test_limit_is_the_slower_of_arithmetic_and_memory():
    assert limit(Work(10**11, 10**6, 10**6), A_CHIP, "bf16") == pytest.approx(1e-3)
    assert limit(Work(10**11, 10**6, 10**6), A_CHIP, "fp32") == pytest.approx(1e-2)
    assert limit(Work(10**6, 10**9, 10**9), A_CHIP, "bf16") == pytest.approx(2e-3)


def test_a_launch_with_an_even_grid_takes_its_arithmetic():
    launch = Launch(10**11, 10**6, 10**6, grid=(5, 4))
    assert predicted(launch, A_CHIP) == pytest.approx(3e-6 + 2 * cost.FILL_SECONDS + 1e-3)


def test_one_tile_more_than_fits_costs_a_wave():
    even, uneven = (Launch(n * 10**10, 0, 0, grid=(n,)) for n in (20, 21))
    assert predicted(uneven, A_CHIP) - predicted(even, A_CHIP) == pytest.approx(1e-3 + cost.FILL_SECONDS)
    # fewer blocks than multiprocessors leave the others idle
    assert predicted(Launch(10**10, 0, 0, grid=(1,)), A_CHIP) == pytest.approx(3e-6 + cost.FILL_SECONDS + 1e-3)


def test_blocks_that_share_a_multiprocessor_wait_together():
    alone, shared = (Launch(20 * 10**10, 0, 0, grid=(20,), resident=n) for n in (1, 2))
    assert predicted(alone, A_CHIP) - predicted(shared, A_CHIP) == pytest.approx(cost.FILL_SECONDS)


def test_memory_and_l2_may_be_slower_than_arithmetic():
    start = 3e-6 + cost.FILL_SECONDS
    assert predicted(Launch(0, 10**9, 10**9, grid=(10,)), A_CHIP) == pytest.approx(start + 2e-3)
    loads = Launch(0, 10**9, 10**9, grid=(10,), bytes_requested=16 * 10**9)
    assert predicted(loads, A_CHIP) == pytest.approx(start + 4e-3)


def test_barriers_and_several_launches_add_up():
    one = Launch(0, 0, 0, grid=(10,), barriers=2)
    assert predicted([one, one], A_CHIP) == pytest.approx(2 * (3e-6 + cost.FILL_SECONDS + 2 * cost.BARRIER_SECONDS))
    # kernels whose grid is not known: many launches in one count
    assert predicted(Launch(10**11, 0, 0, launches=40), A_CHIP) == pytest.approx(40 * 3e-6 + 1e-3)


def test_an_empty_grid_is_not_launched():
    assert predicted(Launch(0, 0, 0, grid=(0, 3)), A_CHIP) == 0


def test_device_table():
    assert {"A100", "H100", "H200", "RTX 4090", "B200", "MI300X"} == DEVICES.keys()
    for device in DEVICES.values():
        assert device.source
        assert device.rates["bf16"] == device.rates["fp16"] > device.rates["tf32"] >= device.rates["fp32"]
        # dense tensor-core rates are the multiprocessors' flops a clock at some clock rate
        per_clock = {"sm_80": 2048, "sm_89": 512, "sm_90": 4096, "sm_100": 8192, "gfx942": 2048}[device.arch]
        assert 1.3e9 < device.rates["bf16"] / device.multiprocessors / per_clock < 2.6e9
        assert device.bandwidth < device.l2_bandwidth


# ---------------------------------------------------------------------------------------------------------------------
# the usual implementation, counted


def counted(function, *args):
    with Counter() as counter:
        function(*args)
    return counter.work


def test_counter_by_hand():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert counted(torch.mm, a, b) == Work(2 * 3 * 5 * 7, 4 * (15 + 35), 4 * 21)
    assert counted(torch.add, a, a.half()) == Work(0, 4 * 15 + 2 * 15, 4 * 15)
    assert counted(a.add_, 1) == Work(0, 4 * 15, 4 * 15)
    assert counted(a.zero_) == Work(0, 0, 4 * 15)
    assert counted(a.copy_, torch.ones(3, 5)) == Work(0, 4 * 15, 4 * 15)  # the ones are made before
    assert counted(lambda: a.t().reshape(5, 3).unsqueeze(0)[0]).bytes == 0
    assert counted(torch.empty, 100) == Work(0, 0, 0, 0)
    assert counted(torch._foreach_add_, [a, b], 1) == Work(0, 4 * (15 + 35), 4 * (15 + 35))


def test_autograd_is_counted_without_memory_and_as_it_really_runs():
    """The same on fake tensors as on real ones; a step of one layer is some forty launches."""
    case = Case("step", 64, (784, 500))
    from ffkernels.benchmark.problem import Problem
    from ffkernels.benchmark.torch_columns import Autograd

    real = Autograd(Problem(case))
    real.run()
    found = counted(real.run)
    assert autograd(case, torch.float32) == found
    assert found.flops == case.flops
    assert 30 <= found.launches <= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_usual_implementation_needs_more_than_the_minimum(case):
    found = autograd(case, torch.bfloat16)
    # under labels it computes the first layer anew for each
    assert found.flops == case.flops if not case.labelled else found.flops > case.flops
    assert found.launches >= 7 * (len(case.sizes) - 1)
    assert found.bytes > case.bytes_moved / 2  # which is of float32 tensors
