"""Augmentation on the fly: each minibatch of images changed at random, all of it at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        images = _images(x, self.image_shape, "Shift")
        size, moves = images.shape, 2 * self.pixels + 1
        padded = functional.pad(images, (self.pixels,) * 4, value=self.fill)
        windows = padded.unfold(2, size[2], 1).unfold(3, size[3], 1)  # (B, C, moves, moves, H, W), nothing copied
        down, right = torch.randint(moves, (2, len(x)), generator=generator).to(x.device)
        moved: Tensor = windows[torch.arange(len(x), device=x.device), :, down, right]
        return moved.reshape(x.shape)


@dataclass(frozen=True)
class Affine:
    """Each image turned, stretched and moved a little, the amounts uniform in the ranges given.

    An image's pixel at (u, v) from the centre is what was at R (s u, t v) + d, with a rotation R, a factor for each
    direction and a move d of its own: distortions as Simard, Steinkraus & Platt 2003 ("Best practices for convolutional
    neural networks applied to visual document analysis") train with. Between pixels the value is bilinear, beyond the
    edge the nearest pixel's. Labels are written afterwards, so they stay where they are.

    Args:
        degrees: turned by up to so much, either way. scale: in [0, 1): stretched or shrunk by up to this share, in
            height and width independently. pixels: moved by up to so many, up or down and left or right.
        image_shape: (C, H, W) of flat inputs, K = C H W; images (B, C, H, W) have their own.

    Raises:
        TypeError, ValueError: a wrong value; when called, inputs of another size or of integers.
    """

    degrees: float = 0.0
    scale: float = 0.0
    pixels: float = 0.0
    image_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("degrees", "scale", "pixels"):
            checks.number(name, getattr(self, name), 0.0)
        if self.scale >= 1:
            raise ValueError(f"scale must be in [0, 1), got {self.scale!r}")

    def __call__(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W), of floats
        generator: torch.Generator,  # on the CPU
    ) -> Tensor:
        """The changed images: a new tensor of x's shape and dtype."""
        _require_floats(x, "Affine")
        images = _images(x, self.image_shape, "Affine")
        images = images.to(torch.promote_types(x.dtype, torch.float32))
        height, width = images.shape[2:]
        down, right = ((torch.arange(n) - (n - 1) / 2).to(images) for n in (height, width))  # from the centre, pixels
        turn, stretch_down, stretch_right, *move = (
            torch.rand(5, len(x), generator=generator, dtype=torch.float32).to(images)[:, :, None] * 2
            - 1  # (B, 1) each
        )
        angle = turn * math.radians(self.degrees)
        cos, sin = angle.cos(), angle.sin()
        v, u = (1 + stretch_down * self.scale) * down, (1 + stretch_right * self.scale) * right  # (B, H), (B, W)
        where = images.new_empty(len(x), height, width, 2)  # right, then down, as grid_sample takes it: in +-1
        for i, (across, along, size) in enumerate(((cos * u, -sin * v, width), (sin * u, cos * v, height))):
            across = across + move[i] * self.pixels
            torch.add(across[:, None, :] * (2 / size), along[:, :, None] * (2 / size), out=where[..., i])
        result = functional.grid_sample(images, where, padding_mode="border", align_corners=False)
        return result.to(x.dtype).reshape(x.shape)


@dataclass(frozen=True)
class Noise:
    """Noise on every pixel, uniform with mean 0: a net that sees no image twice cannot learn it by heart.

    Bishop 1995 ("Training with noise is equivalent to Tikhonov regularization"). Of 256 values, a random byte each:
    float draws take a tenth of a training step, bytes a fiftieth.

    Args:
        deviation: its standard deviation, in the units of the images.

    Raises:
        TypeError, ValueError: a wrong value; when called, images of integers.
    """

    deviation: float

    def __post_init__(self) -> None:
        checks.number("deviation", self.deviation, 0.0)

    def __call__(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W), of floats
        generator: torch.Generator,  # on the CPU
    ) -> Tensor:
        """The images with noise: a new tensor of x's shape and dtype."""
        _require_floats(x, "Noise")
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        steps = words.view(torch.int8)[: x.numel()].view(x.shape).to(x.device)
        # from -128 to 127 in steps of 1: mean -1/2, variance (256^2 - 1) / 12
        scale = self.deviation * (12 / (256**2 - 1)) ** 0.5
        return torch.add(x, steps, alpha=scale).add_(scale / 2)  # nothing large beside the result: its pages cost more


@dataclass(frozen=True)
class Chain:
    """Augmentations one after the other.

    Args:
        pieces: functions as fit's ``augment``.
    """

    pieces: Sequence[Callable[[Tensor, torch.Generator], Tensor]]

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        for piece in self.pieces:
            x = piece(x, generator)
        return x


def _require_floats(x: Tensor, owner: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must hold floats for {owner}, got {x.dtype}")


def _images(x: Tensor, image_shape: tuple[int, int, int] | None, owner: str) -> Tensor:  # (B, C, H, W)
    if x.dim() == 4:
        return x
    if image_shape is None:
        raise ValueError(f"image_shape must be given to {owner} for flat inputs (B, K), got None")
    if len(image_shape) != 3 or math.prod(image_shape) != x.shape[1]:
        raise ValueError(f"image_shape must be (C, H, W) with C H W = K = {x.shape[1]}, got {image_shape}")
    return x.reshape(len(x), *image_shape)
