"""A GPU for tests: the .cuda ops on CPU tensors. The plans that the host code makes, launched in the PTX interpreter.

What runs here is all that runs on a GPU but for csrc/cuda/launch.cu: the ops' own checks and allocations, the plan,
the argument bytes, and the PTX that nvcc makes of the kernels.
"""

from __future__ import annotations

import functools
import json
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptx
import pytest
import torch
from ptx import In, Out, Struct
from ptx.limits import blocks_per_sm, limits

import ffkernels as ff
from ffkernels import _extension, backends

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
MATHS = ("bf16", "fp16", "f32", "tf32", "f32_bf16")  # in the order of the enum Math
REGISTERS = 168  # what __launch_bounds__(128, 3) allows a thread
HAS_KERNELS = _extension.unavailable() is None and (_extension.build_info() or {}).get("cuda") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the extension is built without CUDA")


def shared_bytes(math: str) -> int:
    """As shared_bytes() of params.h."""
    return 3 * (2 * 8192 + 256 * (2 if math == "fp16" else 1)) + 16


@dataclass(frozen=True)
class Gpu:
    """The device that plans are made for, and the order in which its blocks start."""

    capability: int = 80
    multiprocessors: int = 2
    cooperative: bool = True
    resident: tuple[int, ...] | None = None  # blocks a multiprocessor, of each Math; None: what the limits allow
    seed: int = 0

    def blocks(self) -> tuple[int, ...]:
        if self.resident is not None:
            return self.resident
        lim = limits(self.capability)
        return tuple(blocks_per_sm(lim, 128, shared_bytes(m), REGISTERS) for m in MATHS)


@dataclass
class Launched:
    """What a call planned and what its launches did."""

    plan: dict[str, Any]
    reports: list[ptx.Report] = field(default_factory=list)


def plan(op: str, args: tuple, gpu: Gpu) -> tuple[Any, dict[str, Any] | None, torch.Tensor | None]:
    """Calls the flat op; its results, not yet computed, the plan, and the scratch memory. No plan: nothing to do."""
    torch.ops.ffkernels.cuda_record(gpu.capability, gpu.multiprocessors, gpu.cooperative, list(gpu.blocks()))
    try:
        results = getattr(torch.ops.ffkernels, op).cuda(*args)
    finally:
        text, scratch = torch.ops.ffkernels.cuda_recorded()
    calls = json.loads(text)
    assert len(calls) == len(scratch) <= 1
    return results, calls[0] if calls else None, scratch[0] if scratch else None


def execute(op: str, args: tuple, gpu: Gpu | None = None) -> tuple[Any, Launched | None]:
    """Calls the flat op and runs what it planned."""
    gpu = gpu or Gpu()
    results, planned, scratch = plan(op, args, gpu)
    if planned is None:
        return results, None
    memory = [*_arguments(op, args), *(Out(t) for t in _tensors(results))]
    words = None
    for part in planned["parts"]:
        t = scratch[part["offset"] : part["offset"] + part["bytes"]]
        if part["name"] == "words":
            words = t.zero_()
        memory.append(t if part["name"] == "words" else Out(t))
    done = Launched(planned)
    for launch in planned["launches"]:
        report = ptx.run(
            module(launch["kernel"], "sm_90" if gpu.capability >= 90 else "sm_80"), launch["kernel"], launch["grid"],
            launch["block"], launch["shared"], [_relocated(bytes.fromhex(launch["arguments"]), memory)],
            cooperative=launch["cooperative"], sms=gpu.multiprocessors, registers=REGISTERS, seed=gpu.seed,
        )  # fmt: skip
        done.reports.append(report)
    left = words.view(torch.int32).clone()
    left[:2] &= 0x7FFFFFFF  # the barriers' top bits may stand either way
    assert not left.any(), "the workspace's words are not ready for the next launch"
    for t in _tensors(results):
        out = next(m for m in memory if isinstance(m, Out) and m.tensor is t)
        assert out.state is None or not out.state.any(), "a result has bytes that were never written"
    return results, done


@functools.cache
def module(kernel: str, arch: str) -> str:
    return ptx.compile_cuda(SOURCES / "cuda" / f"{kernel.removeprefix('ff_')}.cu", arch, includes=[SOURCES])


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.numel() else []
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def _arguments(op: str, args: tuple) -> list:
    """The tensors among the arguments; those that the schema does not mark must not be written."""
    schema = getattr(torch.ops.ffkernels, op).cuda._schema
    found = []
    for argument, value in zip(schema.arguments, args, strict=True):
        written = argument.alias_info is not None and argument.alias_info.is_write
        found += [t if written else In(t) for t in _tensors(value)]
    return found


def _relocated(data: bytes, memory: list) -> Struct:
    """Finds the pointers in an argument: words that are an address in one of the tensors."""
    spans = []
    for m in memory:
        t = m if isinstance(m, torch.Tensor) else m.tensor
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), m))
    pointers = {}
    for at in range(0, len(data), 8):
        (word,) = struct.unpack_from("<Q", data, at)
        for start, end, m in spans:
            if start <= word < end:
                pointers[at] = (m, word - start)
                break
    return Struct(data, pointers)


@contextmanager
def running(gpu: Gpu | None = None):
    """All public functions and modules run their ops here; gives the list of what was launched."""
    launched: list[Launched | None] = []

    def kernel(op, *_):
        def call(*args):
            results, done = execute(op, args, gpu)
            launched.append(done)
            return results

        return call

    with pytest.MonkeyPatch.context() as patch, ff.use_backend("auto"):
        patch.setattr(backends, "kernel", kernel)
        yield launched
