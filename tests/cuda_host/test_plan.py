"""The plan: grids, splits, launches and memory for shapes of any size, and what is refused before there is a plan."""

import itertools
import json

import cases
import pytest
import test_apply_gradient
import torch
from ptx.limits import limits

import ffkernels as ff

from .gpu import MATHS, REGISTERS, Gpu, needs_kernels, plan, shared_bytes

pytestmark = needs_kernels
OPS = (*cases.OPS, "apply_gradient_")
A100, H100, RTX = Gpu(80, 108), Gpu(90, 132), Gpu(89, 128)


def network(rows, widths, dtype=torch.bfloat16, optimizer="adam", **options):
    """Flat arguments of a network's step. The memory is never touched."""
    layers = []
    for depth, cols in itertools.pairwise(widths):
        weight, bias = torch.empty(cols, depth, dtype=dtype), torch.empty(cols, dtype=dtype)
        chosen = cases.OPTIMIZERS[optimizer]
        layers.append(ff.FFLayer(weight, bias, chosen.init_state(weight, bias), chosen, **options))
    given = {"x": torch.empty(rows, widths[0], dtype=dtype), "sign": torch.empty(rows), "layers": layers}
    return cases.flat("ff_network_step_", given)


def launches_of(op, args, gpu):
    return plan(op, args, gpu)[1]["launches"]


