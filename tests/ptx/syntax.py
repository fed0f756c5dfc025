"""What PTX text is parsed into: operands, instructions, functions, modules, and the sizes of types."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class PtxSyntaxError(Exception):
    """The text is not PTX as this parser knows it."""


class Loc(NamedTuple):
    """A source position: file index, line."""

    file: int
    line: int


class Reg(NamedTuple):
    """A declared register. `name` is unique in its function: registers of inner scopes carry the scope's number."""

    name: str
    type: str


class Special(NamedTuple):
    """A special register such as %tid.x."""

    name: str


class Imm(NamedTuple):
    """An immediate. `bits` is set for 0f/0d literals (their IEEE pattern), `value` for integers and decimals."""

    value: int | float
    bits: int | None = None


class Sym(NamedTuple):
    """The address of a variable, function or label, plus a byte offset."""

    name: str
    offset: int = 0


class Addr(NamedTuple):
    """[base+offset] or [base, {coordinates}]."""

    base: Reg | Sym | Imm | Special
    offset: int = 0
    coords: tuple = ()


class Vec(NamedTuple):
    """{a, b, ...}"""

    items: tuple


class Not(NamedTuple):
    """!%p"""

    operand: Reg


class Pair(NamedTuple):
    """%p|%q: two destinations."""

    first: object
    second: object


class Group(NamedTuple):
    """(a, b): arguments or results of a call."""

    items: tuple


SINK = Special("_")


@dataclass
class Var:
    """A variable or parameter."""

    name: str
    space: str  # global const shared local param
    type: str
    align: int
    count: int  # elements; 0 for an extern array of unknown size
    init: list = field(default_factory=list)
    extern: bool = False
    line: int = 0

    @property
    def size(self) -> int:
        return self.count * type_size(self.type)


@dataclass
class Insn:
    """One instruction."""

    opcode: str  # everything before the operands, modifiers included
    operands: tuple
    guard: Reg | None
    guard_negated: bool
    line: int
    loc: Loc | None


@dataclass
class Function:
    """An entry or device function: its body is a list of Insn with labels as indices into it."""

    name: str
    entry: bool
    params: list[Var]
    results: list[Var]
    line: int
    directives: dict = field(default_factory=dict)
    body: list[Insn] | None = None
    labels: dict = field(default_factory=dict)
    branch_targets: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)  # unique name -> Var, function scope


@dataclass
class Module:
    """A PTX module."""

    version: tuple[int, int]
    target: str
    variables: dict
    functions: dict
    files: dict  # index -> path

    @property
    def arch(self) -> int:
        return int(re.match(r"sm_(\d+)", self.target).group(1))


TYPE_SIZES = {
    "pred": 4, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4,
    "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8, "b128": 16,
    "e4m3x2": 2, "e5m2x2": 2, "u16x2": 4, "s16x2": 4, "e4m3": 1, "e5m2": 1,
}  # fmt: skip


def type_size(name: str) -> int:
    """Bytes of a fundamental type."""
    return TYPE_SIZES[name]
