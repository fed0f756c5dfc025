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
from ..cost import DEVICES
from . import gpu, picture, predict, report
from .cases import CASES, Case
from .formats import FORMATS
from .measure import SECONDS, Run

QUICK_SECONDS = 2.0  # for each case, of which there are fewer, too
FORMATS_ON_GPU = ("bf16", "medium", "high")  # unless others are asked for


def add_bench(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand and its options."""
    p: argparse.ArgumentParser = commands.add_parser(
        "bench",
        usage="%(prog)s [OPTION ...]",  # all of them before an error's one line would hide it
        help="time the kernels beside torch and the machine's limit",
        description="Time ffkernels at each precision, the usual implementation on autograd, a gradient derived by "
        "hand (eager and under torch.compile), the bare matrix products, and what the machine allows, side by side. "
        "Every result is checked before it is timed. docs/performance.md says what the columns are.",
        epilog="examples:\n"
        "  python -m ffkernels bench --quick\n"
        "  python -m ffkernels bench --only 'step 1024' predict --json run.json\n"
        "  python -m ffkernels bench --from run.json --png run.png\n"
        "  python -m ffkernels bench --device cuda --format bf16 --json run.json   on a GPU; docs/gpu.md\n"
        "  python -m ffkernels bench --predict --format bf16                       what GPUs would take; docs/gpu.md\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="few cases, a short time each: one or two minutes")
    p.add_argument("--only", nargs="+", metavar="TEXT", default=[], help="cases whose name has one of these in it")
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    p.add_argument(
        "--predict", action="store_true", help="measure nothing: count launches and bytes, predict GPUs' times"
    )
    p.add_argument("--format", nargs="+", choices=list(FORMATS), default=None,
                   help="with --device cuda or --predict: tensors of bf16 or fp16, or of float32 at this precision "
                   f"(default: {' '.join(FORMATS_ON_GPU)})")  # fmt: skip
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
    seconds = QUICK_SECONDS if args.quick else SECONDS
    formats = [FORMATS[name] for name in args.format or FORMATS_ON_GPU]
    if args.predict:
        return predict.predict(cases, formats, list(DEVICES.values()))
    if args.device == "cuda":
        run = gpu.GpuRun()
        pairs = [(case, fmt) for case in cases for fmt in formats]
        for i, (case, fmt) in enumerate(pairs, 1):
            print(f"{i}/{len(pairs)} {case.name}, {fmt.name}", file=sys.stderr, flush=True)
            run.add(case, fmt, seconds)
        return run.as_json()
    on_cpu = Run()
    for i, case in enumerate(cases, 1):
        print(f"{i}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
        on_cpu.add(case, seconds)
    return on_cpu.as_json()


def _read(path: str) -> dict[str, Any]:
    run = json.loads(Path(path).read_text())
    if not isinstance(run, dict) or not ("predicted" in run or {"date", "machine", "cases"} <= run.keys()):
        raise ValueError(f"{path} does not hold a run of python -m ffkernels bench")
    return run


def _module(run: dict[str, Any]) -> Any:
    """What shows such a run: its text() and markdown()."""
    if "predicted" in run:
        return predict
    return gpu if "gpu" in run["machine"] else report


def _with_tables(path: str, tables: str, what: str) -> str:
    try:
        return report.replaced(Path(path).read_text(), tables, what)
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
    on_gpu = args.predict or args.device == "cuda"
    if args.format is not None and not on_gpu:
        parser.error("--format goes with --device cuda or --predict")
    if args.png is not None and on_gpu:
        parser.error("--png draws runs on a CPU")
    # what would fail after minutes of work fails now
    if args.png is not None:
        picture.require_matplotlib()
    if args.png is not None and not Path(args.png).absolute().parent.is_dir():
        raise FileNotFoundError(f"{args.png}: there is no such folder")
    run = None if args.source is None else _read(args.source)
    what = "predicted" if args.predict or (run is not None and "predicted" in run) else "measured"
    if args.markdown is not None:
        _with_tables(args.markdown, "", what)
    if run is None:
        run = _measured(args, cases)
    show = _module(run)
    if args.png is not None and show is not report:
        raise ValueError(f"{args.source}: --png draws runs on a CPU")
    say(show.text(run))
    if args.png is not None:
        picture.draw(args.png, run)
    if args.markdown is not None:
        write_atomic(args.markdown, _with_tables(args.markdown, show.markdown(run), what).encode())
    return run
