"""A run as tables of text or Markdown: ratios first, then the times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..checks import PRECISIONS
from .columns import COLUMNS, FUSED
from .limit import limit

# Columns that ffkernels is compared with, and their headings.
BASELINES = {
    "autograd": "autograd",
    "eager": "eager",
    "compile": "compile",
    "compile medium": "compile bf16",
    "mm float32": "GEMMs fp32",
    "mm bf16": "GEMMs bf16",
}
LIMIT = "of limit"
BEGIN, END = "<!-- begin of the {} tables -->", "<!-- end of the {} tables -->"
_BEST_FIRST = tuple(reversed(PRECISIONS))


def ratios(record: dict[str, Any], precision: str) -> dict[str, float]:
    """For one precision of a case: how many times as long each baseline takes, and which part of the limit's speed is
    reached; without the columns that the case does not have."""
    seconds = {name: times["median"] for name, times in record["seconds"].items()}
    own = seconds[f"ffkernels {precision}"]
    found = {name: seconds[name] / own for name in BASELINES if name in seconds}
    return {**found, LIMIT: record["limit"][precision] / own}


def with_ratios(record: dict[str, Any], peak: dict[str, float]) -> dict[str, Any]:
    """The record of a case with its limits, in seconds, and ratios."""
    limits = {p: limit(record["flops"], record["bytes"], peak[p], record["bandwidth"]) for p in PRECISIONS}
    record = {**record, "limit": limits}
    return {**record, "ratios": {p: ratios(record, p) for p in PRECISIONS}}


def milliseconds(seconds: float) -> str:
    """Three digits that matter."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 9.95 else f"{value:.1f}x"


def ratio_rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The first table, heading first: a line for each case and precision."""
    rows = [["case", "precision", *BASELINES.values(), LIMIT, "ms"]]
    for record in records:
        for precision in _BEST_FIRST:
            found = record["ratios"][precision]
            own = record["seconds"][f"ffkernels {precision}"]["median"]
            cells = [_ratio(found.get(name)) for name in BASELINES]
            rows.append([record["name"], precision, *cells, f"{found[LIMIT]:.0%}", milliseconds(own)])
    return rows


def time_rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The second table, heading first: the median of every column in ms, and the limit of the best precision."""
    names = [name for name in COLUMNS if name not in FUSED]
    headings = [BASELINES.get(name, name) for name in names]
    rows = [["case", *headings, *_BEST_FIRST, "limit medium", "limit highest"]]
    for record in records:
        shown = [*names, *(f"ffkernels {p}" for p in _BEST_FIRST)]
        times = [record["seconds"].get(name, {}).get("median") for name in shown]
        times += [record["limit"]["medium"], record["limit"]["highest"]]
        rows.append([record["name"], *("-" if t is None else milliseconds(t) for t in times)])
    return rows


def aligned(rows: Sequence[Sequence[str]], first_numbers: int) -> list[str]:
    """Columns of text: from ``first_numbers`` on flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i >= first_numbers else cell.ljust(w)
                 for i, (cell, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return lines


def as_markdown(rows: Sequence[Sequence[str]], first_numbers: int) -> list[str]:
    rule = ["---:" if i >= first_numbers else "---" for i in range(len(rows[0]))]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def _blanked(rows: list[list[str]]) -> list[list[str]]:
    """Without the case's name where the line above has it."""
    return [row if i == 0 or row[0] != rows[i - 1][0] else ["", *row[1:]] for i, row in enumerate(rows)]


def headline(run: dict[str, Any]) -> list[str]:
    """Machine, date and measured peaks."""
    m, peak = run["machine"], run["peak"]
    held = "".join(f", {name}={value}" for name, value in m["environment"].items())
    return [
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']}; {m['system']}; ffkernels "
        f"{m['ffkernels']}, torch {m['torch']} ({m['torch_isa']}), Python {m['python']}; {run['date']}{held}",
        "measured peak, TFLOP/s: " + ", ".join(f"{p} {peak[p] / 1e12:.2f}" for p in _BEST_FIRST),
    ]


_RATIOS = "How many times as long as ffkernels each takes, and which part of the machine's limit is reached:"
_TIMES = "Medians, ms:"


def text(run: dict[str, Any]) -> str:
    """The run for a terminal."""
    lines = [*headline(run), "", _RATIOS, *aligned(_blanked(ratio_rows(run["cases"])), 2)]
    lines += ["", _TIMES, *aligned(time_rows(run["cases"]), 1)]
    reasons = {f"{name} is left out: {why}" for case in run["cases"] for name, why in case["left_out"].items()}
    return "\n".join([*lines, *sorted(reasons)])


def markdown(run: dict[str, Any]) -> str:
    """The run as a part of a Markdown file."""
    machine, peak = headline(run)
    lines = [f"Machine: {machine}.", "", f"{peak[0].upper()}{peak[1:]}.", "", _RATIOS, ""]
    lines += [*as_markdown(_blanked(ratio_rows(run["cases"])), 2), "", _TIMES, ""]
    return "\n".join([*lines, *as_markdown(time_rows(run["cases"]), 1)])


def replaced(document: str, part: str, what: str = "measured") -> str:
    """``document`` with ``part`` between its two marker lines; ValueError if it does not have them.

    Args:
        what: the word in those lines: "measured" or "predicted".
    """
    first, last = BEGIN.format(what), END.format(what)
    head, begin, rest = document.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"it must hold the lines {first!r} and {last!r}, between which the tables go")
    return f"{head}{begin}\n\n{part}\n\n{end}{tail}"
