"""Selected inputs: as many as they should be, as likely as they should be, repeatable; and what fit makes of them."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from test_training import LABELS, X, fit, same_bits, state
from test_training_pieces import FULL, make_full

import ffkernels as ff
from ffkernels.batches import Draws


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@hypothesis.given(
    rows=st.integers(1, 40), share=st.floats(0.001, 1), floor=st.sampled_from([1e-6, 0.1, 5.0]),
    scale=st.sampled_from([0.0, 1.0, 1e6]), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_hard_inputs_are_different_rows_in_order(rows, share, floor, scale, seed, dtype):
    labels = torch.randint(3, (rows,), generator=generator(seed), dtype=torch.int32)
    logits = (torch.randn(rows, 3, generator=generator(seed)) * scale).to(dtype)
    select = ff.HardInputs(share, floor)
    chosen = select(labels, generator(seed), logits)
    assert chosen.dtype == torch.int64
    assert len(chosen) == max(1, round(share * rows))
    assert (chosen.diff() > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < rows
    assert torch.equal(chosen, select(labels, generator(seed), logits))


@pytest.mark.parametrize(("share", "floor"), [(0.25, 0.1), (0.5, 2.0)])
def test_hard_inputs_are_as_likely_as_their_weights(share, floor):
    """The first of a draw without replacement has probability w / sum(w), the second w' / (sum(w) - w) after it."""
    p = torch.tensor([0.9, 0.5, 0.999, 0.0])
    logits = torch.stack([p, 1 - p], 1).log()
    weights = floor + 1 - p.double()
    expected = first = weights / weights.sum()
    if share == 0.5:
        expected = sum(first[i] * first[j] / (1 - first[i]) * torch.eye(4, dtype=torch.float64)[[i, j]].sum(0)
                       for i in range(4) for j in range(4) if i != j)  # fmt: skip
    draws, labels, select, own = 20_000, torch.zeros(4, dtype=torch.int64), ff.HardInputs(share, floor), generator(1)
    chosen = torch.cat([select(labels, own, logits) for _ in range(draws)])
    found = torch.bincount(chosen, minlength=4) / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() < 4 * error).all()


def test_the_layers_learn_from_the_selected_inputs_and_the_head_from_all():
    seen = []

    def odd(labels, own, logits):
        assert logits.shape == (len(labels), 3)
        assert own.initial_seed() == Draws(6, 1)["selection"].initial_seed()
        seen.append(logits)
        return torch.arange(1, len(labels), 2)

    def wrong(labels, classes, own, logits):
        assert torch.equal(logits, seen[-1][1::2])
        assert torch.equal(labels, LABELS[1::2])
        return (labels + 1) % classes

    once = {"epochs": 1, "batch_size": len(X), "negatives": wrong, "seed": 6}
    ours, twin = make_full(dropout=0.0), make_full(dropout=0.0)
    for net in (ours, twin):  # a new head finds all labels as likely
        for weight in net.head.weights:
            weight.copy_(torch.randn(weight.shape, generator=generator()))
    fit(ours, selection=odd, **once)
    assert [len(logits) for logits in seen] == [len(X)]
    twin.head.step(*twin.neutral_pass(X), LABELS)
    twin.label_step(X[1::2], LABELS[1::2], (LABELS[1::2] + 1) % 3)
    assert same_bits(dict(twin.named_parameters()), dict(ours.named_parameters()))


def test_negatives_drawn_once_stay_with_the_inputs_that_are_selected(monkeypatch):
    once, seen, step = ff.DrawnOnce(ff.UniformLabels()), [], ff.FFNet.label_step
    wrong = once.draw(LABELS, 3, 6)
    place = {tuple(image.tolist()): i for i, image in enumerate(X)}

    def watch(net, x, labels, negatives, **options):
        rows = [place[tuple(image.tolist())] for image in x]
        assert torch.equal(labels, LABELS[rows])
        assert torch.equal(negatives, wrong[rows])
        seen.extend(rows)
        return step(net, x, labels, negatives, **options)

    monkeypatch.setattr(ff.FFNet, "label_step", watch)
    fit(make_full(), selection=ff.HardInputs(0.4), negatives=once, epochs=2, batch_size=16, seed=6)
    assert 10 < len(set(seen)) < len(seen) < len(X)


def test_selection_is_repeated_and_the_seed_counts():
    nets = [make_full() for _ in range(3)]
    for net, seed in zip(nets, (4, 4, 5), strict=True):
        fit(net, selection=ff.HardInputs(0.4), **FULL | {"seed": seed})
    assert same_bits(state(nets[0]), state(nets[1]))
    assert not same_bits(state(nets[0]), state(nets[2]))


def test_selecting_all_changes_nothing():
    ours, plain = make_full(), make_full()
    fit(ours, selection=ff.HardInputs(1.0), **FULL)
    fit(plain, **FULL)
    assert same_bits(state(ours), state(plain))


@pytest.mark.parametrize(
    ("head", "options"), [(False, {}), (True, {"head_epochs": 1})], ids=["no head", "a head trained afterwards"]
)
def test_selection_needs_a_head_trained_beside_the_layers(head, options):
    net = make_full(head=head)
    net.average = None
    before = {name: value.clone() for name, value in state(net).items()}
    with pytest.raises(ValueError, match="selection must be None but for a net with a head that is trained beside"):
        fit(net, selection=ff.HardInputs(), **options)
    assert same_bits(state(net), before)
    with pytest.raises(TypeError, match="selection must be a function, got float"):
        fit(net, selection=0.4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"share": 0.0}, ValueError, "share must be finite and > 0"),
        ({"share": 1.5}, ValueError, "share must be at most 1, got 1.5"),
        ({"share": "half"}, TypeError, "share must be a number"),
        ({"floor": 0}, ValueError, "floor must be finite and > 0"),
    ],
)
def test_wrong_values(arguments, error, message):
    with pytest.raises(error, match=message):
        ff.HardInputs(**arguments)
