"""run(): executes a kernel of a PTX module on torch CPU tensors, in place, with every check on."""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import engine
from .decode import PARAM_WINDOW, SPACES, WINDOW_SHIFT, Program, decode, encode_immediate
from .limits import blocks_per_sm, limits, registers
from .parser import parse
from .report import Line, RegionTraffic, Report
from .syntax import Imm, Module, type_size
from .tensormap import TensorMap

_DEFINED, _UNWRITTEN, _OUTSIDE = 0, 1, 2


class PtxFault(Exception):
    """A check failed while a kernel ran.

    kind: out of range, misaligned, race, ... ; ptx_line and source say where; block and thread say who.
    """

    def __init__(self, kernel, kind, text, ptx_line, opcode, source, block, thread):
        self.kernel, self.kind, self.text = kernel, kind, text
        self.ptx_line, self.opcode, self.source, self.block, self.thread = ptx_line, opcode, source, block, thread
        at = f" ({source})" if source else ""
        super().__init__(
            f"{kernel}: {kind}: {text}\n  at PTX line {ptx_line}: {opcode}{at}, block {block}, thread {thread}"
        )


class LaunchError(Exception):
    """The launch itself exceeds a limit of the target, or its arguments do not fit the kernel."""


@dataclass
class Out:
    """A tensor whose contents count as uninitialised until a kernel writes them; passed on to another launch, it still
    knows what has been written."""

    tensor: torch.Tensor
    state: np.ndarray | None = None  # of every byte, as the last launch left it


@dataclass
class In:
    """A tensor that the kernel must not write."""

    tensor: torch.Tensor


@dataclass
class Struct:
    """An argument that is passed by value: its bytes, and the memory whose addresses stand in them.

    pointers: what is pointed at, by the pointer's offset in data; (memory, bytes) points so far into it.
    """

    data: bytes
    pointers: dict[int, torch.Tensor | Out | In | tuple[torch.Tensor | Out | In, int]]


@dataclass
class _Allocation:
    """One region of global memory: the tensors whose bytes overlap."""

    start: int
    end: int
    views: list[_View]
    base: int = 0


@dataclass(frozen=True)
class _View:
    """A tensor among the arguments."""

    argument: Any  # the tensor, or what holds it
    place: tuple[int, int]  # index of the argument, offset of the address in it
    skipped: int = 0  # bytes of it that lie before the address

    @property
    def tensor(self) -> torch.Tensor:
        return self.argument if isinstance(self.argument, torch.Tensor) else self.argument.tensor

    @property
    def is_out(self) -> bool:
        return isinstance(self.argument, Out) or (isinstance(self.argument, TensorMap) and self.argument.output)


def _views(args: list[Any]) -> list[_View]:
    """Every tensor in the arguments, and where its address goes."""
    found = []
    for i, arg in enumerate(args):
        inside = arg.pointers if isinstance(arg, Struct) else {0: arg}
        for offset, part in inside.items():
            memory, skipped = part if isinstance(part, tuple) else (part, 0)
            if isinstance(memory, (torch.Tensor, Out, In, TensorMap)):
                found.append(_View(memory, (i, offset), skipped))
    return found


@functools.lru_cache(maxsize=64)
def load(ptx: str) -> Module:
    """The parsed module, cached."""
    return parse(ptx)


@functools.lru_cache(maxsize=256)
def load_kernel(ptx: str, kernel: str) -> Program:
    """The decoded kernel, cached."""
    return decode(load(ptx), kernel, engine.handler)