def tiles(n):
    return -(-n // 64)


@pytest.mark.parametrize("gpu", [A100, H100, RTX, Gpu(86, 84), Gpu(100, 148), Gpu(120, 170)], ids=str)
def test_blocks_that_wait_for_each_other_are_resident(gpu):
    """The grid of a cooperative launch fits on the device with the registers that the compiler may use."""
    lim = limits(gpu.capability)
    for rows, widths in ((64, [784, 500]), (250, [784, 1000, 1000, 1000]), (4096, [2000, 2000])):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            (launch,) = launches_of("ff_network_step_", network(rows, widths, dtype), gpu)
            assert launch["cooperative"]
            a_multiprocessor = -(-launch["grid"] // gpu.multiprocessors)
            assert a_multiprocessor * (launch["shared"] + 1024) <= lim.shared_per_sm
            assert a_multiprocessor * REGISTERS * launch["block"] <= lim.registers_per_sm
            assert a_multiprocessor <= lim.blocks_per_sm
            assert launch["shared"] == shared_bytes(launch["kernel"].removeprefix("ff_stages_"))


def test_no_more_blocks_than_work():
    (launch,) = launches_of("ff_network_step_", network(64, [64, 64]), A100)
    assert launch["grid"] == 1
    x, weight = torch.empty(129, 10), torch.empty(65, 10)
    (launch,) = launches_of("ff_forward", cases.flat("ff_forward", {"x": x, "weight": weight}), A100)
    assert (launch["grid"], launch["cooperative"]) == (3 * 2, False)


def split_of(rows, cols, depth, gpu):
    """From the size of the memory for the sums of split tiles; 1 where there is none."""
    parts = plan("ff_network_step_", network(rows, [depth, cols]), gpu)[1]["parts"]
    size = {part["name"]: part["bytes"] for part in parts}.get("split", 0)
    items, left = divmod(size, 4 * (64 * 64 + 64))
    assert left == 0
    return items // (tiles(cols) * tiles(depth)) or 1


def test_splits():
    """Rows are split where weight tiles are few and rows are many, and only as far as that pays."""
    assert split_of(100, 500, 500, A100) == 1  # two steps a tile: nothing to share
    assert split_of(4096, 2000, 2000, A100) == 1  # 1024 tiles keep all multiprocessors busy
    few = [split_of(rows, 500, 784, A100) for rows in (128, 1024, 4096, 50000)]
    assert few == sorted(few)
    assert few[0] == 1 < few[1] <= few[-1] <= tiles(50000)
    assert split_of(50000, 500, 784, A100) * 8 * 13 <= 4 * A100.multiprocessors * 3  # no more than a few waves
    assert split_of(50000, 64, 64, Gpu(80, 1)) <= 3  # three blocks in all


def test_a_grid_for_minibatches_that_overlap():
    """Stages in which several minibatches are at work have work for more blocks."""
    widths = [64, 256, 256, 256, 256]
    (one,) = launches_of("ff_network_step_", network(64, widths), A100)
    args = list(network(64, widths))
    args[0], args[1] = args[0].expand(4, -1, -1), args[1].expand(4, -1)
    (four,) = launches_of("ff_network_step_", tuple(args), A100)
    assert one["grid"] == 4 * 4 + 4  # an update and a forward pass
    assert four["grid"] == 2 * one["grid"]


def test_one_launch_a_network():
    for depth in range(1, 9):
        (launch,) = launches_of("ff_network_step_", network(250, [784] + [1000] * depth), H100)
        assert launch["cooperative"]
    assert len(launches_of("ff_network_step_", network(250, [784] + [100] * 9), H100)) == 2


def test_without_cooperative_launches_there_is_one_a_stage():
    found = launches_of("ff_network_step_", network(250, [784] + [1000] * 3), Gpu(80, 108, cooperative=False))
    assert len(found) == 4
    assert not any(launch["cooperative"] for launch in found)


def test_a_plan_depends_on_nothing_else():
    """Same arguments, same device: same launches, but for the scratch memory's address."""
    args = network(250, [784, 500, 500])
    a, b = (plan("ff_network_step_", args, H100)[1] for _ in range(2))
    assert [(x["kernel"], x["grid"], x["shared"]) for x in a["launches"]] == [
        (x["kernel"], x["grid"], x["shared"]) for x in b["launches"]
    ]
    assert a["parts"] == b["parts"]


def test_kernels_by_dtype_and_precision():
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for precision in ("highest", "high", "medium"):
            x, weight = torch.empty(5, 6, dtype=dtype), torch.empty(4, 6, dtype=dtype)
            args = cases.flat("ff_forward", {"x": x, "weight": weight, "precision": precision})
            (launch,) = launches_of("ff_forward", args, A100)
            found[dtype, precision] = launch["kernel"].removeprefix("ff_stages_")
    assert [found[torch.float32, p] for p in ("highest", "high", "medium")] == ["f32", "tf32", "f32_bf16"]
    assert {found[torch.bfloat16, p] for p in ("highest", "high", "medium")} == {"bf16"}
    assert {found[torch.float16, p] for p in ("highest", "high", "medium")} == {"fp16"}
    assert set(found.values()) == set(MATHS)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_devices_that_cannot_run_the_kernels():
    args = network(8, [16, 8])
    with pytest.raises(RuntimeError, match=r"need a GPU of compute capability 8.0 or newer, this one has 7.5"):
        plan("ff_network_step_", args, Gpu(75, 40, resident=(1,) * 5))
    with pytest.raises(RuntimeError, match=r"ff_network_step_ of 8 x 16 -> 8: kernel ff_stages_bf16 needs 49936 bytes"):
        plan("ff_network_step_", args, Gpu(80, 40, resident=(0,) * 5))


@pytest.mark.parametrize("op", OPS)
def test_tensors_elsewhere_are_refused(op):
    args = cases.flat(op, _arguments(op))
    with pytest.raises(RuntimeError, match="x: must be on a CUDA device"):
        getattr(torch.ops.ffkernels, op).cuda(*args)


def _wrong(op, args):
    """Each tensor argument in turn: of another dtype, with one row or entry less, without its memory."""
    schema = getattr(torch.ops.ffkernels, op).cuda._schema
    for i, (argument, value) in enumerate(zip(schema.arguments, args, strict=True)):
        of_list = isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
        if not (of_list or isinstance(value, torch.Tensor)):
            continue

        def replaced(new, i=i, value=value, of_list=of_list):
            return (*args[:i], [new, *value[1:]] if of_list else new, *args[i + 1 :])

        t = value[0] if of_list else value
        yield f"{argument.name} in float64", replaced(t.double())
        if t.dim():
            yield f"{argument.name} too short", replaced(t[:-1])
        yield f"{argument.name} with one more dimension", replaced(t[None])
        freed = t.clone()
        freed.untyped_storage().resize_(0)
        yield f"{argument.name} freed", replaced(freed)


@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments_are_refused_and_change_nothing(op):
    """The op is called as torch.compile would call it: past the checks of the public function."""
    args = cases.flat(op, _arguments(op))
    count = 0
    for what, wrong in _wrong(op, args):
        before = cases.copied(list(wrong)) if "freed" not in what else None
        torch.ops.ffkernels.cuda_record(80, 2, True, [3] * 5)
        refused = None
        try:
            getattr(torch.ops.ffkernels, op).cuda(*wrong)
        except RuntimeError as error:
            refused = error
        planned = json.loads(torch.ops.ffkernels.cuda_recorded()[0])
        assert refused is not None, f"{what} is not refused"
        assert planned == [], what
        if before is not None:
            for a, b in zip(_flat_tensors(wrong), _flat_tensors(before), strict=True):
                assert torch.equal(a, b), what
        count += 1
    assert count > 10


def _arguments(op):
    if op != "apply_gradient_":
        return cases.arguments(op)
    return test_apply_gradient.arguments(cases.Target("cuda", "cpu", torch.float32), (5, 8), ff.Adam())


def _flat_tensors(args):
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("op", cases.IN_PLACE)
def test_targets_that_share_memory_are_refused(op):
    given = cases.arguments(op)
    x = given["x"]
    layer = given["layers"][0] if op == "ff_network_step_" else None
    weight = layer.weight if layer else given["weight"]
    shared = torch.zeros(max(x.numel(), weight.numel()) + 1)
    args = list(cases.flat(op, given))
    own_weight = shared[: weight.numel()].view(weight.shape)
    args[0] = shared[1 : 1 + x.numel()].view(x.shape)
    for i, value in enumerate(args):
        if value is weight:
            args[i] = own_weight
        elif isinstance(value, list) and value and value[0] is weight:
            args[i] = [own_weight, *value[1:]]
    with pytest.raises(RuntimeError, match="shares memory"):
        plan(op, tuple(args), A100)


def test_a_target_that_is_the_gradient_is_refused():
    given = _arguments("apply_gradient_")
    given["grad_weight"] = given["weight"]
    with pytest.raises(RuntimeError, match="shares memory"):
        plan("apply_gradient_", cases.flat("apply_gradient_", given), A100)


@pytest.mark.parametrize("op", [*cases.IN_PLACE, "apply_gradient_"])
def test_targets_must_be_contiguous(op):
    args = list(cases.flat(op, _arguments(op)))
    schema = getattr(torch.ops.ffkernels, op).cuda._schema
    for i, argument in enumerate(schema.arguments):
        if argument.name in ("weight", "weights"):
            of_list = isinstance(args[i], list)
            t = args[i][0] if of_list else args[i]
            strided = t.T.contiguous().T
            args[i] = [strided, *args[i][1:]] if of_list else strided
    with pytest.raises(RuntimeError, match="weight: must be contiguous"):
        plan(op, tuple(args), A100)
