"""The suite on a GPU: its columns, timed by events on cold caches, and its tables. ``make gpu`` runs it."""

from __future__ import annotations

import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch

from .. import __version__, backends, cost
from ..backends import use_backend
from .cases import Case, layers_of, op_of
from .columns import TRAINING, Column, Fused, Products, matmul_precision
from .formats import Format
from .measure import checked
from .problem import Problem
from .report import aligned, as_markdown
from .timing import Events, interleaved
from .torch_columns import Autograd, Compiled, Eager, Result

INPUTS = 4  # that take turns


def unavailable() -> str | None:
    """Why nothing can be measured here; None if there is a GPU."""
    if torch.cuda.is_available():
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"needs a GPU: torch {torch.__version__} is built for CPUs only"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return f"needs a GPU: torch {torch.__version__} finds none, or none whose driver is new enough for its {built}"


class Graphed:
    """A column's run as a CUDA graph: one for each input."""

    def __init__(self, make: Callable[[Problem], Any], problem: Problem) -> None:
        self.problem, self.inner = problem, make(problem)
        self.weights, self.moments = self.inner.weights, self.inner.moments
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # libraries and compilers set themselves up, the optimizer makes its state
                self.inner.run()
        torch.cuda.current_stream().wait_stream(beside)
        self.inner.reset()
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.results: list[Result] = []
        for _ in problem.inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.inner.run()
            self.graphs.append(graph)
            self.results.append(result)
            problem.rotate()

    def run(self) -> Result:
        self.graphs[self.problem.turn].replay()
        return self.results[self.problem.turn]


def _no_kernel(backend: str, fmt: Format, case: Case) -> str | None:
    return backends.refusal(backend, op_of(case), "cuda", fmt.dtype)


def columns(fmt: Format) -> dict[str, Column]:
    """The columns of one format. torch's own run under the same float32 precision as the kernels."""

    def torch_column(make: Callable[[Problem], Any], **options: Any) -> Column:
        return Column(make, partial(matmul_precision, fmt.precision), fmt.tolerance, **options)

    def fused(problem: Problem) -> Fused:
        return Fused(problem, fmt.precision)

    product = torch.float32 if fmt.rate in ("tf32", "fp32") else torch.float16 if fmt.rate == "fp16" else torch.bfloat16
    found = {
        "autograd": torch_column(Autograd, kinds=TRAINING),
        "graph": torch_column(partial(Graphed, Eager)),
        "compile": torch_column(partial(Compiled, mode="max-autotune")),
        "mm": Column(
            lambda problem: Products(problem, product), partial(matmul_precision, fmt.precision), precision=None
        ),
    }
    for backend in ("triton", "cuda"):
        options: dict[str, Any] = {
            "settings": partial(use_backend, backend),
            "precision": fmt.tolerance,
            "unavailable": partial(_no_kernel, backend, fmt),
        }
        found[backend] = Column(fused, **options)
        found[f"{backend} graph"] = Column(partial(Graphed, fused), **options)
    return found


OWN = ("triton", "triton graph", "cuda", "cuda graph")
COLUMNS = ("autograd", "graph", "compile", "mm", *OWN)


def datasheet(name: str, multiprocessors: int) -> cost.Device | None:
    """The entry of the cost model for the GPU that calls itself ``name``.

    None for what is sold under the same name with other rates (PCIe cards), and for a part of a GPU (MIG): they have
    other numbers of multiprocessors.
    """
    for key, device in cost.DEVICES.items():
        if re.search(rf"\b{key}\b", name) and device.multiprocessors == multiprocessors:
            return device
    return None