def _span(t: torch.Tensor) -> tuple[int, int]:
    """The bytes from a tensor's first to its last element."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _allocate(views: list[_View], next_window: int) -> list[_Allocation]:
    out: list[_Allocation] = []
    for view in sorted(views, key=lambda v: _span(v.tensor)):
        start, end = _span(view.tensor)
        if out and start < out[-1].end:
            out[-1].end = max(out[-1].end, end)
            out[-1].views.append(view)
        else:
            out.append(_Allocation(start, end, [view]))
    for i, a in enumerate(out):
        t = a.views[0].tensor
        # CUDA allocations are aligned to 256 bytes; a view keeps its offset in the storage
        offset = (a.start - t.untyped_storage().data_ptr()) % 256
        a.base = ((next_window + i) << WINDOW_SHIFT) + 0x10000 + offset
    return out


def _state(a: _Allocation) -> np.ndarray | None:
    """The initial state of an allocation's bytes, None if all are defined."""
    if all(v.tensor.is_contiguous() and not v.is_out for v in a.views):
        return None
    state = np.full(a.end - a.start, _OUTSIDE, dtype=np.uint8)
    for v in a.views:
        before = v.argument.state if isinstance(v.argument, Out) else None
        new = _UNWRITTEN if v.is_out else _DEFINED
        _bytes_of(v.tensor, state, a.start)[...] = new if before is None else before
    return state


def _bytes_of(t: torch.Tensor, allocation: np.ndarray, start: int) -> np.ndarray:
    """The part of an allocation's bytes that belongs to a tensor: its shape, and the bytes of an element."""
    size = t.element_size()
    return np.lib.stride_tricks.as_strided(
        allocation[t.data_ptr() - start :], (*t.shape, size), (*(s * size for s in t.stride()), 1), writeable=True
    )


def _keep_states(lib, handle, allocations: list[_Allocation]) -> None:
    """Tells every Out what has been written."""
    for a in allocations:
        if any(isinstance(v.argument, Out) for v in a.views):
            state = np.empty(a.end - a.start, dtype=np.uint8)
            lib.ptx_region_state(handle, ctypes.c_uint64(a.base), engine.pointer(state))
            for v in a.views:
                if isinstance(v.argument, Out):
                    v.argument.state = _bytes_of(v.tensor, state, a.start).copy()


def _pack(program: Program, args: list, addresses: dict) -> bytearray:
    if len(args) != len(program.params):
        raise LaunchError(f"{program.name} takes {len(program.params)} arguments, {len(args)} given")
    data = bytearray(program.param_bytes)
    for i, ((var, offset), arg) in enumerate(zip(program.params, args, strict=True)):
        if isinstance(arg, (Out, In)):
            arg = arg.tensor
        if arg is None:
            raw = bytes(8)
        elif isinstance(arg, TensorMap):
            raw = arg.encode(addresses[i, 0])
        elif isinstance(arg, torch.Tensor):
            raw = addresses[i, 0].to_bytes(8, "little")
        elif isinstance(arg, Struct):
            raw = bytearray(arg.data)
            for at in arg.pointers:
                raw[at : at + 8] = addresses[i, at].to_bytes(8, "little")
        elif isinstance(arg, (bytes, bytearray)):
            raw = bytes(arg)
        elif var.type in ("f32", "f64") or (isinstance(arg, float) and type_size(var.type) >= 4 and var.count == 1):
            raw = struct.pack("<f" if type_size(var.type) == 4 else "<d", arg)
        else:
            raw = encode_immediate(Imm(int(arg)), var.type) if var.count == 1 else b""
        if len(raw) != var.size:
            raise LaunchError(
                f"{program.name}: argument {i} ({var.name}) has {var.size} bytes, "
                f"{type(arg).__name__} given gives {len(raw)}"
            )
        data[offset : offset + len(raw)] = raw
    return data


