"""What compiled code says of itself: registers, spills, matrix instructions, width of memory accesses, main loop."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class MachineCode:
    """The facts of one kernel. Counts are of instructions in the code, not of executions."""

    registers: int  # a thread
    spills: int  # instructions that access local memory; on AMD spilled vector registers
    matrix: dict[str, int]  # matrix instructions by family: mma.sync, wgmma, tcgen05, mfma
    matrix_opcodes: tuple[str, ...]
    loads: dict[int, int]  # from global memory, by bytes a thread; asynchronous copies among them
    stores: dict[int, int]
    bulk_copies: int  # by tensor descriptor
    loop: dict[str, int] = field(default_factory=dict)  # of the main loop: counts by kind; empty if nothing multiplies


@functools.cache
def tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit, as Triton brings it, or as PATH has it."""
    triton = importlib.util.find_spec("triton")
    beside = [Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name] if triton and triton.origin else []
    found = next((str(path) for path in beside if path.exists()), None) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is needed to read compiled kernels; it is neither in triton nor on PATH")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def of_cubins(cubins: Sequence[bytes], arch: str) -> list[MachineCode]:
    """Facts of NVIDIA kernels for ``arch``, disassembled in one run: its start takes longer than most kernels."""
    if not cubins:
        return []
    code = bytearray()
    functions: list[list[_Function]] = []
    registers = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for cubin in cubins:
            path.write_bytes(cubin)
            usage = _run(tool("cuobjdump"), "-res-usage", str(path))
            if (found := re.search(r"REG:(\d+)", usage)) is None:
                raise RuntimeError(f"cuobjdump tells no registers: {usage[:200]!r}")
            registers.append(int(found[1]))
            text, own = _functions(cubin)
            functions.append([_Function(f.name, len(code) + f.start, len(code) + f.end) for f in own])
            code += text
        path.write_bytes(code)
        number = int(arch.removeprefix("sm_"))
        listing = _run(tool("nvdisasm"), "--binary", f"SM{number}{'a' * (number >= 90)}", str(path))
    instructions = _instructions(listing)
    return [of_sass(instructions, own, count) for own, count in zip(functions, registers, strict=True)]


class _Function(NamedTuple):
    """Machine code from byte ``start`` to ``end``."""

    name: str
    start: int
    end: int


def _functions(cubin: bytes) -> tuple[bytes, list[_Function]]:
    """The code of a module with one kernel, and where in it the functions lie that the compiler added."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)  # an ELF file of 64 bits
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    # name, type, flags, address, offset, size, link, info, alignment, size of an entry
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, headers + size * i) for i in range(count)]

    def name(table: int, offset: int) -> str:
        start = sections[table][4] + offset
        return cubin[start : cubin.index(b"\0", start)].decode()

    (place,) = (i for i, section in enumerate(sections) if name(names, section[0]).startswith(".text."))
    (symbols,) = (section for section in sections if section[1] == 2)
    added = []
    for at in range(symbols[4], symbols[4] + symbols[5], symbols[9]):
        string, _, _, section, value, length = struct.unpack_from("<I2BH2Q", cubin, at)
        called = name(symbols[6], string)
        if section == place and called.startswith("$__internal"):
            added.append(_Function(called, value, value + length))
    _, _, _, _, offset, length, *_ = sections[place]
    return cubin[offset : offset + length], [_Function("", 0, length), *added]


# an instruction of nvdisasm: /*0a10*/ @!P0 LDG.E.128 R4, ... ;
_SASS = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_NVIDIA_MATRIX = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}
_BITS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class _Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    operands: str


def _instructions(listing: str) -> list[_Instruction]:
    found = map(_SASS.match, listing.splitlines())
    return [_Instruction(int(f[1], 16), f[2] is not None, f[3], f[4]) for f in found if f]


def _sass_bytes(opcode: str) -> int:
    widths = [_BITS[part] for part in opcode.split(".") if part in _BITS]
    return widths[-1] if widths else 4


def of_sass(listed: Sequence[_Instruction], functions: Sequence[_Function], registers: int) -> MachineCode:
    """Facts of a kernel in the text that nvdisasm gives: the first of ``functions`` with all others inside it."""
    whole, *added = functions
    instructions = [i for i in listed if whole.start <= i.address < whole.end]
    at = {instruction.address: place for place, instruction in enumerate(instructions)}
    opcodes = [instruction.opcode for instruction in instructions]
    texts = []
    jumps = {}
    for place, (_, predicated, opcode, operands) in enumerate(instructions):
        target = re.match(r"(.*)\b0x([0-9a-f]+)\s*;?$", operands) if opcode.startswith(("BRA", "CALL")) else None
        address = int(target[2], 16) if target else -1
        called = next((f.name for f in added if f.start <= address < f.end), "")
        texts.append(f"{opcode} {called}" if called else opcode + operands)
        if opcode.startswith("BRA") and target and address in at:
            always = not predicated and not target[1].strip()  # operands before the target are conditions
            jumps[place] = _Jump(at[address], always)
        elif opcode.startswith(("EXIT", "RET")) and not predicated:
            jumps[place] = _Jump(None, True)
    matrix = [(_NVIDIA_MATRIX[o.split(".")[0]], o) for o in opcodes if o.split(".")[0] in _NVIDIA_MATRIX]
    return MachineCode(
        registers=registers,
        spills=sum(o.startswith(("LDL", "STL")) for o in opcodes),
        matrix=dict(Counter(family for family, _ in matrix)),
        matrix_opcodes=tuple(sorted({o for _, o in matrix})),
        loads=dict(Counter(_sass_bytes(o) for o in opcodes if o.startswith(("LDG.", "LDGSTS.")))),
        stores=dict(Counter(_sass_bytes(o) for o in opcodes if o.startswith("STG."))),
        bulk_copies=sum(o.startswith(("UTMALDG", "UTMASTG")) for o in opcodes),
        loop=_main_loop(
            texts,
            jumps,
            lambda text: re.split(r"\W", text)[0] in _NVIDIA_MATRIX,
            lambda text: text.startswith("FFMA"),
            {"divisions": _is_sass_division, "reciprocals": lambda text: text.startswith("MUFU.RCP")},
        ),
    )


def _is_sass_division(text: str) -> bool:
    """Of integers (it starts with a conversion rounded up), or exact: a call of the compiler's own function."""
    return (text.startswith("I2F") and ".RP" in text) or (text.startswith("CALL") and "$__internal" in text)


