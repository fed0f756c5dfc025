"""Labels written over inputs, and wrong labels."""

import hypothesis
import independent
import pytest
import torch
from hypothesis import strategies as st

import ffkernels as ff


@hypothesis.given(
    rows=st.integers(1, 6),
    classes=st.integers(1, 10),
    extra=st.integers(0, 9),
    strength=st.sampled_from([1.0, -2.0, 0.1, 255.0]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8]),
)
def test_overlay_of_flat_inputs(rows, classes, extra, strength, seed, dtype):
    if dtype == torch.uint8:
        strength = abs(round(strength))
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, classes + extra, generator=generator) * 200).to(dtype)
    before = x.clone()
    labels = torch.randint(classes, (rows,), generator=generator)
    result = ff.overlay(x, labels, classes, strength)
    assert torch.equal(result, independent.overlay(x, labels, classes, strength))
    assert result.dtype == dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_overlay_of_images_is_on_every_channel(channels):
    x, labels = torch.rand(4, channels, 3, 5), torch.tensor([0, 6, 3, 5])
    result = ff.overlay(x, labels, 7, 2.0)
    assert result.shape == x.shape
    for image, written, label in zip(x, result, labels, strict=True):
        for plane, marked in zip(image, written, strict=True):
            expected = plane.clone().flatten()
            expected[:7] = 0
            expected[label] = 2.0
            assert torch.equal(marked, expected.view(3, 5))


def test_overlay_of_a_strided_input():
    x, labels = torch.rand(8, 4).T, torch.tensor([2, 0, 1, 1])
    assert torch.equal(ff.overlay(x, labels, 3), independent.overlay(x.contiguous(), labels, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_overlay_takes_every_integer(dtype):
    x, labels = torch.rand(3, 8), torch.tensor([2, 0, 1])
    assert torch.equal(ff.overlay(x, labels.to(dtype), 3), ff.overlay(x, labels, 3))


@hypothesis.given(
    labels=st.lists(st.integers(0, 9), min_size=0, max_size=50),
    classes=st.integers(10, 300),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.int64, torch.uint8, torch.int8]),
)
def test_wrong_labels_are_never_right(labels, classes, seed, dtype):
    true = torch.tensor(labels, dtype=dtype)
    wrong = ff.wrong_labels(true, classes, torch.Generator().manual_seed(seed))
    assert wrong.shape == true.shape
    assert not (wrong == true).any()
    assert ((wrong >= 0) & (wrong < classes)).all()
    assert torch.equal(wrong, ff.wrong_labels(true, classes, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_wrong_labels_are_uniform(classes):
    """Chi-square over the pairs (label, wrong label): below its 99.9% quantile, and not too good to be true."""
    draws = 3000
    labels = torch.arange(classes).repeat_interleave(draws)
    wrong = ff.wrong_labels(labels, classes, torch.Generator().manual_seed(0))
    counts = torch.zeros(classes, classes).index_put_((labels, wrong), torch.ones(len(labels)), accumulate=True)
    assert not counts.diagonal().any()
    expected = draws / (classes - 1)
    others = counts[~torch.eye(classes, dtype=torch.bool)]
    chi_square, freedom = ((others - expected) ** 2 / expected).sum().item(), classes * (classes - 2)
    if freedom == 0:
        assert chi_square == 0
    else:  # the quantile by Wilson and Hilferty
        quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert freedom / 10 < chi_square < quantile


def test_wrong_labels_without_a_generator_use_torchs():
    labels = torch.arange(10).repeat(10)
    torch.manual_seed(5)
    first = ff.wrong_labels(labels, 10)
    torch.manual_seed(5)
    assert torch.equal(first, ff.wrong_labels(labels, 10))
    assert not torch.equal(first, ff.wrong_labels(labels, 10))