def _check_limits(program: Program, ptx, grid, block, shared, cooperative, sms, regs) -> int:
    """Raises if the target cannot launch this; the number of blocks that are resident at once."""
    lim = limits(program.module.arch)
    threads = block[0] * block[1] * block[2]
    name = f"{program.name} on {program.module.target}"
    if not 0 < threads <= lim.threads_per_block or block[2] > 64:
        raise LaunchError(f"{name}: a block of {threads} threads, at most {lim.threads_per_block} are possible")
    if min(grid) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
        raise LaunchError(f"{name}: grid {grid} is out of range")
    if program.static_shared > lim.static_shared:
        raise LaunchError(
            f"{name}: {program.static_shared} bytes of static shared memory, at most {lim.static_shared} are possible"
        )
    if shared > lim.shared_per_block:
        raise LaunchError(
            f"{name}: {shared} bytes of shared memory a block, at most {lim.shared_per_block} are possible"
        )
    required, most = program.directives.get(".reqntid"), program.directives.get(".maxntid")
    if required and tuple(block[: len(required)]) != tuple(required):
        raise LaunchError(f"{name}: a block of {block}, the kernel requires {required}")
    if most and threads > int(np.prod(most)):
        raise LaunchError(
            f"{name}: a block of {threads} threads, the kernel was compiled for at most {int(np.prod(most))}"
        )
    if not cooperative:
        return max(1, blocks_per_sm(lim, threads, shared, regs or 0)) * sms
    if regs is None:
        regs = registers(ptx, program.name, program.module.target)
    resident = blocks_per_sm(lim, threads, shared, regs) * sms
    blocks = grid[0] * grid[1] * grid[2]
    if blocks > resident:
        raise LaunchError(
            f"{name}: a cooperative grid of {blocks} blocks, "
            f"but {sms} multiprocessors hold {resident} ({regs} registers a thread, {shared} bytes of shared memory)"
        )
    return resident


def _source(program: Program, pc: int) -> str:
    loc = program.locs[pc]
    if loc is None:
        return ""
    return f"{program.module.files.get(loc.file, f'file {loc.file}')}:{loc.line}"


def _three(dims) -> tuple[int, int, int]:
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    return (*dims, *(1,) * (3 - len(dims)))


