"""Negative labels: never the true one, as likely as they should be, and repeatable."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import ffkernels as ff


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_uniform_labels_are_wrong_labels():
    labels = torch.arange(30) % 4
    assert torch.equal(ff.UniformLabels()(labels, 4, generator(3), None), ff.wrong_labels(labels, 4, generator(3)))


def test_permuted_labels_are_the_same_labels_in_another_order():
    labels = torch.arange(1000) % 10
    wrong = ff.PermutedLabels()(labels, 10, generator(3), None)
    assert torch.equal(wrong.bincount(), labels.bincount())
    assert 60 <= (wrong == labels).sum() <= 140  # a tenth is right; four deviations
    assert torch.equal(wrong, ff.PermutedLabels()(labels, 10, generator(3), None))
    assert not torch.equal(wrong, ff.PermutedLabels()(labels, 10, generator(4), None))


def test_labels_drawn_once_depend_on_the_seed_alone():
    labels = torch.arange(30) % 4
    once = ff.DrawnOnce(ff.UniformLabels())
    assert torch.equal(once.draw(labels, 4, 5), once.draw(labels, 4, 5))
    assert not torch.equal(once.draw(labels, 4, 5), once.draw(labels, 4, 6))
    assert not (once.draw(labels, 4, 5) == labels).any()
    with pytest.raises(ValueError, match="needs a net with a softmax head"):
        ff.DrawnOnce(ff.HardLabels()).draw(labels, 4, 5)


@hypothesis.given(
    classes=st.integers(2, 12), rows=st.integers(0, 40), scale=st.sampled_from([0.0, 1.0, 30.0, 1e6]),
    seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_hard_labels_are_never_right(classes, rows, scale, seed, dtype):
    labels = torch.randint(classes, (rows,), generator=generator(seed), dtype=torch.int32)
    logits = (torch.randn(rows, classes, generator=generator(seed)) * scale).to(dtype)
    wrong = ff.HardLabels()(labels, classes, generator(seed), logits)
    assert wrong.shape == labels.shape
    assert wrong.dtype == torch.int64
    assert not (wrong == labels).any()
    assert ((wrong >= 0) & (wrong < classes)).all()
    assert torch.equal(wrong, ff.HardLabels()(labels, classes, generator(seed), logits))


def test_hard_labels_are_as_likely_as_the_head_finds_them():
    draws, logits = 20_000, torch.tensor([1.0, -1.0, 3.0, 0.0, -torch.inf])
    for true in range(5):
        wrong = ff.HardLabels()(torch.full((draws,), true), 5, generator(1), logits.expand(draws, -1))
        expected = logits.exp().double()
        expected[true] = 0
        expected = draws * expected / expected.sum()
        counts = torch.bincount(wrong, minlength=5)
        assert (counts[expected == 0] == 0).all()
        chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
        assert chi_square < 16.3  # the 99.9 % quantile with 3 degrees of freedom


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hard_labels_with_draws_at_the_ends_of_the_interval(monkeypatch, backend):
    labels, logits = torch.tensor([0, 3, 1]), torch.zeros(3, 4)
    for value, expected in ((0.0, [1, 0, 0]), (1 - 2**-24, [3, 2, 3])):
        monkeypatch.setattr(torch, "rand", lambda n, value=value, **options: torch.full((n,), value))
        with ff.use_backend(backend):
            assert ff.HardLabels()(labels, 4, generator(), logits).tolist() == expected


def test_hard_labels_need_a_head():
    with pytest.raises(ValueError, match="needs a net with a softmax head"):
        ff.HardLabels()(torch.zeros(3), 2, generator(), None)
