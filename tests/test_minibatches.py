"""ff_network_step_ on several minibatches: the same bits as one call after the other, on every backend."""

import cases
import pytest
import torch

import ffkernels as ff
from ffkernels import network

OP = "ff_network_step_"


def one_by_one(given, count):
    """Results as of one call, and the layers after it."""
    layers = cases.copied(given["layers"])
    results = [ff.ff_network_step_(**cases.of_minibatch(given, s) | {"layers": layers}) for s in range(count)]
    return [torch.stack(part) for part in zip(*results, strict=True)], layers


def together(given):
    layers = cases.copied(given["layers"])
    return ff.ff_network_step_(**given | {"layers": layers}), layers


def assert_same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)
    for a, b in zip(*(cases.tensors(part[1]).items() for part in (found, expected)), strict=True):
        assert torch.equal(a[1], b[1]), a[0]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@cases.on_backends(OP)
def test_same_bits_as_one_by_one(target, count, labelled):
    given = cases.minibatches(
        count, labelled=labelled, rows=33, depth=23, cols=18, dtype=target.dtype, device=target.device
    )
    found = together(given)
    assert_same(found, one_by_one(given, count))
    assert found[0][0].shape == (count, 2, 66 if labelled else 33)
    assert all(layer.state["step"] == count for layer in found[1])
    assert not torch.equal(found[1][0].weight, given["layers"][0].weight)


@cases.on_backends(OP, dtypes=(torch.float32,))
def test_minibatches_with_any_stride(target):
    """Taken out of a larger tensor, or the same one twice."""
    given = cases.minibatches(2, device=target.device)
    wide = torch.zeros(6, 2, 2 * 8, device=target.device)
    given["x"] = wide.transpose(0, 1)[:, :, ::2].copy_(given["x"])
    given["sign"] = given["sign"][:1].expand(2, 6)
    assert_same(together(given), one_by_one(given, 2))


@cases.on_backends(OP, dtypes=(torch.float32,))
@pytest.mark.parametrize("name", ["sign", "dropout_seed"])
def test_arguments_past_the_public_function(target, name):
    """As torch.compile calls it: a flat call whose last minibatch is missing changes nothing."""
    given = cases.minibatches(3, device=target.device)
    args = list(cases.flat(OP, given))
    before = [t.clone() for t in cases.tensors(given["layers"]).values()]
    at = {"sign": 1, "dropout_seed": -1}[name]
    assert len(args[at]) == 3
    args[at] = args[at][:2]
    with pytest.raises((ValueError, RuntimeError)):
        getattr(torch.ops.ffkernels, OP).default(*args)
    for a, b in zip(before, cases.tensors(given["layers"]).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("labelled", [False, True])
def test_opcheck(labelled):
    args = cases.flat(OP, cases.minibatches(2, labelled=labelled))
    torch.library.opcheck(getattr(torch.ops.ffkernels, OP).default, args)


@pytest.mark.parametrize("labelled", [False, True])
def test_compiled(labelled):
    torch.compiler.reset()

    def step(given):
        return network.ff_network_step_(**given), given["layers"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    given = cases.minibatches(2, labelled=labelled)
    assert_same(compiled(cases.copied(given)), one_by_one(given, 2))


@pytest.mark.parametrize("minimize", [False, True])
def test_a_module_takes_several(minimize):
    torch.manual_seed(0)
    layers = [ff.FFLinear(12, 9), ff.FFLinear(9, 7, dropout=0.25)]
    net = ff.FFNet(layers, num_classes=3, minimize=minimize)
    start, x = cases.copied(net.state_dict()), torch.rand(4, 6, 12)
    labels, seeds = torch.randint(3, (4, 6)), torch.arange(4)
    wrong = (labels + 1) % 3
    found, after = net.label_step(x, labels, wrong, dropout_seed=seeds), cases.copied(net.state_dict())
    net.load_state_dict(start)
    for s in range(4):
        single = net.label_step(x[s], labels[s], wrong[s], dropout_seed=seeds[s : s + 1])
        for a, b in zip(found, single, strict=True):
            assert torch.equal(a[s], b)
    assert all(torch.equal(t, after[name]) for name, t in net.state_dict().items())
    assert net.label_step(x, labels, wrong).loss.shape == (4, 2)  # with seeds of its own
