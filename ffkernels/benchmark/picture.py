"""The ratios of a run as a picture."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomic
from ..checks import PRECISIONS
from ..data import extra
from .report import BASELINES, LIMIT

_STYLE = {"medium": ("o", "tab:blue"), "high": ("s", "tab:orange"), "highest": ("D", "tab:green")}


def require_matplotlib() -> None:
    """ImportError names the extra that has it."""
    extra("matplotlib.figure")


def draw(path: str | Path, run: dict[str, Any]) -> None:
    """Write the PNG: a panel for each baseline and one for the limit, a line for each case, a mark for each precision.

    Raises:
        ImportError: matplotlib is not installed.
    """
    cases = run["cases"]
    lines = list(range(len(cases)))
    figure = extra("matplotlib.figure").Figure(figsize=(17, 2.2 + 0.36 * len(cases)), layout="constrained")
    panels = figure.subplots(1, len(BASELINES) + 1, sharey=True)
    for panel, name in zip(panels, (*BASELINES, LIMIT), strict=True):
        for precision in reversed(PRECISIONS):
            marker, colour = _STYLE[precision]
            values = [case["ratios"][precision].get(name, math.nan) for case in cases]  # nothing is drawn for nan
            panel.scatter(values, lines, marker=marker, color=colour, s=32, label=precision, zorder=3)
        panel.set_yticks(lines, [case["name"] for case in cases])
        panel.grid(axis="y", alpha=0.3)
        if name == LIMIT:
            panel.set_xlim(0, max(1.0, panel.get_xlim()[1]))
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            panel.set_title("Part of the machine's limit", fontsize=10)
        else:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            panel.axvline(1, color="black", linewidth=1)
            low, high = panel.get_xlim()
            panel.set_xlim(low, max(high, 1.05 * 2 ** (math.ceil(math.log2(low)) + 1)))  # two labels at least
            panel.set_title(f"Speed-up over {BASELINES[name]}", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    marks, names = panels[0].get_legend_handles_labels()
    figure.legend(marks, [f"precision {name}" for name in names], loc="outside lower center", ncols=len(names))
    m = run["machine"]
    figure.suptitle(
        f"ffkernels {m['ffkernels']} on {m['cpu']} ({m['isa']}), {m['threads']} threads, torch {m['torch']}"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
