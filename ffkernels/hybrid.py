"""Negative data without labels: hybrids of two images, mixed by a random mask of large smooth patches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from . import checks

# The blurred masks are sums of multiples of 4^-blurs in each direction: float64 holds them exactly up to here, so that
# every device and every order of the sums thresholds the same numbers.
MAX_BLURS = 13
BLURS = 10  # patches of about 8 pixels: on MNIST, parts of strokes


def hybrid_masks(
    count: int,
    height: int,
    width: int,
    *,
    blurs: int = BLURS,
    generator: torch.Generator | None = None,
) -> Tensor:  # (count, height, width) bool
    """Random bits, blurred ``blurs`` times by [1/4, 1/2, 1/4] both ways, thresholded at 1/2 (Hinton 2022, 3.2).

    The image's edges are joined (the blur goes on at the opposite edge), so every pixel has the same statistics.

    Args:
        count: masks >= 0. height, width: >= 1.
        blurs: in [0, 13]; the patches grow with its root. generator: a CPU generator; None: torch's own.

    Returns:
        A tensor on the CPU, the same for the same generator state on every machine.

    Raises:
        TypeError, ValueError: a wrong type or value.
    """
    checks.count("count", count, 0, 2**31, "masks")
    checks.count("height", height, 1, 2**31, "pixels")
    checks.count("width", width, 1, 2**31, "pixels")
    checks.count("blurs", blurs, 0, MAX_BLURS, "more would not be exact")
    bits = torch.randint(2, (count, height, width), generator=generator, dtype=torch.uint8).double()
    return _blur(height, blurs) @ bits @ _blur(width, blurs) > 0.5


@functools.lru_cache(maxsize=16)
def _blur(size: int, times: int) -> Tensor:  # (size, size) float64, symmetric
    """The matrix of ``times`` blurs by [1/4, 1/2, 1/4] of a line whose ends are joined."""
    one = torch.eye(size, dtype=torch.float64)
    once = one / 2 + one.roll(1, 0) / 4 + one.roll(-1, 0) / 4
    return torch.linalg.matrix_power(once, times)


def hybrid_images(
    x: Tensor,  # (B, K) or (B, C, H, W)
    image_shape: Sequence[int] | None = None,
    *,
    blurs: int = BLURS,
    generator: torch.Generator | None = None,
) -> Tensor:
    """For each image a negative one: parts of it, and for the rest the image in the next row (Hinton 2022, 3.2).

    Such a hybrid has the short-range structure of the data but not their long-range structure. All channels share a
    mask; the last row is mixed with the first. The rows should be in random order.

    Args:
        image_shape: (C, H, W) with C H W = K, for flat inputs; None for images, which have it.
        blurs, generator: as for `hybrid_masks`.

    Returns:
        A tensor of x's shape, dtype and device.

    Raises:
        TypeError, ValueError: a wrong type, shape or value.
    """
    checks.inputs("x", x)
    if (image_shape is None) == (x.dim() == 2):
        raise ValueError(
            f"image_shape must be given with flat inputs (B, K) only, got {image_shape} with {x.dim()}-dimensional x"
        )
    shape = tuple(x.shape[1:] if image_shape is None else image_shape)
    if len(shape) != 3 or (image_shape is not None and shape[0] * shape[1] * shape[2] != x.shape[1]):
        raise ValueError(f"image_shape must be (C, H, W) with C H W = K = {x.shape[1]}, got {shape}")
    images = x.reshape(len(x), *shape)
    masks = hybrid_masks(len(x), shape[1], shape[2], blurs=blurs, generator=generator).to(x.device)
    return torch.where(masks[:, None], images, images.roll(-1, 0)).reshape(x.shape)


@runtime_checkable
class ImageNegatives(Protocol):
    """Negatives that are images of their own: training with them sees no labels. fit takes any object like this."""

    def images(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W): the positives
        generator: torch.Generator,  # on the CPU; its draws make the training repeatable
    ) -> Tensor:  # as x
        ...


@dataclass(frozen=True)
class HybridImages:
    """`hybrid_images` of every minibatch as its negatives; the arguments are its. fit's batches are in random order.

    Raises:
        TypeError, ValueError: a wrong type or value.
    """

    image_shape: tuple[int, int, int] | None = None
    blurs: int = BLURS

    def __post_init__(self) -> None:
        checks.count("blurs", self.blurs, 0, MAX_BLURS, "more would not be exact")

    def images(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return hybrid_images(x, self.image_shape, blurs=self.blurs, generator=generator)
