"""What a launch did: instructions by class, tensor operations, memory traffic, bank conflicts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_CLASSES = [
    ("tensor", re.compile(r"(mma|wgmma\.mma_async|wmma\.mma)\b")),
    ("global memory", re.compile(r"(ld|st|ldu)\.(?!.*(shared|local|param|const))|(atom|red)\.(?!.*shared)|cp\.async")),
    ("shared memory", re.compile(r"(ld|st|atom|red)\.\S*shared|ldmatrix|stmatrix|wmma\.(load|store)")),
    ("local memory", re.compile(r"(ld|st)\.\S*local")),
    ("constant memory", re.compile(r"(ld|st)\.\S*(param|const)")),
    ("synchronisation", re.compile(r"(bar|barrier|fence|membar|mbarrier|wgmma|griddepcontrol|nanosleep)\b")),
    ("warp", re.compile(r"(shfl|vote|match|redux|elect|activemask|movmatrix)\b")),
    ("control", re.compile(r"(bra|brx|ret|exit|call|trap)\b")),
    ("conversion", re.compile(r"cvta?\b")),
    ("move", re.compile(r"(mov|selp|prmt|slct)\b")),
    ("special function", re.compile(r"(ex2|lg2|sin|cos|tanh|rcp|rsqrt|sqrt|div\S*f(32|64))\b")),
    ("float", re.compile(r"\S*\.(b?f16(x2)?|f32(x2)?|f64)$")),
]


def classify(opcode: str) -> str:
    """The class of an opcode in the report."""
    for name, pattern in _CLASSES:
        if pattern.match(opcode):
            return name
    return "integer"


def tensor_flops(opcode: str) -> int:
    """Multiplies and adds of one execution by one warp."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode)
    if shape is None or classify(opcode) != "tensor":
        return 0
    m, n, k = map(int, shape.groups())
    return 2 * m * n * k // (4 if opcode.startswith("wgmma") else 1)


@dataclass
class Line:
    """The counters of one instruction."""

    line: int
    opcode: str
    source: str
    warps: int
    threads: int
    bytes: int
    sectors: int
    wavefronts: int
    ideal_wavefronts: int
    divergent: int


@dataclass
class RegionTraffic:
    """32-byte sectors of one argument or variable that were touched at least once, and bytes of an Out left
    unwritten.
    """

    name: str
    size: int
    bytes_read: int
    bytes_written: int
    bytes_touched: int
    bytes_unwritten: int


@dataclass
class Report:
    """The counters of a launch. Bytes and sectors are of global memory; wavefronts of shared memory."""

    kernel: str
    grid: tuple
    block: tuple
    shared_bytes: int
    lines: list[Line] = field(default_factory=list)
    regions: list[RegionTraffic] = field(default_factory=list)
    # unordered writes of one value by two instructions: PTX line, PTX line, times
    same_value_writes: list[tuple[int, int, int]] = field(default_factory=list)
    # stores whose lanes wrote different values to one address, of which any may stay: PTX line, times
    lane_conflicts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def thread_instructions(self) -> int:
        return sum(line.threads for line in self.lines)

    @property
    def warp_instructions(self) -> int:
        return sum(line.warps for line in self.lines)

    @property
    def by_class(self) -> dict[str, int]:
        """Warp instructions by class."""
        out: dict[str, int] = {}
        for line in self.lines:
            if line.warps:
                name = classify(line.opcode)
                out[name] = out.get(name, 0) + line.warps
        return out

    @property
    def tensor_flops(self) -> int:
        return sum(tensor_flops(line.opcode) * line.warps for line in self.lines)

    @property
    def global_bytes(self) -> int:
        """Bytes that threads asked for."""
        return sum(line.bytes for line in self.lines if classify(line.opcode) == "global memory")

    @property
    def global_sectors(self) -> int:
        """32-byte sectors, counted once an instruction and warp."""
        return sum(line.sectors for line in self.lines)

    @property
    def l2_unique_bytes(self) -> int:
        """Bytes of distinct 32-byte sectors: what an infinite L2 would exchange with memory, reads and writes."""
        return sum(r.bytes_read + r.bytes_written for r in self.regions)

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond the least possible."""
        return sum(max(line.wavefronts - line.ideal_wavefronts, 0) for line in self.lines)

    def conflicts(self) -> list[Line]:
        """The instructions with bank conflicts, worst first."""
        bad = [line for line in self.lines if line.wavefronts > line.ideal_wavefronts]
        return sorted(bad, key=lambda line: line.ideal_wavefronts - line.wavefronts)

    def __str__(self) -> str:
        rows = [
            f"{self.kernel}: grid {self.grid}, block {self.block}, {self.shared_bytes} bytes of shared memory a block",
            f"  {self.warp_instructions:,} warp instructions, {self.thread_instructions:,} thread instructions",
            *(f"    {count:>12,}  {name}" for name, count in sorted(self.by_class.items(), key=lambda kv: -kv[1])),
            f"  tensor operations {self.tensor_flops:,} flop",
            f"  global memory: {self.global_bytes:,} bytes in {self.global_sectors:,} sectors, "
            f"{self.l2_unique_bytes:,} bytes unique",
            *(
                f"    {r.name}: read {r.bytes_read:,}, written {r.bytes_written:,} of {r.size:,} bytes"
                for r in self.regions
                if r.bytes_touched
            ),
            f"  shared memory: {self.bank_conflicts:,} wavefronts lost to bank conflicts",
            *(f"    line {c.line} {c.opcode}: {c.wavefronts} for {c.ideal_wavefronts}" for c in self.conflicts()[:5]),
        ]
        if self.same_value_writes:
            rows.append("  unordered writes of the same value:")
            rows += [f"    PTX lines {a} and {b}, {n} times" for a, b, n in self.same_value_writes]
        if self.lane_conflicts:
            rows.append("  lanes of a warp wrote different values to one address:")
            rows += [f"    PTX line {line}, {n} times" for line, n in self.lane_conflicts]
        return "\n".join(rows)
