"""Faults planted in copies of the kernels, one after the other, each of which the tests named beside it must catch.

    python tests/mutate.py triton            all of them; exit status 1 if one survives
    python tests/mutate.py triton -k decay   those with this in their name

Triton kernels run in Triton's interpreter. A fault is caught when a test fails by an assertion or by a check of the PTX
interpreter: a kernel that no longer compiles proves nothing. Before any fault the same tests must pass on an unchanged
copy.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """``old`` stands once in ``file``; with ``new`` in its place one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _ops(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_ops.py::{name}" for name in names)


_FORWARD = _ops("test_options[ff_forward-triton-cpu-float32-bias-defaults]")
_FORWARD_TILES = _ops("test_shapes[ff_forward-triton-cpu-float32-(33, 123, 110)]")
_STEP = _ops("test_options[ff_step_-triton-cpu-float32-bias-defaults]")
_GRAD_TILES = _ops("test_shapes[ff_grad-triton-cpu-float32-(33, 123, 110)]")
_GRAD = _ops("test_options[ff_grad-triton-cpu-float32-bias-defaults]")
_ADAM = _ops("test_adam[ff_update_-triton-cpu-float32-adam-decay]")
_ADAMW = _ops("test_adam[ff_update_-triton-cpu-float32-adamw]")
_NO_TERMS = _ops("test_small_coefficients_do_not_underflow[triton-cpu-float16]")
_LABELS = _ops("test_options[ff_label_step_-triton-cpu-float32-bias-defaults]")

TRITON = [
    Fault("tiles are not masked in depth", "common.py", "(col + c < width)[None, :], other=0.0)\n    return tile",
          "(col + c < width + 1)[None, :], other=0.0)\n    return tile", _FORWARD),
    Fault("the last row of a tile is masked", "common.py", "mask=(row + r < height)[:, None] & (col + c < width)",
          "mask=(row + r < height - 1)[:, None] & (col + c < width)", _GRAD),
    Fault("a tile's rows have the wrong stride", "common.py", "col + r[:, None] * stride + c[None, :]\n        tile",
          "col + r[:, None] * width + c[None, :]\n        tile",
          _ops("test_layouts_of_what_is_only_read[ff_forward-triton-cpu-float32-every second row]")),
    Fault("the row scale forgets eps", "common.py", "(tl.sqrt_rn(q) + eps)", "(tl.sqrt_rn(q) + 0.5 * eps)",
          _ops("test_options[ff_forward-triton-cpu-float32-bias-tanh-0.3-sum]")),
    Fault("the forward forgets the row scale", "forward.py",
          "acc = acc * r[:, None]", "acc = acc * 1.0", _FORWARD),
    Fault("the last columns of a tile are not computed", "forward.py", "for k in range(0, K, BLOCK_K):",
          "for k in range(0, K - BLOCK_K + 1, BLOCK_K):", _FORWARD_TILES),
    Fault("the bias is added after the goodness", "forward.py", "acc += tl.load(bias + col + n, mask=in_n, other=0.0)",
          "acc += 0.0 * tl.load(bias + col + n, mask=in_n, other=0.0)", _FORWARD),
    Fault("padding counts in the goodness", "forward.py", "tl.where(in_n[None, :], result * result, 0.0)",
          "tl.where(in_n[None, :], result * result, 1.0)", _FORWARD),
    Fault("every tile writes the goodness of the first", "forward.py", "goodness + tile_n.to(tl.int64) * M",
          "goodness + 0 * tile_n.to(tl.int64) * M", _FORWARD_TILES),
    Fault("the sign of the loss is turned", "update.py", "c = tl.where(inside, -s * logistic_slope",
          "c = tl.where(inside, s * logistic_slope", _STEP),
    Fault("the update is handed squared norms for the scales", "forward.py", "scale_or_zero(q, r), mask=in_m",
          "scale_or_zero(q, q), mask=in_m", _STEP),
    Fault("without rank-1 terms the update forgets the row scale", "update.py", "(c * r)[None, :]", "c[None, :]",
          _NO_TERMS),
    Fault("the update forgets the row scale", "update.py", "left = left * r[None, :]", "left = left * scale", _GRAD),
    Fault("the peers' term is left out", "update.py", "left += d[:, None] * tl.load(row_term",
          "left += 0.0 * d[:, None] * tl.load(row_term", _GRAD),
    Fault("the gradient's rows have the wrong stride", "update.py", "n[:, None] * K + k[None, :], mask",
          "n[:, None] * N + k[None, :], mask", _GRAD),
    Fault("one row of the sum is left out", "update.py", "end = tl.minimum(begin + split_rows, M)",
          "end = tl.minimum(begin + split_rows, M - 1)", _GRAD),
    Fault("only the first column of tiles is computed", "common.py", "height, pid % in_group // height",
          "height, 0 * (pid % in_group // height)", _GRAD_TILES),
    Fault("Adam forgets the weight decay", "optimizers.py", "grad += h4 * value", "grad += 0.0 * value", _ADAM),
    Fault("AdamW's decay is Adam's", "optimizers.py", "value *= 1.0 - rate * h4", "grad += h4 * value", _ADAMW),
    Fault("the second moment is not corrected", "optimizers.py", "second = 1.0 / one_minus_power(steps, log_beta2)",
          "second = 1.0 + 0.0 * one_minus_power(steps, log_beta2)", _ADAM),
    Fault("the first moment is not damped", "optimizers.py", "new0 = h1 * old0 + rest1 * grad\n            new1",
          "new0 = h1 * old0 + grad\n            new1", _ADAM),
    Fault("the bias takes no step", "update.py", "finish(tl.sum(sum_dz, 1), bias,",
          "finish(0.0 * tl.sum(sum_dz, 1), bias,", _STEP),
    Fault("the slope of the loss is not refined", "factors.py", "for _ in tl.static_range(3):",
          "for _ in tl.static_range(1):", _STEP),
    Fault("the label does not count in the row's norm", "label_forward.py", "+ strength * strength",
          "+ 0.0 * strength", _LABELS),
    Fault("negative rows are taken for positive ones", "label_update.py", "sign = 1.0 - 2.0 * half",
          "sign = 1.0 - 0.0 * half", _LABELS),
    Fault("columns beside the labels are left out", "label_update.py", ".to(tile.dtype) + beside", ".to(tile.dtype)",
          _LABELS),
]  # fmt: skip
TRITON = [fault._replace(file=f"ffkernels/triton/{fault.file}") for fault in TRITON]


SETS = {"triton": TRITON}
ENVIRONMENT = {"triton": {"TRITON_INTERPRET": "1"}}


def plant(fault: Fault, folder: Path) -> None:
    """Write the fault into the copy in ``folder``."""
    file = folder / fault.file
    text = file.read_text()
    if text.count(fault.old) != 1:
        raise RuntimeError(f"mutate.py: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}, not once")
    file.write_text(text.replace(fault.old, fault.new))


def _copy(folder: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", ".*")
    for name in ("ffkernels", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for built in (ROOT / "ffkernels").glob("*.so"):
        (folder / "ffkernels" / built.name).symlink_to(built)


def _planted_copy(fault: Fault | None, folder: Path) -> Path:
    _copy(folder)
    if fault is not None:
        plant(fault, folder)
    return folder


def _child(root: Path, folder: Path, tests: Sequence[str], begin: Callable[[], None]) -> NoReturn:
    """Run the tests of the package in ``root``; pytest's exit status is the process's, its output is in ``folder``."""
    import pytest

    status = 70  # of a child that fails otherwise, and must not go on as if it were the parent
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(root)
        sys.path[:0] = [str(root), str(root / "tests")]
        sys.dont_write_bytecode = True
        begin()
        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _verdict(status: int, folder: Path) -> str:
    output = (folder / "output").read_text()
    if status == 0:
        return "survives"
    if status == 1 and re.search(r"AssertionError|^E +assert|DID NOT RAISE|PtxFault", output, re.MULTILINE):
        return "caught"
    return f"pytest ended with {status}:\n{output[-3000:]}"


def run(
    faults: Sequence[Fault | None],
    tests: Sequence[Sequence[str]],
    jobs: int,
    prepare: Callable[[Fault | None, Path], Path] = _planted_copy,
    begin: Callable[[Fault | None], None] = lambda fault: None,
) -> list[str]:
    """A verdict for each fault (None: no fault): "caught", "survives", or what else happened.

    What all tests import is imported once, here; each fault then runs in a fork.

    Args:
        prepare: plants the fault; gets a folder of its own and gives the one with the package to test.
        begin: called in the fork, before the tests.
    """
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a fork has no threads but its own
    if os.environ.get("TRITON_INTERPRET"):
        import triton.runtime.interpreter  # noqa: F401
    assert "ffkernels" not in sys.modules
    verdicts: list[str] = [""] * len(faults)
    running: dict[int, tuple[int, Path]] = {}

    def wait() -> None:
        pid, status = os.wait()
        i, folder = running.pop(pid)
        verdicts[i] = _verdict(os.waitstatus_to_exitcode(status), folder)

    with tempfile.TemporaryDirectory() as name:
        for i, (fault, chosen) in enumerate(zip(faults, tests, strict=True)):
            folder = Path(name) / str(i)
            folder.mkdir()
            root = prepare(fault, folder)
            while len(running) >= jobs:
                wait()
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _child(root, folder, chosen, partial(begin, fault))
            running[pid] = (i, folder)
        while running:
            wait()
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", choices=list(SETS))
    parser.add_argument("-k", metavar="TEXT", default="", help="faults whose name has this in it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults of these names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT[args.kernels])
    faults = [f for f in SETS[args.kernels] if args.k in f.name and (args.only is None or f.name in args.only)]
    return report(faults, partial(run, jobs=args.jobs))


def report(faults: Sequence[Fault], run: Callable[..., list[str]]) -> int:
    """Run the tests without a fault and with each, and print what became of it; 0 if all are caught."""
    start = time.monotonic()
    every = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    sound, *verdicts = run([None, *faults], [every, *(fault.tests for fault in faults)])
    good = sound == "survives"
    print(f"without a fault the tests {'pass' if good else 'do not pass: ' + sound}")
    for fault, verdict in zip(faults, verdicts, strict=True):
        print(f"{verdict:10}{fault.name} ({fault.file})")
        good = good and verdict == "caught"
    print(f"{sum(v == 'caught' for v in verdicts)} of {len(faults)} caught, {time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