_TRITON = ("triton", "pytorch-triton-rocm", "pytorch-triton")  # names of its distributions


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """The GPU and the software; nothing that names the machine itself."""
    found = torch.cuda.get_device_properties(device)
    record: dict[str, Any] = {
        "ffkernels": __version__,
        "gpu": found.name,
        "arch": getattr(found, "gcnArchName", None) or f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "torch": torch.__version__,
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        "triton": next((version for name in _TRITON if (version := _version(name))), None),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "build": backends.info()["build"],
    }
    if shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        # not the index, which CUDA_VISIBLE_DEVICES changes
        command = ["nvidia-smi", f"--id=GPU-{found.uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True)
        if told.returncode == 0:
            values = [value.strip() for value in told.stdout.split(",")]
            record |= dict(zip(fields.replace(".", "_").split(","), values, strict=False))
    return record


@dataclass(frozen=True)
class GpuMeasurement:
    """What was found for one case."""

    case: Case
    format: Format
    samples: dict[str, list[float]]  # seconds a call of each column, a round each
    errors: dict[str, dict[str, float]]  # relative, of each column's first result
    left_out: dict[str, str]  # columns that cannot run here, and why

    def record(self, device: cost.Device | None) -> dict[str, Any]:
        """What was found, as JSON holds it. The limit is the datasheet's; None for a GPU not in the table."""
        case, fmt = self.case, self.format
        least = cost.once(op_of(case), layers_of(case, fmt.dtype))
        return {
            "name": case.name,
            "format": fmt.name,
            "optimizer": repr(case.optimizer) if case.trains else None,
            "flops": least.flops,
            "bytes": least.bytes,
            "limit": None if device is None else cost.limit(least, device, fmt.rate),
            "rounds": len(next(iter(self.samples.values()))),
            "seconds": {
                name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                for name, values in self.samples.items()
            },
            "errors": self.errors,
            "left_out": self.left_out,
        }


class GpuRun:
    """A run of several cases."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        reason = unavailable()
        if reason is not None:
            raise RuntimeError(reason)
        self.device = torch.device(device)
        self.date, self.machine = time.strftime("%Y-%m-%d"), environment(self.device)
        self.records: list[dict[str, Any]] = []

    def add(self, case: Case, fmt: Format, seconds: float) -> GpuMeasurement:
        """Check every column of ``case`` and time them for about ``seconds``; those that fail are left out."""
        problem = Problem(case, self.device, fmt.dtype, INPUTS)
        timed, errors, left_out = checked(problem, columns(fmt), go_on=True)
        if not timed:
            raise RuntimeError("\n".join(left_out.values()))
        samples = interleaved(timed, seconds, Events(self.device, problem.rotate), least=0.0)
        found = GpuMeasurement(case, fmt, samples, errors, left_out)
        self.records.append(found.record(datasheet(self.machine["gpu"], self.machine["multiprocessors"])))
        return found

    def as_json(self) -> dict[str, Any]:
        return {"date": self.date, "machine": self.machine, "cases": self.records}


def rows(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The table, heading first: medians in microseconds, and for the best of our columns how many times as long the
    best baseline takes and which part of the datasheet's limit is reached."""
    table = [["case", "format", *COLUMNS, "best baseline", "of limit"]]
    for found in records:
        seconds = {name: times["median"] for name, times in found["seconds"].items()}
        own = min((seconds[name] for name in OWN if name in seconds), default=None)
        baselines = [seconds[name] for name in ("autograd", "graph", "compile") if name in seconds]
        cells = [f"{seconds[name] * 1e6:.1f}" if name in seconds else "-" for name in COLUMNS]
        ratio = f"{min(baselines) / own:.2f}x" if own and baselines else "-"
        part = f"{found['limit'] / own:.0%}" if own and found["limit"] else "-"
        table.append([found["name"], found["format"], *cells, ratio, part])
    return table


def _headline(run: dict[str, Any]) -> list[str]:
    m = run["machine"]
    return [
        f"{m['gpu']} ({m['arch']}, {m['multiprocessors']} multiprocessors), driver "
        f"{m.get('driver_version', 'unknown')}; {m['system']}; ffkernels {m['ffkernels']}, torch {m['torch']} "
        f"({m['runtime']}), triton {m['triton']}, Python {m['python']}; {run['date']}",
        "Measured: medians in us, by CUDA events, L2 flushed before each call, inputs in turns.",
    ]


def _reasons(run: dict[str, Any]) -> list[str]:
    found = {(name, why.splitlines()[0]) for case in run["cases"] for name, why in case["left_out"].items()}
    return [f"{name} is left out: {why}" for name, why in sorted(found)]


def text(run: dict[str, Any]) -> str:
    """The run for a terminal."""
    return "\n".join([*_headline(run), "", *aligned(rows(run["cases"]), 2), *_reasons(run)])


def markdown(run: dict[str, Any]) -> str:
    """The run as a part of a Markdown file."""
    machine, how = _headline(run)
    return "\n".join([f"{machine}.", "", how, "", *as_markdown(rows(run["cases"]), 2), "", *_reasons(run)]).rstrip()


def main() -> int:
    """Say whether there is a GPU: the first step of ``make gpu``."""
    reason = unavailable()
    print(reason or torch.cuda.get_device_name())
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
