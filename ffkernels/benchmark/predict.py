"""What GPUs would take for the suite's cases by the cost model, as tables: counted, and predicted from datasheets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from .. import __version__, cost
from ..cost import Device, Launch, Work
from .cases import Case, layers_of, op_of
from .count import autograd
from .formats import Format
from .planned import PLANNERS, as_used_by
from .report import aligned, as_markdown

COUNTED_ON = "H100"  # whose plan the first table shows: plans differ little


def predict(cases: Sequence[Case], formats: Sequence[Format], devices: Sequence[Device]) -> dict[str, Any]:
    """Counts and predicted seconds, as JSON holds them."""
    return {
        "predicted": True,
        "ffkernels": __version__,
        "assumptions": {
            "launch_seconds": {d.name: d.launch_seconds for d in devices},
            "fill_seconds": cost.FILL_SECONDS,
            "barrier_seconds": cost.BARRIER_SECONDS,
        },
        "devices": {d.name: dataclasses.asdict(d) for d in devices},
        "cases": [_case(case, fmt, devices) for case in cases for fmt in formats],
    }


def _case(case: Case, fmt: Format, devices: Sequence[Device]) -> dict[str, Any]:
    op, layers = op_of(case), layers_of(case, fmt.dtype)
    least, once, usual = cost.minimum(op, layers), cost.once(op, layers), autograd(case, fmt.dtype)
    return {
        "name": case.name,
        "format": fmt.name,
        "minimum": _work(least),
        "once": _work(once),
        "autograd": _work(usual),
        "devices": {d.name: _on(d, case, fmt, once, usual) for d in devices},
    }


def _work(work: Work) -> dict[str, int]:
    return {"flops": work.flops, "bytes": work.bytes, "launches": work.launches}


def _on(device: Device, case: Case, fmt: Format, once: Work, usual: Work) -> dict[str, Any]:
    limit = cost.limit(once, device, fmt.rate)
    # kernels whose grids are not known: their products run at the peak, the rest at the memory's speed
    seconds = {"autograd": cost.predicted(Launch(**dataclasses.asdict(usual), rate=fmt.rate), device)}
    plans: dict[str, Any] = {}
    for backend, planner in PLANNERS.items():
        launches = planner(case, fmt, device)
        if launches is None:
            continue
        seconds[backend] = cost.predicted(launches, as_used_by(backend, device))
        total = sum(launches, start=Work(0, 0, 0, 0))
        plans[backend] = {**_work(total), "kernels": [dataclasses.asdict(launch) for launch in launches]}
    return {"limit": limit, "seconds": seconds, "plans": plans}


def _number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def count_rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The first table, heading first: launches and megabytes of a run, counted."""
    table = [
        ["case", "format", "launches: autograd", *PLANNERS, "MB: autograd", *PLANNERS, "minimum", "once",
         "over minimum", "Gflop"]
    ]  # fmt: skip
    for found in records:
        plans = found["devices"][COUNTED_ON]["plans"] if COUNTED_ON in found["devices"] else {}
        megabytes = {name: _number(found[name]["bytes"] / 1e6) for name in ("autograd", "minimum", "once")}
        ratios = [plans[b]["bytes"] / found["minimum"]["bytes"] for b in PLANNERS if b in plans]
        table.append([
            found["name"], found["format"], str(found["autograd"]["launches"]),
            *(str(plans[b]["launches"]) if b in plans else "-" for b in PLANNERS),
            megabytes["autograd"], *(_number(plans[b]["bytes"] / 1e6) if b in plans else "-" for b in PLANNERS),
            megabytes["minimum"], megabytes["once"], " ".join(f"{r:.2f}x" for r in ratios) or "-",
            _number(found["minimum"]["flops"] / 1e9),
        ])  # fmt: skip
    return table


def time_rows(records: Iterable[dict[str, Any]], backend: str) -> list[list[str]]:
    """The second table, heading first: on each GPU predicted microseconds of ``backend``, their part of the datasheet's
    limit, and how many times as long autograd takes by the same model."""
    records = list(records)
    names = list(records[0]["devices"])
    table = [["case", "format", *names]]
    for found in records:
        cells = []
        for name in names:
            on = found["devices"][name]
            own = on["seconds"].get(backend)
            cells.append(
                "-" if own is None else
                f"{_number(own * 1e6)} us, {on['limit'] / own:.0%}, {on['seconds']['autograd'] / own:.1f}x"
            )  # fmt: skip
        table.append([found["name"], found["format"], *cells])
    return table


_COUNTS = f"Counted, not measured: launches, and memory traffic of a run as planned for {COUNTED_ON}:"


def _times(backend: str) -> str:
    return (
        f"Predicted, not measured: {backend}'s time, its part of the datasheet's limit, and how many times as long "
        "autograd takes by the same model:"
    )


def _parts(run: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    records = run["cases"]
    backends = [b for b in PLANNERS if any(b in d["seconds"] for r in records for d in r["devices"].values())]
    return [(_COUNTS, count_rows(records)), *((_times(b), time_rows(records, b)) for b in backends)]


def text(run: dict[str, Any]) -> str:
    """The run for a terminal."""
    return "\n".join(line for title, rows in _parts(run) for line in ("", title, *aligned(rows, 2))).lstrip("\n")


def markdown(run: dict[str, Any]) -> str:
    """The run as a part of a Markdown file."""
    lines = [line for title, rows in _parts(run) for line in ("", title, "", *as_markdown(rows, 2))]
    return "\n".join(lines).lstrip("\n")