@dataclass(frozen=True)
class _Jump:
    """A place where the code does not only go on to the next instruction."""

    to: int | None  # None: the end
    always: bool


def _loops(size: int, jumps: dict[int, _Jump]) -> list[list[int]]:
    """The instructions of each natural loop: of a jump to a place that was passed on every way to the jump.

    A block that compilers put out of line, such as waiting for a barrier, jumps backwards too, but makes no loop.
    """
    starts = sorted({0, *(i + 1 for i in jumps), *(j.to for j in jumps.values() if j.to is not None)} - {size})
    number = {start: i for i, start in enumerate(starts)}
    ends = [*starts[1:], size]
    after: list[list[int]] = []
    for end in ends:
        jump = jumps.get(end - 1)
        following = [] if jump is None or jump.to is None else [number[jump.to]]
        after.append(following + ([number[end]] if end < size and not (jump and jump.always) else []))
    before: list[list[int]] = [[] for _ in starts]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    everything = (1 << len(starts)) - 1
    dominators = [1, *([everything] * (len(starts) - 1))]  # of each block, the blocks on every way to it, as bits
    changed = True
    while changed:
        changed = False
        for i in range(1, len(starts)):
            common = everything
            for j in before[i]:
                common &= dominators[j]
            if (common | 1 << i) != dominators[i]:
                dominators[i], changed = common | 1 << i, True
    loops = []
    for last, following in enumerate(after):
        for head in following:
            if not dominators[last] >> head & 1 or dominators[last] == everything:  # everything: nothing leads there
                continue
            body, waiting = {head}, [last]
            while waiting:
                if (i := waiting.pop()) not in body:
                    body.add(i)
                    waiting += before[i]
            loops.append([at for i in sorted(body) for at in range(starts[i], ends[i])])
    return loops


def _main_loop(
    code: list[str],
    jumps: dict[int, _Jump],
    is_matrix: Callable[[str], bool],
    is_fma: Callable[[str], bool],
    kinds: dict[str, Callable[[str], bool]],
) -> dict[str, int]:
    """Of the loops that multiply most, the shortest; empty if no loop multiplies."""
    multiplies = is_matrix if any(map(is_matrix, code)) else is_fma
    loops = [[code[i] for i in body] for body in _loops(len(code), jumps)]
    counted = [(sum(map(multiplies, body)), -len(body), body) for body in loops]
    most, _, body = max(counted, key=lambda c: c[:2], default=(0, 0, []))
    if not most:
        return {}
    return {"instructions": len(body), "products": most, **{name: sum(map(kind, body)) for name, kind in kinds.items()}}


_GCN_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1}


def of_amdgcn(text: str) -> MachineCode:
    """Facts of AMD assembly, as Triton's compiler writes it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    targets: dict[int, tuple[str, bool]] = {}
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"^\s+([a-z]\w+)(?:\s+(.*))?$", line):
            if target := re.match(r"(\.LBB\d+_\d+)", found[2] or ""):
                targets[len(opcodes)] = target[1], found[1] == "s_branch"
            opcodes.append(found[1])

    def number(name: str) -> int:
        value = re.search(rf"\.{name}:\s*(\d+)", text)
        if value is None:
            raise RuntimeError(f"the assembly tells no {name}")
        return int(value[1])

    def widths(kind: str) -> dict[int, int]:
        found: Counter[int] = Counter()
        for opcode in opcodes:
            if access := re.match(rf"(?:global|buffer|flat)_{kind}_(\w+?)(?:_d16\w*)?$", opcode):
                found[_GCN_BYTES.get(access[1].removeprefix("lds_"), 4)] += 1
        return dict(found)

    matrix = [o for o in opcodes if o.startswith("v_mfma")]
    return MachineCode(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),  # spilled scalar registers go to lanes of vector registers, not to memory
        matrix={"mfma": len(matrix)} if matrix else {},
        matrix_opcodes=tuple(sorted(set(matrix))),
        loads=widths("load"),
        stores=widths("store"),
        bulk_copies=0,
        loop=_main_loop(
            opcodes,
            {
                **{place: _Jump(labels[name], always) for place, (name, always) in targets.items() if name in labels},
                **{place: _Jump(None, True) for place, opcode in enumerate(opcodes) if opcode == "s_endpgm"},
            },
            lambda o: o.startswith("v_mfma"),
            lambda o: re.match(r"v_(pk_)?(fma|fmac)_", o) is not None,
            {
                "divisions": lambda o: o.startswith(("v_rcp_iflag", "v_div_scale")),
                "reciprocals": lambda o: o.startswith("v_rcp_f"),
            },
        ),
    )
