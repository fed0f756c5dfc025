"""Registers of wgmma products in flight, read from PTX: who touches them before wgmma.wait_group.

A wgmma reads its A operand from registers, and its accumulators, until the group that it was committed to has been
waited for; PTX leaves undefined what an access in between does. Triton 3.7 lets such a product run on while the loop
comes to its next operand, and whether that has registers of its own is left to chance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_REGISTER = re.compile(r"%[a-z]+\d+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,{[]+")


@dataclass(frozen=True)
class Touched:
    """An instruction that touches a register of a product in flight."""

    line: int  # of the PTX, from 1 on
    text: str
    registers: tuple[str, ...]


@dataclass(frozen=True)
class _Instruction:
    line: int
    text: str
    opcode: str
    reads: frozenset[str]
    writes: frozenset[str]
    after: tuple[str, ...]  # labels that it may jump to
    falls: bool  # whether it may go on to the next instruction


# Of each register of a product in flight: how many groups were committed since its own, and whether it may be read
_State = Mapping[str, tuple[int, bool]]


def touched(ptx: str) -> list[Touched]:
    """All instructions of a module with one kernel that touch what a wgmma in flight still uses."""
    if "wgmma.mma_async" not in ptx:
        return []
    code, labels = _parse(ptx)
    states: list[_State | None] = [None] * len(code)
    waiting: list[tuple[int, _State]] = [(0, {})] if code else []
    found: dict[int, Touched] = {}
    while waiting:
        at, state = waiting.pop()
        before = states[at]
        if before is not None:
            merged = _merged(before, state)
            if merged == before:
                continue
            state = merged
        states[at] = state
        instruction = code[at]
        if wrong := _wrong(instruction, state):
            found[at] = Touched(instruction.line, instruction.text, wrong)
        following = _after(instruction, state)
        targets = [min(labels[name], key=lambda place: abs(place - at)) for name in instruction.after]
        targets += [at + 1] * instruction.falls
        waiting += [(target, following) for target in targets if target < len(code)]
    return [found[at] for at in sorted(found)]


def _merged(a: _State, b: _State) -> _State:
    """In flight on either way, the later commit counted; readable where it is on both."""
    both = {**a, **b}
    for name in a.keys() & b.keys():
        both[name] = (min(a[name][0], b[name][0]), a[name][1] and b[name][1])
    return both


def _wrong(instruction: _Instruction, state: _State) -> tuple[str, ...]:
    if instruction.opcode.startswith("wgmma"):  # which may go on adding to accumulators in flight
        return ()
    read = {name for name in instruction.reads if name in state and not state[name][1]}
    return tuple(sorted(read | (instruction.writes & state.keys())))


def _after(instruction: _Instruction, state: _State) -> _State:
    opcode = instruction.opcode
    if opcode.startswith("wgmma.mma_async"):
        new = dict.fromkeys(instruction.reads, (0, True)) | dict.fromkeys(instruction.writes, (0, False))
        return {**state, **new}
    if opcode.startswith("wgmma.commit_group"):
        return {name: (age + 1, readable) for name, (age, readable) in state.items()}
    if opcode.startswith("wgmma.wait_group"):
        pending = int(instruction.text.split()[-1])
        return {name: value for name, value in state.items() if value[0] <= pending}
    return state


def _parse(ptx: str) -> tuple[list[_Instruction], dict[str, list[int]]]:
    """Instructions, and where each label stands: blocks of inline assembly have labels of the same name."""
    code: list[_Instruction] = []
    labels: dict[str, list[int]] = {}
    for number, raw in enumerate(ptx.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if label := re.match(r"^(\$?\w+):\s*(.*)$", line):
            labels.setdefault(label[1], []).append(len(code))
            line = label[2]
        for statement in line.split(";"):
            if (instruction := _instruction(statement.lstrip("{} \t").rstrip(), number)) is not None:
                code.append(instruction)
    return code, labels


def _instruction(text: str, line: int) -> _Instruction | None:
    found = re.match(r"^(@!?%?\w+\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if found is None:  # a directive, a brace, a blank
        return None
    guard, opcode, rest = found[1] or "", found[2], found[3]
    operands = [part.strip() for part in _OPERAND.findall(rest) if part.strip()]
    names = [frozenset(_REGISTER.findall(part)) for part in operands]
    reads, writes = frozenset[str](_REGISTER.findall(guard)), frozenset[str]()
    if opcode.startswith("wgmma.mma_async"):  # accumulators, a (registers or a descriptor), descriptor of b, ...
        writes = names[0]
        reads = names[1] if operands[1].startswith("{") else frozenset()
        return _Instruction(line, text, opcode, reads, writes, (), True)
    for i, (part, registers) in enumerate(zip(operands, names, strict=True)):
        if i == 0 and not part.startswith("["):  # the first operand is the result, unless it is an address
            writes |= registers
        else:
            reads |= registers
    jumps = opcode.startswith("bra")
    ends = opcode in ("ret", "exit") or jumps
    return _Instruction(line, text, opcode, reads, writes, (rest.strip(),) if jumps else (), bool(guard) or not ends)
