"""Pictures of a training run, as PNG files: the error and loss over the epochs, and the layers' goodness."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checkpoint import write_atomic
from .data import extra
from .training import Record

_COLUMNS = 3  # panels side by side


def _figure(columns: int, rows: int) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row, drawn without a display and without touching matplotlib's global state."""
    figure = extra("matplotlib.figure").Figure(figsize=(4.8 * columns, 3.8 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _write(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())


def error_curve(path: str | Path, history: Sequence[Record], *, title: str, measured_on: str) -> None:
    """Write a picture of the error (left) and of every layer's loss (right) over the epochs.

    Args:
        history: fit's records, the last with "error".
        measured_on: the rows that the error is of: "test" or "validation".

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (left, right) = _figure(2, 1)
    figure.suptitle(title)
    marker = "o" if len(history) <= 30 else None
    epochs = [r["epoch"] for r in history if r["error"] is not None]
    errors = [r["error"] for r in history if r["error"] is not None]
    left.plot(epochs, errors, marker=marker, markersize=3, color="tab:red")
    left.annotate(
        f"{errors[-1]:.2f} %", (epochs[-1], errors[-1]), xytext=(0, 8), textcoords="offset points", ha="right"
    )
    left.set_title(f"Error on the {measured_on} set")
    left.set_ylabel("wrong labels (%)")
    for i in range(len(history[0]["loss"])):
        points = [(r["epoch"], r["loss"][i]) for r in history if r["loss"][i] is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=f"layer {i + 1}")
    right.set_title("Training loss of each layer")
    right.set_ylabel("mean loss")
    right.set_yscale("log")  # it falls by orders of magnitude
    right.legend(loc="upper right")
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for record, before in zip(history[1:], history[:-1], strict=True):
        if record["layer"] != before["layer"]:  # greedy training goes on to the next layer
            for axes in (left, right):
                axes.axvline(before["epoch"] + 0.5, color="gray", linestyle=":", linewidth=1)
    _write(figure, path)


def goodness_histograms(
    path: str | Path,
    positive: Tensor,  # (L, B)
    negative: Tensor,  # (L, B)
    thresholds: Sequence[float],  # L
    *,
    title: str,
    unit: str,
) -> None:
    """Write a picture with one panel a layer: how g is spread over positive and negative rows, and the threshold.

    Args:
        positive, negative: g of each layer for rows under their own label and under a wrong one, on the CPU.
        unit: what g is, for the axis: "sum of squares" or "mean of squares".

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = len(thresholds)
    columns = min(layers, _COLUMNS)
    figure, panels = _figure(columns, math.ceil(layers / columns))
    figure.suptitle(title)
    for i, axes in enumerate(panels):
        if i >= layers:
            axes.set_axis_off()
            continue
        both = torch.cat([positive[i], negative[i]]).double()
        if both.isfinite().all():
            low, high = both.min().item(), both.max().item()
            span = (low, high) if high > low else (low - 0.5, high + 0.5)
            for name, g, colour in (("positive", positive[i], "tab:blue"), ("negative", negative[i], "tab:orange")):
                axes.hist(g.tolist(), bins=60, range=span, color=colour, alpha=0.6, label=f"{name} rows")
        else:
            axes.text(0.5, 0.5, "goodness is not finite", transform=axes.transAxes, ha="center")
        axes.axvline(thresholds[i], color="black", linestyle="--", label=f"threshold {thresholds[i]:g}")
        right = (positive[i] > thresholds[i]).double().mean().item()
        wrong = (negative[i] > thresholds[i]).double().mean().item()
        axes.set_title(f"Layer {i + 1}: above threshold {right:.1%} pos., {wrong:.1%} neg.", fontsize=10)
        axes.set_xlabel(f"goodness g ({unit})")
        axes.set_ylabel("test rows")
        axes.margins(y=0.4)  # so that the legend covers no bar
        axes.legend(fontsize=8, loc="upper right")
    _write(figure, path)


def receptive_fields(
    path: str | Path,
    weight: Tensor,  # (N, C H W)
    image_shape: Sequence[int],
    *,
    title: str,
    most: int = 64,
) -> None:
    """Write a picture of the first units' weights as images: blue negative, red positive, each on its own scale.

    Args:
        weight: of a layer that sees the image; further columns (what a recurrent layer sees from above) are left out.
        image_shape: (C, H, W). The mean over the channels is shown.
        most: units that are shown, at least 1.

    Raises:
        ValueError: the weights are of another shape. ImportError: matplotlib is not installed.
    """
    checks.matrix("weight", weight)
    checks.count("most", most, 1, 2**31, "units that are shown")
    channels, height, width = image_shape
    if weight.shape[1] < channels * height * width:
        raise ValueError(
            f"weight must have at least {channels * height * width} columns, the pixels of images "
            f"{tuple(image_shape)}, got shape {tuple(weight.shape)}"
        )
    fields = weight[:most, : channels * height * width].detach().float().cpu()
    fields = fields.reshape(-1, channels, height, width).mean(1)
    columns = math.ceil(math.sqrt(len(fields)))
    figure = extra("matplotlib.figure").Figure(figsize=(8, 8.4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(math.ceil(len(fields) / columns), columns, squeeze=False).flat
    for i, axes in enumerate(panels):
        axes.set_axis_off()
        if i < len(fields):
            scale = fields[i].abs().max().item() or 1.0
            axes.imshow(fields[i].tolist(), cmap="RdBu_r", vmin=-scale, vmax=scale)
    _write(figure, path)
