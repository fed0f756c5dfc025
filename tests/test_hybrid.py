"""Hybrid negatives: the masks against integer arithmetic, what is mixed with what, and where the bits come from."""

import pytest
import torch

import ffkernels as ff
from ffkernels.hybrid import hybrid_masks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blurred(bits, times):
    """Blurring by [1, 2, 1] both ways, in Python's integers: 4^(2 times) as large as by quarters."""
    height, width = len(bits), len(bits[0])
    for _ in range(times):
        bits = [[row[i - 1] + 2 * row[i] + row[(i + 1) % width] for i in range(width)] for row in bits]
        bits = [
            [bits[j - 1][i] + 2 * bits[j][i] + bits[(j + 1) % height][i] for i in range(width)] for j in range(height)
        ]
    return bits


@pytest.mark.parametrize("blurs", [0, 1, 2, 7, 13])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 4), (1, 1)])
def test_masks_are_the_thresholded_integers(blurs, size):
    masks = hybrid_masks(3, *size, blurs=blurs, generator=generator())
    bits = torch.randint(2, (3, *size), generator=generator(), dtype=torch.uint8).tolist()
    half = 16**blurs // 2 if blurs else 0.5
    for mask, own in zip(masks.tolist(), bits, strict=True):
        assert mask == [[v > half for v in row] for row in blurred(own, blurs)]


def test_masks_of_the_same_seed_are_the_same_whatever_the_threads():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(hybrid_masks(50, 28, 28, generator=generator(3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert not torch.equal(found[0], hybrid_masks(50, 28, 28, generator=generator(4)))


def test_masks_cover_half_and_their_patches_grow():
    changes = []
    for blurs in (0, 3, 10):
        masks = hybrid_masks(400, 28, 28, blurs=blurs, generator=generator())
        assert masks.double().mean().item() == pytest.approx(0.5, abs=0.03)
        changes.append((masks != masks.roll(1, 2)).double().mean().item())
    assert changes[0] == pytest.approx(0.5, abs=0.02)
    assert changes[0] > 2 * changes[1] > 3 * changes[2]


def test_each_pixel_is_of_the_image_or_of_the_next_one():
    x = torch.arange(6.0)[:, None].expand(6, 3 * 4 * 5).reshape(6, 3, 4, 5)
    mixed = ff.hybrid_images(x, blurs=2, generator=generator())
    masks = hybrid_masks(6, 4, 5, blurs=2, generator=generator())
    following = torch.tensor([1.0, 2, 3, 4, 5, 0])
    for row in range(6):
        for channel in range(3):
            assert torch.equal(mixed[row, channel], torch.where(masks[row], float(row), following[row]))
    flat = ff.hybrid_images(x.flatten(1), (3, 4, 5), blurs=2, generator=generator())
    assert torch.equal(flat, mixed.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_dtypes_and_the_empty_batch(dtype):
    x = torch.randint(100, (4, 12), generator=generator()).to(dtype)
    assert ff.hybrid_images(x, (1, 3, 4)).dtype == dtype
    assert ff.hybrid_images(x[:0], (1, 3, 4)).shape == (0, 12)
    assert torch.equal(ff.hybrid_images(x[:1], (1, 3, 4)), x[:1])


def test_torchs_own_generator_is_used_only_without_another():
    before = torch.random.get_rng_state()
    ff.hybrid_images(torch.rand(2, 12, generator=generator()), (1, 3, 4), generator=generator())
    assert torch.equal(torch.random.get_rng_state(), before)
    ff.hybrid_images(torch.rand(2, 12, generator=generator()), (1, 3, 4))
    assert not torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 12)}, r"image_shape must be given with flat inputs .* got None"),
        ({"x": torch.zeros(2, 1, 3, 4), "image_shape": (1, 3, 4)}, r"image_shape must be given with flat inputs"),
        ({"x": torch.zeros(2, 12), "image_shape": (3, 4)}, r"must be \(C, H, W\) with C H W = K = 12, got \(3, 4\)"),
        ({"x": torch.zeros(2, 12), "image_shape": (1, 4, 4)}, r"C H W = K = 12, got \(1, 4, 4\)"),
        ({"x": torch.zeros(2, 12), "image_shape": (1, 3, 4), "blurs": 14}, r"blurs must be in \[0, 13\]"),
        ({"x": torch.zeros(12)}, r"x must have shape"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ff.hybrid_images(**arguments)
