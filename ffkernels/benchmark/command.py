"""``python -m ffkernels bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import write_atomic
from . import picture
from .cases import CASES, Case
from .measure import SECONDS, Run
from .report import markdown, replaced, text

_QUICK_SECONDS = 2.0  # for each case, of which there are fewer, too


def add_bench(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand and its options."""
    p: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time the kernels beside torch and the machine's limit",
        description="Time ffkernels at each precision, the usual implementation on autograd, a gradient derived by "
        "hand (eager and under torch.compile), the bare matrix products, and what the machine allows, side by side. "
        "Every result is checked before it is timed. docs/performance.md says what the columns are.",
        epilog="examples:\n"
        "  python -m ffkernels bench --quick\n"
        "  python -m ffkernels bench --only 'step 1024' predict --json run.json\n"
        "  python -m ffkernels bench --from run.json --png run.png\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="few cases, a short time each: one or two minutes")
    p.add_argument("--only", nargs="+", metavar="TEXT", default=[], help="cases whose name has one of these in it")
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    p.add_argument("--from", dest="source", metavar="FILE", help="show the run in this JSON file; measure nothing")
    p.add_argument("--png", metavar="FILE", help="draw the ratios")
    p.add_argument(
        "--markdown", metavar="FILE", help="put the tables into this Markdown file, between its marker lines"
    )
    return p


def _chosen(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    found = [c for c in CASES if (c.quick or not args.quick) and (not args.only or any(t in c.name for t in args.only))]
    if not found:
        parser.error(f"--only {' '.join(args.only)}: no case has this in its name; --list shows the names")
    return found


def _measured(args: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    run = Run()
    for i, case in enumerate(cases, 1):
        print(f"{i}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
        run.add(case, _QUICK_SECONDS if args.quick else SECONDS)
    return run.as_json()


def _read(path: str) -> dict[str, Any]:
    run = json.loads(Path(path).read_text())
    if not isinstance(run, dict) or not {"date", "machine", "peak", "cases"} <= run.keys():
        raise ValueError(f"{path} does not hold a run of python -m ffkernels bench")
    return run


def _with_tables(path: str, tables: str) -> str:
    try:
        return replaced(Path(path).read_text(), tables)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def bench(args: argparse.Namespace, parser: argparse.ArgumentParser, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the subcommand.

    Returns:
        The run, as its JSON file has it; with --list the names of the cases.
    """
    cases = _chosen(args, parser)
    if args.list:
        say("\n".join(c.name for c in cases))
        return {"cases": [c.name for c in cases]}
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    # what would fail after minutes of work fails now
    if args.png is not None:
        picture.require_matplotlib()
    for path in (args.png, args.json):
        if path not in (None, "-") and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no such folder")
    if args.markdown is not None:
        _with_tables(args.markdown, "")
    run = _measured(args, cases) if args.source is None else _read(args.source)
    say(text(run))
    if args.png is not None:
        picture.draw(args.png, run)
    if args.markdown is not None:
        write_atomic(args.markdown, _with_tables(args.markdown, markdown(run)).encode())
    return run