def run(
    ptx: str,
    kernel: str,
    grid,
    block,
    dynamic_shared: int,
    args: list[Any],
    *,
    cooperative: bool = False,
    sms: int = 4,
    registers: int | None = None,
    seed: int = 0,
) -> Report:
    """Runs a kernel to its end and returns what it did; raises PtxFault at the first failed check.

    ptx             text of a module
    grid, block     ints or tuples of up to three
    args            one a parameter: tensors (in place; Out, In and TensorMap say more about them), numbers, None
                    (null), bytes, Struct
    cooperative     all blocks run at once; they must fit on `sms` multiprocessors
    registers       a thread; asked from ptxas if it matters and is not given
    seed            other than 0: blocks start in another order
    """
    program = load_kernel(ptx, kernel)
    grid, block = _three(grid), _three(block)
    shared = program.static_shared + dynamic_shared
    resident = _check_limits(program, ptx, grid, block, shared, cooperative, sms, registers)
    views = _views(args)
    for v in views:
        if v.tensor.device.type != "cpu":
            raise LaunchError(
                f"{kernel}: argument {v.place[0]} is on {v.tensor.device}; the interpreter runs on CPU tensors"
            )
    allocations = _allocate(views, program.next_window)
    addresses = {v.place: a.base + v.tensor.data_ptr() - a.start + v.skipped for a in allocations for v in a.views}
    params = _pack(program, args, addresses)
    lib = engine.library()
    launch = engine.Launch(
        file_bytes=program.file_bytes, nregs=program.nregs, local_bytes=program.local_bytes,
        static_shared=program.static_shared,
        total_shared=shared, shift_shared=program.shift_shared, shift_global=program.shift_global,
        sms=sms, resident=resident,
        cooperative=cooperative, uses_wgmma=program.uses_wgmma, uses_async=program.uses_async, seed=seed,
    )  # fmt: skip
    launch.grid[:], launch.block[:] = grid, block
    keep = []  # what the engine points at
    regions = []

    def region(base, data, size, name, space="global", writable=True, state=None, track=True):
        keep.append((data, state))
        raw = engine.Region(
            base,
            size,
            data,
            None if state is None else state.ctypes.data,
            SPACES[space],
            writable,
            track,
            name.encode(),
        )
        regions.append((raw, name))

    buffer = np.frombuffer(bytes(params) or b"\0", dtype=np.uint8).copy()
    keep.append(buffer)
    region(PARAM_WINDOW, buffer.ctypes.data, len(params), "the parameters", "param", False, track=False)
    for v in program.variables:
        data = np.frombuffer(v.data, dtype=np.uint8).copy()
        keep.append(data)
        region(v.base, data.ctypes.data, len(data), f"variable {v.var.name}", v.var.space, v.var.space == "global")
    for a in allocations:
        names = " and ".join(
            f"{i} ({program.params[i][0].name}{f'+{at}' if isinstance(args[i], Struct) else ''})"
            for i, at in sorted(v.place for v in a.views)
        )
        read_only = all(isinstance(v.argument, In) for v in a.views)
        region(a.base, a.start, a.end - a.start, f"argument {names}", writable=not read_only, state=_state(a))
    if cooperative:
        # cooperative groups find the grid's barrier through two environment registers
        workspace = np.zeros(256, dtype=np.uint8)
        keep.append(workspace)
        base = ((program.next_window + len(allocations)) << WINDOW_SHIFT) + 0x10000
        launch.envreg1, launch.envreg2 = base >> 32, base & 0xFFFFFFFF
        region(base, workspace.ctypes.data, 256, "the workspace of the grid barrier")
    handle = ctypes.c_void_p(lib.ptx_create(
        ctypes.byref(launch), engine.pointer(program.insns), len(program.insns), engine.pointer(program.operands),
        len(program.operands),
        program.consts, len(program.consts), engine.pointer(program.specials), len(program.specials)))  # fmt: skip
    try:
        for raw, _ in regions:
            lib.ptx_region(handle, ctypes.byref(raw))
        fault = engine.FaultRecord()
        if lib.ptx_run(handle, ctypes.byref(fault)):
            pc = fault.pc
            kind, text = fault.kind.decode(), fault.text.decode()
            line, source = int(program.insns["line"][pc]), _source(program, pc)
            raise PtxFault(
                kernel, kind, text, line, program.opcodes[pc], source, tuple(fault.block), tuple(fault.thread)
            )
        _keep_states(lib, handle, allocations)
        return _report(lib, handle, program, grid, block, shared, regions)
    finally:
        lib.ptx_destroy(handle)


def _report(lib, handle, program: Program, grid, block, shared, regions) -> Report:
    counters = np.zeros((len(program.insns), 7), dtype=np.uint64)
    lib.ptx_counters(handle, engine.pointer(counters))
    report = Report(program.name, grid, block, shared)
    for pc, row in enumerate(counters.tolist()):
        report.lines.append(Line(int(program.insns["line"][pc]), program.opcodes[pc], _source(program, pc), *row))
    for raw, name in regions:
        if raw.space != SPACES["global"]:
            continue
        values = (ctypes.c_uint64 * 4)()
        lib.ptx_region_counters(handle, ctypes.c_uint64(raw.base), values)
        read, written, touched, unwritten = values
        report.regions.append(RegionTraffic(name, raw.size, 32 * read, 32 * written, 32 * touched, unwritten))
    pairs = (ctypes.c_uint64 * 300)()
    count = lib.ptx_same_value_writes(handle, pairs, 100)
    lines = program.insns["line"]
    report.same_value_writes = [
        (int(lines[pairs[3 * i]]), int(lines[pairs[3 * i + 1]]), int(pairs[3 * i + 2])) for i in range(count)
    ]
    singles = (ctypes.c_uint64 * 200)()
    count = lib.ptx_lane_conflicts(handle, singles, 100)
    report.lane_conflicts = [(int(lines[singles[2 * i]]), int(singles[2 * i + 1])) for i in range(count)]
    return report
