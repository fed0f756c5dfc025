"""Local receptive fields: each unit of the first layer sees one window of the image, and the label."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .batches import epoch_generator
from .nn import FFNet


class ReceptiveFields:
    """Keeps the weights of a net's first layer at zero outside of a square window of pixels, drawn for each unit.

    Hinton 2022, section 3.2, has such local receptive fields without weight sharing, of 10 x 10 pixels on a grid, in a
    net that learns without labels: 1.16 % test error, 1.37 % where every unit sees every pixel. Here the layer stays
    dense: `begin` makes the initial weights, and fit calls the object after every step (``constraint``), which
    multiplies the weight by a mask of zeros and ones. Windows are drawn, each one inside the image as likely. The
    columns over which labels are written stay open to all units.

    Args:
        size: side of the window in pixels; of an image that is smaller a window is the whole height or width.
        image_shape: (C, H, W) of the flat inputs, K = C H W; a window is of all channels.
        units: N of the first layer.
        num_classes: labels written over the first pixels; 0: none are.
        seed: of the windows.

    Attributes:
        mask: (N, K) of zeros and ones, in the weight's dtype and on its device once that is known.

    Raises:
        TypeError, ValueError: a value that is not allowed; when called, a net with another first layer.
    """

    def __init__(
        self, size: int, image_shape: tuple[int, int, int], units: int, *, num_classes: int = 0, seed: int = 0
    ) -> None:
        if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {image_shape!r}")
        for i, side in enumerate(image_shape):
            checks.count(f"image_shape[{i}]", side, 1, 2**31, "channels or pixels")
        channels, height, width = image_shape
        checks.count("size", size, 1, 2**15, "the side of a window in pixels")
        checks.count("units", units, 1, 2**31, "N of the first layer")
        checks.count("num_classes", num_classes, 0, math.prod(image_shape), "labels written over the first pixels")
        checks.count("seed", seed, -(2**63), 2**63, "any integer")
        draws = epoch_generator(seed, 0, "receptive fields")
        rows, columns = (_windows(size, side, units, draws) for side in (height, width))
        seen = (rows[:, :, None] & columns[:, None, :]).flatten(1).repeat(1, channels)
        seen[:, :num_classes] = True
        self.mask = seen.float()
        self.share = min(size, height) * min(size, width) / (height * width)

    def begin(self, net: FFNet) -> None:
        """Of initial weights: zeros outside of the windows, and inside the variance that this takes from z.

        To be called before an average of the net is made, which begins with its weights.
        """
        self(net)
        net.stack[0].weight.mul_(self.share**-0.5)

    def __call__(self, net: FFNet) -> None:
        weight = self._weight(net)
        self.mask = self.mask.to(weight)
        weight.mul_(self.mask)

    def _weight(self, net: FFNet) -> Tensor:  # (N, K)
        weight = net.stack[0].weight
        if weight.shape != self.mask.shape:
            raise ValueError(
                f"the net's first layer must have a weight of shape {tuple(self.mask.shape)}, for which the receptive "
                f"fields were made, got {tuple(weight.shape)}"
            )
        return weight


def _windows(size: int, side: int, units: int, draws: torch.Generator) -> Tensor:  # (units, side) bool
    """For each unit ``size`` pixels in a row of ``side``."""
    first = torch.randint(max(side - size, 0) + 1, (units, 1), generator=draws)
    pixel = torch.arange(side)
    return (pixel >= first) & (pixel < first + size)
