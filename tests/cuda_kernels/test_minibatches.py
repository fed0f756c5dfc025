"""Several minibatches in a launch: the same bits as one launch after the other, whatever runs when.

The interpreter checks that no buffer is written while another minibatch reads it: such accesses have no order.
"""

import cases
import pytest
import torch

from . import emulate, params
from .params import MATHS
from .test_kernels import network, same_bits

pytestmark = pytest.mark.needs("nvcc")
slow = pytest.mark.slow


def minibatches(math, widths, count, rows, *, labels=False, hard=False, seed=0, **options):
    """Arguments of ``count`` minibatches. ``hard``: with all that a network's step can have."""
    given = network(math, widths, rows, labels=labels, seed=seed, **options)
    x = torch.randn(count, rows, widths[0]).to(given["x"].dtype)
    stacked = given | {"x": x}
    if labels:
        stacked["labels"] = tuple(torch.randint(5, (2, count, rows)))
    else:
        stacked["sign"] = torch.randint(0, 2, (count, rows)) * 2.0 - 1
    if hard:
        for i, layer in enumerate(given["layers"]):
            layer.peer, layer.peer_mean = 0.3, torch.rand(len(layer.weight))
            layer.dropout = 0.25 if i else 0.0
            layer.optimizer = cases.OPTIMIZERS["adam-decay"]
            layer.state = layer.optimizer.init_state(layer.weight, layer.bias)
        stacked["dropout_seed"] = torch.arange(count) * 2**35 - 7
        if not labels:
            stacked["x_sqnorm"] = x.float().square().sum(2)
    return stacked


def with_tiny_coefficients(given, which):
    """These minibatches are all positive and far above the threshold; Adam's moments show what becomes of that."""
    given["sign"][which] = 1
    for layer in given["layers"]:
        layer.normalize, layer.threshold, layer.optimizer = "none", 0.0, cases.OPTIMIZERS["adam"]
        layer.state = layer.optimizer.init_state(layer.weight, layer.bias)


def one_by_one(singles, **launch):
    """Results as if of one call, and what the layers hold at the end."""
    layers = cases.copied(singles[0]["layers"])
    results = [emulate.run("ff_network_step_", own | {"layers": layers}, keep=True, **launch) for own in singles]
    stacked = {n: torch.stack([r[n] for r in results]) for n in ("goodness", "loss")}
    return results[-1] | stacked, [layer.state["step"].item() for layer in layers]


def together(given, **launch):
    own = given | {"layers": cases.copied(given["layers"])}
    results = emulate.run("ff_network_step_", own, keep=True, **launch)
    return results, [layer.state["step"].item() for layer in own["layers"]]


def assert_same(given, **launch):
    """By a launch for each minibatch, and by one for all."""
    singles = [cases.of_minibatch(given, s) for s in range(len(given["x"]))]
    expected, steps = one_by_one(singles, splits=launch.get("splits", 1))
    results, own_steps = together(given, **launch)
    same_bits(results, expected)
    assert own_steps == steps == [len(singles)] * len(given["layers"])


@pytest.mark.parametrize("math", ["bf16", *(pytest.param(m, marks=slow) for m in MATHS if m != "bf16")])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("widths", [(70, 33), (70, 33, 65), (20, 80, 6, 9)], ids=str)
@pytest.mark.parametrize("labels", [False, True])
def test_same_bits_as_one_by_one(math, count, widths, labels):
    reports = []
    assert_same(minibatches(math, widths, count, 35, labels=labels), sms=3, seed=count, reports=reports)
    assert len(reports) == 1  # one launch


@pytest.mark.parametrize("math", ["f32", "fp16"])
@pytest.mark.parametrize("labels", [False, True])
def test_everything_that_a_step_can_have(math, labels):
    """Adam, whose correction counts the steps, peers, dropout and known norms."""
    assert_same(minibatches(math, (70, 33, 65), 3, 35, labels=labels, hard=True))


@pytest.mark.parametrize("math", ["bf16", pytest.param("f32", marks=slow)])
def test_any_grid_gives_the_same_bits(math):
    """1 to 8 multiprocessors, other orders of the blocks, split rows, and a launch a stage."""
    given = minibatches(math, (70, 66, 65, 9), 3, 100, labels=True)
    first, _ = together(given, splits=2, grid=1, sms=1)
    for sms, seed in ((1, 1), (3, 2), (8, 3)):
        same_bits(first, together(given, splits=2, sms=sms, seed=seed)[0])
    same_bits(first, together(given, splits=2, sms=3, seed=4, multi_launch=True)[0])


def test_coefficients_of_every_minibatch_have_their_own_range():
    """fp16: minibatches whose coefficients are tiny behind one whose are not."""
    given = minibatches("fp16", (40, 20), 4, 30)
    with_tiny_coefficients(given, slice(1, 3))
    assert_same(given)


def test_minibatches_overlap():
    """Several are on their way: fewer stages than one after the other would have."""
    given = minibatches("bf16", (20, 12, 9, 8), 3, 10)
    reports = []
    together(given, multi_launch=True, reports=reports)
    assert len(reports) == 4 + params.BEHIND * 2 < 3 * 4
