"""Augmentation on the fly: each minibatch of images changed at random, all of it at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from . import checks


@dataclass(frozen=True)
class Shift:
    """Each image moved by up to ``pixels`` in either direction, every one of the (2 pixels + 1)^2 moves as likely.

    What moves in is ``fill``. Labels are written after the move, so they stay where they are.

    Args:
        pixels: at least 1.
        image_shape: (C, H, W) of flat inputs, K = C H W; images (B, C, H, W) have their own.
        fill: a black pixel, in the units of the images.

    Raises:
        TypeError, ValueError: a wrong value; when called, inputs of another size.
    """

    pixels: int
    image_shape: tuple[int, int, int] | None = None
    fill: float = 0.0

    def __post_init__(self) -> None:
        checks.count("pixels", self.pixels, 1, 2**15, "the largest move")
        checks.number("fill", self.fill)

    def __call__(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        generator: torch.Generator,  # on the CPU
    ) -> Tensor:
        """The moved images: a new tensor of x's shape and dtype."""
        if x.dim() == 4:
            images = x
        elif self.image_shape is None:
            raise ValueError("image_shape must be given to Shift for flat inputs (B, K), got None")
        else:
            images = x.view(len(x), *self.image_shape)
        size, moves = images.shape, 2 * self.pixels + 1
        padded = functional.pad(images, (self.pixels,) * 4, value=self.fill)
        windows = padded.unfold(2, size[2], 1).unfold(3, size[3], 1)  # (B, C, moves, moves, H, W), nothing copied
        down, right = torch.randint(moves, (2, len(x)), generator=generator).to(x.device)
        moved: Tensor = windows[torch.arange(len(x), device=x.device), :, down, right]
        return moved.reshape(x.shape)
