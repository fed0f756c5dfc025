"""Dropout's generator against its authors' test vectors, and what dropout does in a network's step."""

import cases
import independent
import pytest
import torch

import ffkernels as ff
from ffkernels import stage
from ffkernels.dropout import dropout, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of the Random123 library
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    seed = torch.tensor([key[0] | (key[1] - 2**32 if key[1] >> 31 else key[1]) << 32])
    assert [int(word) for word in philox(seed, [torch.tensor([c]) for c in counter])] == words
    assert independent.philox(counter, key) == words


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_what_is_kept(p):
    x = torch.full((400, 301), 3.0)
    y = dropout(x, p, torch.tensor([7]), 2)
    assert ((y == 0) | torch.isclose(y, torch.tensor(3.0 / (1 - p)))).all()
    share, spread = (y == 0).double().mean().item(), (p * (1 - p) / y.numel()) ** 0.5
    assert abs(share - p) <= 4 * spread
    if p:  # rows, columns, layers and seeds draw for themselves
        others = [y.roll(1, 0), y.roll(1, 1), dropout(x, p, torch.tensor([7]), 1), dropout(x, p, torch.tensor([8]), 2)]
        for other in others:
            both = ((y == 0) & (other == 0)).double().mean().item()
            assert abs(both - p * p) <= 5 * (p * p * (1 - p * p) / y.numel()) ** 0.5


def test_what_is_dropped_is_zero_even_if_it_was_not_finite():
    y = dropout(torch.full((20, 20), torch.inf), 0.5, torch.tensor([0]), 1)
    assert ((y == 0) | (y == torch.inf)).all()
    assert (y == 0).any()


@cases.each_op_on_backends(ops=("ff_network_step_",))
def test_every_backend_drops_the_same(op, target):
    """The first of two layers passes its input on, so that the second one's goodness is that of what is kept."""
    rows, width, p = 9, 70, 0.3
    like = {"dtype": target.dtype, "device": target.device}
    x = 1 + torch.arange(rows * width).reshape(rows, width).remainder(5).to(**like)
    eye = torch.eye(width, **like)
    seed = torch.tensor([2**45 + 3], device=target.device)
    none = ff.SGD(lr=0.0)
    layers = [ff.FFLayer(eye.clone(), None, none.init_state(eye), none, normalize="none", dropout=d) for d in (0.0, p)]
    sign = torch.ones(rows, device=target.device)
    goodness, _ = ff.ff_network_step_(x, sign, layers, dropout_seed=seed)
    expected = independent.dropped(x, p, seed, 1).to(target.dtype).double().square().sum(1)
    independent.assert_close(goodness[1].cpu(), expected.cpu(), 1e-5)


def test_a_net_draws_its_seed_from_torchs_generator():
    def steps(seed=None):
        torch.manual_seed(0)
        net = ff.FFNet.from_sizes([6, 50, 5], dropout=0.0)
        net.layers[1].dropout = 0.5
        torch.manual_seed(1)
        return torch.stack([net.step(torch.ones(4, 6), -torch.ones(4, 6), dropout_seed=seed).loss for _ in range(3)])

    assert torch.equal(steps(), steps())
    assert not torch.equal(steps(), steps(torch.tensor([5])))


def test_a_net_cut_out_of_a_larger_one_keeps_the_dropout_of_its_input():
    torch.manual_seed(0)
    net = ff.FFNet.from_sizes([6, 50, 5])
    net.layers[1].dropout = 0.5
    x = torch.rand(4, 50)
    top, seed = net[1:], torch.tensor([3])
    expected = ff.ff_forward(dropout(torch.cat([x, x]), 0.5, seed, 0), top.layers[0].weight, top.layers[0].bias)[1]
    got = top.step(x, x, dropout_seed=seed)
    independent.assert_close(torch.cat([got.goodness_pos[0], got.goodness_neg[0]]) * 5, expected, 1e-5)


def test_greedy_training_drops_with_each_layers_own_numbers(monkeypatch):
    net, seen = ff.FFNet.from_sizes([6, 8, 7, 5], num_classes=3), []
    for layer in net.stack[1:]:
        layer.dropout = 0.5
    monkeypatch.setattr(stage, "dropout", lambda x, p, seed, layer: seen.append(layer) or dropout(x, p, seed, layer))
    net.fit(torch.rand(9, 6), torch.arange(9) % 3, epochs=2, mode="greedy", progress=False)
    assert seen == [1, 1, 2, 2]
