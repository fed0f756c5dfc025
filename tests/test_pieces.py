"""Small pieces of training: schedule, augmentation, average of weights."""

import copy
import math

import pytest
import torch

import ffkernels as ff
from ffkernels.data import standardize


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"decay_from": 0.0}, [1, 0.75, 0.5, 0.25]),
        ({"decay_from": 0.5}, [1, 1, 1, 0.5]),
        ({"warmup": 0.5}, [0, 0.5, 1, 1]),
        ({"warmup": 0.5, "decay_from": 0.0}, [0, 0.375, 0.5, 0.25]),
    ],
)
def test_schedule(options, expected):
    assert [ff.Schedule(**options)(t) for t in (0.0, 0.25, 0.5, 0.75)] == expected


def test_schedule_arguments():
    for bad in ({"warmup": 1.0}, {"warmup": -0.1}, {"decay_from": 1.5}, {"decay_from": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ff.Schedule(**bad)


def shifted(image, down, right, fill=0.0):
    """One image, pixel by pixel."""
    _, height, width = image.shape
    result = torch.full_like(image, fill)
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[:, i, j] = image[:, i - down, j - right]
    return result


@pytest.mark.parametrize("pixels", [1, 2])
def test_every_image_is_shifted_and_every_shift_as_likely(pixels):
    x = torch.rand(900, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    moved = ff.Shift(pixels)(x, torch.Generator().manual_seed(1))
    steps = range(-pixels, pixels + 1)
    counts = dict.fromkeys(((a, b) for a in steps for b in steps), 0)
    for image, result in zip(x, moved, strict=True):
        (found,) = [move for move in counts if torch.equal(shifted(image, *move), result)]
        counts[found] += 1
    expected = 900 / len(counts)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < (26.1 if pixels == 1 else 51.2)  # 99.9 %
    assert torch.equal(x, before)
    flat = ff.Shift(pixels, (2, 4, 5))(x.flatten(1), torch.Generator().manual_seed(1))
    assert torch.equal(flat, moved.flatten(1))


def test_what_moves_in_is_black_in_the_units_of_the_images():
    x = standardize(torch.rand(50, 1, 4, 5, generator=torch.Generator().manual_seed(0)), 0.3, 0.5)
    moved = ff.Shift(1, fill=-0.6)(x, torch.Generator().manual_seed(1))
    down, right = torch.randint(3, (2, 50), generator=torch.Generator().manual_seed(1))
    for image, result, *window in zip(x, moved, down.tolist(), right.tolist(), strict=True):
        assert torch.equal(shifted(image, 1 - window[0], 1 - window[1], -0.6), result)
    assert (moved == -0.6).any()


def sampled(image, at):
    """One image of one channel: each pixel from the place at(down, right) from the centre, bilinear."""
    height, width = image.shape
    result = torch.empty_like(image)
    for i in range(height):
        for j in range(width):
            y, x = at(i - (height - 1) / 2, j - (width - 1) / 2)
            y = min(max(y + (height - 1) / 2, 0), height - 1)
            x = min(max(x + (width - 1) / 2, 0), width - 1)
            top, left = min(int(y), height - 2), min(int(x), width - 2)
            p, q = y - top, x - left
            rows = image[top : top + 2, left : left + 2]
            result[i, j] = (1 - p) * ((1 - q) * rows[0, 0] + q * rows[0, 1]) + p * (
                (1 - q) * rows[1, 0] + q * rows[1, 1]
            )
    return result


def test_images_are_turned_stretched_and_moved():
    x = torch.rand(20, 1, 7, 5, generator=torch.Generator().manual_seed(0))
    amounts = torch.rand(5, 20, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    before, found = x.clone(), ff.Affine(30, 0.2, 1.5)(x, torch.Generator().manual_seed(1))
    for image, result, (turn, tall, wide, right, down) in zip(x, found, amounts.T.tolist(), strict=True):
        a = math.radians(30 * turn)

        def at(v, u, a=a, tall=tall, wide=wide, right=right, down=down):
            v, u = (1 + 0.2 * tall) * v, (1 + 0.2 * wide) * u
            return (
                math.sin(a) * u + math.cos(a) * v + 1.5 * down,
                math.cos(a) * u - math.sin(a) * v + 1.5 * right,
            )

        assert torch.allclose(sampled(image[0].double(), at).float(), result[0], atol=2e-5)
    assert torch.equal(x, before)
    flat = ff.Affine(30, 0.2, 1.5, (1, 7, 5))(x.flatten(1), torch.Generator().manual_seed(1))
    assert torch.equal(flat, found.flatten(1))
    both = ff.Affine(30, 0.2, 1.5)(x.expand(-1, 2, -1, -1), torch.Generator().manual_seed(1))
    assert torch.equal(both, found.expand(-1, 2, -1, -1))
    assert torch.allclose(ff.Affine()(x, torch.Generator()), x, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float64):
        other = ff.Affine(30, 0.2, 1.5)(x.to(dtype), torch.Generator().manual_seed(1))
        assert other.dtype == dtype
        assert torch.allclose(other.float(), found, atol=2e-2)


def test_affine_arguments():
    for name, bad in (("degrees", -1), ("scale", 1.0), ("pixels", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be"):
            ff.Affine(**{name: bad})
    with pytest.raises(ValueError, match="image_shape must be given to Affine"):
        ff.Affine(1)(torch.rand(2, 20), torch.Generator())
    with pytest.raises(TypeError, match=r"floats for Affine, got torch\.uint8"):
        ff.Affine(1)(torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.Generator())


@pytest.mark.parametrize("shape", [(50, 123), (7, 2, 4, 5)])
def test_noise(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, noisy = x.clone(), ff.Noise(0.5)(x, torch.Generator().manual_seed(1))
    assert torch.equal(noisy, ff.Noise(0.5)(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(noisy, ff.Noise(0.5)(x, torch.Generator().manual_seed(2)))
    assert torch.equal(x, before)
    noise = noisy - x
    n, limit = noise.numel(), 0.5 * 3**0.5
    assert noise.abs().max() <= limit
    assert noise.mean().abs() < 4 * 0.5 / n**0.5
    assert noise.square().mean().item() == pytest.approx(0.25, rel=4 * 0.9 / n**0.5)
    counts = torch.histc(noise, 8, -limit, limit)  # uniform
    assert ((counts - n / 8) ** 2 / (n / 8)).sum() < 24.4  # 99.9 %
    left, right = noise.flatten()[:-1], noise.flatten()[1:]
    assert (left * right).mean().abs() < 4 * 0.25 / n**0.5
    assert torch.allclose(ff.Noise(0.5)(x.bfloat16(), torch.Generator().manual_seed(1)).float(), noisy, atol=0.03)
    assert torch.equal(ff.Noise(0.0)(x, torch.Generator()), x)


def test_augmentations_one_after_the_other():
    x, draws = torch.rand(5, 1, 4, 5), torch.Generator().manual_seed(1)
    chained = ff.Chain([ff.Shift(1), ff.Noise(0.5)])(x, torch.Generator().manual_seed(1))
    assert torch.equal(chained, ff.Noise(0.5)(ff.Shift(1)(x, draws), draws))


def test_noise_arguments():
    with pytest.raises(ValueError, match="deviation must be finite and >= 0"):
        ff.Noise(-0.1)
    with pytest.raises(TypeError, match=r"floats for Noise, got torch\.int64"):
        ff.Noise(1.0)(torch.zeros(2, 20, dtype=torch.int64), torch.Generator())


def test_standardize():
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    found = standardize(x, x.mean().item(), x.std().item())
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std().item() == pytest.approx(1)
    assert torch.allclose(found * x.std() + x.mean(), x)


def test_shift_arguments():
    with pytest.raises(ValueError, match="fill must be finite"):
        ff.Shift(1, fill=float("nan"))
    with pytest.raises(ValueError, match="pixels"):
        ff.Shift(0)
    with pytest.raises(ValueError, match="image_shape must be given"):
        ff.Shift(1)(torch.rand(3, 20), torch.Generator())
    for shape in ((1, 3, 3), (4, 5)):
        with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\) with C H W = K = 20, got"):
            ff.Shift(1, shape)(torch.rand(3, 20), torch.Generator())


def test_average_is_the_recurrence():
    net = torch.nn.Linear(3, 2)
    average = ff.WeightAverage(net, decay=0.5, every=2)
    expected = net.weight.detach().clone()
    for step in range(1, 25):
        with torch.no_grad():
            net.weight += 0.1 * step
        average.update(net, step)
        if step % 2 == 0:
            k = step // 2
            d = min(0.5, (1 + k) / (10 + k))
            expected = d * expected + (1 - d) * net.weight.detach()
        assert torch.allclose(average.weight, expected)
    own = net.weight.detach().clone()
    with average.applied(net):
        assert torch.equal(net.weight, average.weight)
    assert torch.equal(net.weight, own)
    again = copy.deepcopy(average)
    average.copy_to(net)
    assert torch.equal(net.weight, again.weight)
    assert not torch.equal(net.weight, own)
    with torch.no_grad():
        net.weight.zero_()
    assert torch.equal(average.weight, again.weight)


@pytest.mark.parametrize("made_in_bf16", [True, False])
def test_an_average_of_bf16_weights_keeps_what_bf16_would_lose(made_in_bf16):
    net = torch.nn.Linear(3, 2)
    net = net.bfloat16() if made_in_bf16 else net
    net.average = ff.WeightAverage(net, decay=0.99, every=1)
    net.bfloat16()
    assert net.average.weight.dtype == torch.float32
    expected = net.average.weight.clone()
    with torch.no_grad():
        net.weight.mul_(1.5)
    for step in range(1, 200):
        net.average.update(net, step)
        d = min(0.99, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * net.weight.detach().float()
    assert torch.allclose(net.average.weight, expected, rtol=1e-5)
    with net.average.applied(net):
        assert torch.equal(net.weight, expected.bfloat16())
    net.average.copy_to(net)
    assert torch.equal(net.weight, expected.bfloat16())
    assert net.double().average.weight.dtype == torch.float64


def test_average_arguments():
    for bad in ({"decay": 1.0}, {"decay": -0.1}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ff.WeightAverage(torch.nn.Linear(1, 1), **bad)
