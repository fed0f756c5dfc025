"""Labels as FF reads them: written over the first pixels of the input, and wrong ones for the negative rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference


def overlay(
    x: Tensor,  # (B, K) or (B, C, H, W)
    labels: Tensor,  # (B,)
    num_classes: int,
    strength: float = 1.0,
) -> Tensor:
    """A copy of ``x`` with each label one-hot over the first ``num_classes`` inputs (Hinton 2022, section 3.3).

    Flat inputs: the first columns. Images: the first pixels, row by row, of every channel.

    Args:
        labels: integers in [0, num_classes).
        num_classes: in [1, K] for flat inputs, [1, H W] for images.
        strength: the value written for the label, in the units of x (usual: the largest pixel); the others become 0.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError: a wrong type, shape or value; labels out of range (looked at on CPU only).
    """
    checks.inputs("x", x)
    checks.labels("labels", labels, x, dims=1)
    planes = x if x.dim() == 2 else x.flatten(2).flatten(0, 1)  # (B, K) or (B C, H W)
    checks.count("num_classes", num_classes, 1, planes.shape[1], "labels are written over the first inputs of x")
    checks.number("strength", strength)
    checks.label_values("labels", labels, num_classes)
    per_plane = labels if x.dim() == 2 else labels.repeat_interleave(x.shape[1])
    return reference.overlay(planes, per_plane, num_classes, strength).reshape(x.shape)


def neutral(
    x: Tensor,  # (B, K) or (B, C, H, W)
    num_classes: int,
    strength: float = 1.0,
) -> Tensor:
    """A copy of ``x`` with the neutral label: strength / num_classes in each place of a label (Hinton 2022, 3.3).

    Arguments and errors as for `overlay`, of whose results over all labels it is the mean.
    """
    checks.inputs("x", x)
    planes = 1 if x.dim() == 2 else x.shape[1]
    result = x.clone(memory_format=torch.contiguous_format)
    rows = result.view(x.shape[0], planes, -1)
    checks.count("num_classes", num_classes, 1, rows.shape[2], "labels are written over the first inputs of x")
    checks.number("strength", strength)
    rows.narrow(2, 0, num_classes).fill_(strength / num_classes)
    return result


def wrong_labels(
    labels: Tensor,  # (B,)
    num_classes: int,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B,)
    """For each label another one, uniformly from the ``num_classes`` - 1 others; never the label itself.

    Args:
        labels: integers in [0, num_classes).
        num_classes: at least 2.
        generator: a CPU generator, so that the same seed draws the same labels on every device; None: torch's own.

    Raises:
        TypeError, ValueError: a wrong type, shape or value.
    """
    checks.labels("labels", labels, labels, dims=1)
    checks.count("num_classes", num_classes, 2, 2**31, "a wrong label needs another class")
    checks.label_values("labels", labels, num_classes)
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes
