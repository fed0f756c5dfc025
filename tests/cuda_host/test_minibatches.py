"""Several minibatches in one call of ff_network_step_.cuda: one launch, the same bits as one call after the other."""

import itertools

import cases
import pytest
import torch
import twin
from test_minibatches import assert_same, one_by_one, together

from ffkernels import choice
from ffkernels.triton.plan import Layer

from .gpu import Gpu, needs_kernels, running
from .test_ops import MODES, network

pytestmark = needs_kernels
slow = pytest.mark.slow


def stacked(widths, rows, count, mode, *, labelled=False, optimizer="adam", **options):
    given = network(widths, rows, mode, labelled=labelled, optimizer=optimizer, **options)
    g = torch.Generator().manual_seed(count)
    given["x"] = torch.randn(count, rows, widths[0], generator=g).to(MODES[mode][0])
    if labelled:
        positive = torch.randint(5, (count, rows), generator=g)
        return given | {"labels": (positive, (positive + 1) % 5)}
    return given | {"sign": torch.randint(0, 2, (count, rows), generator=g) * 2.0 - 1}


def check(given, count, gpu=None):
    """What was launched, having seen that it gives the bits of single calls, whose own results test_ops.py looks at."""
    with running(gpu):
        expected = one_by_one(given, count)
    with running(gpu) as launched:
        assert_same(together(given), expected)
    return launched[0].plan["launches"]


@pytest.mark.parametrize("mode", ["bf16", *(pytest.param(m, marks=slow) for m in MODES if m != "bf16")])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_one_launch(layers, count, labelled, mode):
    given = stacked([40, 66, 30, 70][: layers + 1], 70, count, mode, labelled=labelled)
    (launch,) = check(given, count, Gpu(multiprocessors=3, seed=count))
    assert launch["cooperative"]


@pytest.mark.parametrize("labelled", [False, True])
def test_all_that_a_step_can_have(labelled):
    given = cases.minibatches(3, labelled=labelled, rows=33, depth=23, cols=18)
    for layer in given["layers"]:
        layer.activation = "gelu"
    assert len(check(given, 3)) == 1


def test_an_exact_step_each():
    """Two minibatches against float64, not only against single calls."""
    given = stacked([20, 18, 9], 30, 2, "highest", optimizer="sgd-plain")
    with running():
        results = twin.run("ff_network_step_", given)
    for how in (exact := {}, rounded := {}):
        own = given | {"layers": cases.copied(given["layers"])}
        steps = []
        for s in range(2):
            arithmetic = twin.EXACT if how is exact else MODES["highest"][1]
            step = twin.computed("ff_network_step_", cases.of_minibatch(own, s), arithmetic)
            for i, layer in enumerate(own["layers"]):
                layer.weight, layer.bias = step[f"{i}.weight"], step[f"{i}.bias"]
            steps.append(step)
        how |= steps[-1] | {n: torch.stack([step[n] for step in steps]) for n in ("goodness", "loss")}
    twin.assert_as_exact(results, exact, rounded)


def test_the_device_changes_no_bit():
    """1 to 8 multiprocessors, split rows or none, other orders of the blocks, a launch a stage."""
    given = stacked([40, 30, 20], 330, 3, "bf16", labelled=True)
    gpus = [Gpu(multiprocessors=n, seed=n) for n in (3, 8)]
    launches = [len(check(given, 3, gpu)) for gpu in (*gpus, Gpu(multiprocessors=8, cooperative=False))]
    assert launches == [1, 1, 3 + 2 * 2]
    given = stacked([40, 30, 20], 60, 3, "bf16")  # too few rows to be split, on any of these
    results = []
    for gpu in (Gpu(multiprocessors=1, resident=(1,) * 5), Gpu(multiprocessors=8, seed=3), Gpu(90, 2)):
        with running(gpu):
            results.append(together(given))
    for found in results[1:]:
        assert_same(found, results[0])


def test_layers_of_different_precision_take_turns():
    """Two launches a step: minibatches then come one after the other."""
    given = stacked([20, 12, 16, 8], 30, 3, "highest", labelled=True)
    for layer, precision in zip(given["layers"], ("highest", "medium", "medium"), strict=True):
        layer.precision = precision
    launches = check(given, 3)
    assert [launch["kernel"].removeprefix("ff_stages_") for launch in launches] == ["f32", "f32_bf16"] * 3


@slow
def test_more_layers_than_a_launch_takes():
    given = stacked([12] + [8] * 9, 6, 2, "highest", labelled=True, activation="gelu")
    assert len(check(given, 2)) == 4


@slow
def test_bytes_are_those_of_the_cost_model():
    """Distinct bytes of each stage, in which several minibatches may be at work."""
    rows, widths, count = 64, (784, 500, 500), 3
    given = stacked(list(widths), rows, count, "bf16")
    with running(Gpu(multiprocessors=4, cooperative=False)) as launched:
        together(given)
    layers = [Layer(rows, depth, cols) for depth, cols in itertools.pairwise(widths)]
    stages = choice.cuda_launches("ff_network_step_", layers, count)
    for report, stage in zip(launched[0].reports, stages, strict=True):
        assert abs(report.l2_unique_bytes - stage.bytes) / stage.bytes < 0.02
        assert report.tensor_flops == stage.flops
        assert report.bank_conflicts == 0
