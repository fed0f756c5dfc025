"""What compiled code says of itself: registers, spills, matrix instructions, width of memory accesses, main loop."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


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


def of_cubin(cubin: bytes) -> MachineCode:
    """Facts of an NVIDIA kernel, from its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tool("cuobjdump"), "-res-usage", str(path))
        code = _run(tool("nvdisasm"), "-c", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump tells no registers: {usage[:200]!r}")
    return of_sass(code, int(registers[1]))


# an instruction of nvdisasm: /*0a10*/ @!P0 LDG.E.128 R4, ... ;
_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_NVIDIA_MATRIX = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}
_BITS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _sass_bytes(opcode: str) -> int:
    widths = [_BITS[part] for part in opcode.split(".") if part in _BITS]
    return widths[-1] if widths else 4


def of_sass(code: str, registers: int) -> MachineCode:
    """Facts of the text that ``nvdisasm -c`` gives."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := _SASS.match(line):
            instructions.append((found[1], found[2]))
    opcodes = [opcode for opcode, _ in instructions]
    jumps = [
        (labels[target[1]], place)
        for place, (opcode, rest) in enumerate(instructions)
        if opcode.startswith("BRA") and (target := re.search(r"(\.L_x_\d+)", rest)) and target[1] in labels
    ]
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
            [opcode + rest for opcode, rest in instructions],
            jumps,
            lambda text: re.split(r"\W", text)[0] in _NVIDIA_MATRIX,
            lambda text: text.startswith("FFMA"),
            {"divisions": _is_sass_division, "reciprocals": lambda text: text.startswith("MUFU.RCP")},
        ),
    )


def _is_sass_division(text: str) -> bool:
    """Of integers (it starts with a conversion rounded up), or exact: a call of the compiler's own function."""
    return (text.startswith("I2F") and ".RP" in text) or (text.startswith("CALL") and "$__internal" in text)


def _main_loop(
    code: list[str],
    jumps: list[tuple[int, int]],  # to where, from where
    is_matrix: Callable[[str], bool],
    is_fma: Callable[[str], bool],
    kinds: dict[str, Callable[[str], bool]],
) -> dict[str, int]:
    """Of the loops (backward jumps) that multiply most, the shortest; empty if no loop multiplies."""
    multiplies = is_matrix if any(map(is_matrix, code)) else is_fma
    loops = [code[first : last + 1] for first, last in jumps if first <= last]
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
    jumps: list[tuple[str, int]] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\d+_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"^\s+([a-z]\w+)(?:\s+(.*))?$", line):
            if target := re.match(r"(\.LBB\d+_\d+)", found[2] or ""):
                jumps.append((target[1], len(opcodes)))
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
            [(labels[name], place) for name, place in jumps if name in labels],
            lambda o: o.startswith("v_mfma"),
            lambda o: re.match(r"v_(pk_)?(fma|fmac)_", o) is not None,
            {
                "divisions": lambda o: o.startswith(("v_rcp_iflag", "v_div_scale")),
                "reciprocals": lambda o: o.startswith("v_rcp_f"),
            },
        ),
    )
