"""A kernel of a parsed module to the engine's program: registers placed, addresses bound, calls inlined, opcodes
looked up.

What an opcode means stands in `decode_alu`, `decode_memory`, `decode_sync` and `decode_tensor`, one function an
opcode family,
registered with @opcode. An opcode, modifier or type that none of them takes raises Unsupported with its line.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from . import syntax as ast
from .modifiers import Mods, Unsupported
from .syntax import type_size

PROPAGATE, STRICT, CUSTOM = 0, 1, 2
FTZ, SAT, RELU, NAN, XORSIGN, AWAY, ASYNC = 4, 8, 16, 32, 64, 128, 256
ROUND = {"rn": 0, "rz": 1, "rm": 2, "rp": 3}

WINDOW_SHIFT = 36
PARAM_WINDOW, FIRST_FREE_WINDOW = 3 << WINDOW_SHIFT, 4
SHARED_WINDOW, LOCAL_WINDOW = 1 << WINDOW_SHIFT, 2 << WINDOW_SHIFT
SPACES = {"generic": 0, "global": 1, "shared": 2, "local": 3, "const": 4, "param": 5}

SPECIALS = [
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ntid.y",
    "%ntid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%smid",
    "%nsmid",
    "%gridid",
    "%lanemask_eq",
    "%lanemask_le",
    "%lanemask_lt",
    "%lanemask_ge",
    "%lanemask_gt",
    "%dynamic_smem_size",
    "%total_smem_size",
    "0",
    "1",
    "%envreg1",
    "%envreg2",
]
# a launch without clusters is one of clusters of a single block
_SPECIAL_ALIASES = {f"%clusterid.{c}": f"%ctaid.{c}" for c in "xyz"} | {
    f"%nclusterid.{c}": f"%nctaid.{c}" for c in "xyz"
}
_SPECIAL_ALIASES |= {f"%cluster_ctaid.{c}": "0" for c in "xyz"} | {f"%cluster_nctaid.{c}": "1" for c in "xyz"}
_SPECIAL_ALIASES |= {"%cluster_ctarank": "0", "%cluster_nctarank": "1", "%is_explicit_cluster": "0"}

INSN = np.dtype(
    [("handler", "i4"), ("guard_off", "u4"), ("guard_reg", "u4"), ("line", "u4"), ("first_op", "u4"), ("ndst", "u2"),
     ("nsrc", "u2"), ("guard_negated", "u1"), ("policy", "u1"), ("unused", "u1", 6), ("flags", "u8"), ("imm", "i8", 4)]
)  # fmt: skip
NO_GUARD = 0xFFFFFFFF


OPCODES = {}


def opcode(*names):
    """Registers the decoder of the opcodes that start with one of these words."""

    def register(fn):
        for name in names:
            OPCODES[name] = fn
        return fn

    return register


@dataclass
class Operand:
    """Where a value lies: see the engine's struct of that name."""

    off: int
    reg: int
    size: int


@dataclass
class GlobalVariable:
    """A .global or .const variable: its own region of memory."""

    var: ast.Var
    base: int
    data: bytearray


@dataclass
class Program:
    """A decoded kernel."""

    name: str
    module: ast.Module
    insns: np.ndarray
    operands: np.ndarray
    consts: bytes
    specials: np.ndarray
    file_bytes: int
    nregs: int
    local_bytes: int
    static_shared: int
    shift_shared: int
    shift_global: int
    params: list  # (Var, offset)
    param_bytes: int
    variables: list  # GlobalVariable
    opcodes: list  # text, a program counter
    locs: list  # Loc or None
    directives: dict
    next_window: int
    uses_wgmma: bool
    uses_async: bool


@dataclass
class _Frame:
    """One activation of a function while it is inlined."""

    fn: ast.Function
    prefix: str
    params: dict  # parameter name -> local offset; empty for the entry
    labels: dict = field(default_factory=dict)
    end: object = None


class Decoder:
    """Decodes one entry of a module."""

    def __init__(self, module: ast.Module, kernel: str, lookup):
        if kernel not in module.functions or not module.functions[kernel].entry:
            entries = [f.name for f in module.functions.values() if f.entry]
            raise ValueError(f"no kernel {kernel!r} in this PTX; it has {', '.join(entries) or 'none'}")
        self.module, self.entry, self.lookup = module, module.functions[kernel], lookup
        self.regs: dict = {}
        self.file_bytes, self.nregs = 0, 1
        self.const_index: dict = {}
        self.consts = bytearray()
        self.rows: list = []
        self.operands: list = []
        self.opcodes, self.locs = [], []
        self.patches: list = []  # (row, frame, label)
        self.special_slots: dict = {}
        self.local_bytes = 0
        self.shared_offsets: dict = {}
        self.static_shared = 0
        self.variables: dict = {}
        self.next_window = FIRST_FREE_WINDOW
        self.smallest = {"shared": 4, "global": 4}
        self.uses_wgmma = self.uses_async = False
        self.calls: list = []

    # -- layout --------------------------------------------------------------------------------------------------
    def reachable(self) -> list[ast.Function]:
        seen, todo = {}, [self.entry]
        while todo:
            fn = todo.pop()
            if fn.name in seen or fn.body is None:
                continue
            seen[fn.name] = fn
            for insn in fn.body:
                if insn.opcode.split(".")[0] == "call":
                    for op in insn.operands:
                        if isinstance(op, ast.Sym) and op.name in self.module.functions:
                            todo.append(self.module.functions[op.name])
        return list(seen.values())

    def place_shared(self):
        used = set()
        functions = self.reachable()
        for fn in functions:
            for insn in fn.body:
                for op in insn.operands:
                    base = op.base if isinstance(op, ast.Addr) else op
                    if isinstance(base, ast.Sym):
                        used.add(base.name)
        statics, dynamic = [], []
        for fn in functions:
            statics += [(v, fn.name) for v in fn.variables.values() if v.space == "shared" and v.name in used]
        for v in self.module.variables.values():
            if v.space == "shared" and v.name in used:
                (dynamic if v.count == 0 else statics).append((v, None))
        for var, owner in statics:
            self.static_shared = _align(self.static_shared, var.align)
            self.shared_offsets[owner, var.name] = self.static_shared
            self.static_shared += var.size
        start = _align(self.static_shared, max([16] + [v.align for v, _ in dynamic])) if dynamic else self.static_shared
        for var, owner in dynamic:
            self.shared_offsets[owner, var.name] = start
        if dynamic:
            self.static_shared = start

    def place_params(self):
        offset, out = 0, []
        for var in self.entry.params:
            offset = _align(offset, var.align)
            out.append((var, offset))
            offset += var.size
        self.params, self.param_bytes = out, offset
        self.param_offsets = {var.name: at for var, at in out}

    def variable_address(self, var: ast.Var) -> int:
        if var.name not in self.variables:
            if (var.extern and var.count == 0) or (var.extern and not var.init and var.space == "const"):
                raise Unsupported(f"line {var.line}: extern variable {var.name} is not defined in this module")
            base = (self.next_window << WINDOW_SHIFT) + 0x10000
            self.next_window += 1
            self.variables[var.name] = entry = GlobalVariable(var, base, bytearray(var.size))
            step = type_size(var.type)
            for i, item in enumerate(var.init):
                entry.data[i * step : (i + 1) * step] = self.initial_bytes(item, var.type)
        return self.variables[var.name].base

    def initial_bytes(self, item, kind: str) -> bytes:
        if isinstance(item, ast.Sym):
            return (self.symbol(item.name, None) + item.offset).to_bytes(type_size(kind), "little")
        return encode_immediate(item, kind)

    def symbol(self, name: str, frame: _Frame | None) -> int:
        """The address of a variable as its own space writes it."""
        if frame is not None:
            if (frame.fn.name, name) in self.shared_offsets:
                return self.shared_offsets[frame.fn.name, name]
            var = frame.fn.variables.get(name)
            if var is not None and var.space in ("local", "param"):
                if frame.prefix == "" and name in self.param_offsets:
                    return self.param_offsets[name]
                return self.local_offset(frame, var)
        if (None, name) in self.shared_offsets:
            return self.shared_offsets[None, name]
        if name in self.module.variables:
            return self.variable_address(self.module.variables[name])
        raise Unsupported(f"line {self.line}: no variable {name}")

    def local_offset(self, frame: _Frame, var: ast.Var) -> int:
        if var.name not in frame.params:
            self.local_bytes = _align(self.local_bytes, var.align)
            frame.params[var.name] = self.local_bytes
            self.local_bytes += max(var.size, 1)
        return frame.params[var.name]

    # -- operands ------------------------------------------------------------------------------------------------
    def place(self, name: str, size: int) -> Operand:
        if name not in self.regs:
            step = 4 if size == 0 else size * 32
            self.file_bytes = _align(self.file_bytes, min(step, 64))
            self.regs[name] = Operand(self.file_bytes, self.nregs, size)
            self.file_bytes += step
            self.nregs += 1
        return self.regs[name]

    def register(self, reg: ast.Reg) -> Operand:
        size = 0 if reg.type == "pred" else max(type_size(reg.type), 2)
        return self.place(self.frame.prefix + reg.name, size)

    def const(self, data: bytes) -> Operand:
        """A constant, the same in all lanes. Predicates (4 bytes, not repeated) come as data of length 0."""
        if data not in self.const_index:
            while len(self.consts) % 64:
                self.consts.append(0)
            self.const_index[data] = len(self.consts)
            self.consts += data * 32
        return Operand(self.const_index[data] | 1, 0, len(data))

    def sink(self, size: int) -> Operand:
        return self.place(f"_sink{size}", size)

    def special(self, name: str) -> Operand:
        name = _SPECIAL_ALIASES.get(name, name)
        if name not in SPECIALS:
            raise Unsupported(f"line {self.line}: special register {name} is not implemented")
        op = self.place("special " + name, 4)
        self.special_slots[name] = op
        return op

    def dst(self, op, kind: str, wider: bool = False) -> Operand:
        size = 0 if kind == "pred" else max(type_size(kind), 2)
        if op == ast.SINK:
            return self.sink(size)
        if not isinstance(op, ast.Reg):
            self.fail("the destination must be a register")
        out = self.register(op)
        self.check_size(op, out, size, wider)
        return out

    def check_size(self, op, out: Operand, size: int, wider: bool):
        def name(n):
            return f"{n * 8} bits" if n else "a predicate"

        if out.size != size and not (wider and out.size > size and size):
            self.fail(f"{op.name} has {name(out.size)}, the instruction needs {name(size)}")

    def src(self, op, kind: str, wider: bool = False) -> Operand:
        size = 0 if kind == "pred" else max(type_size(kind), 2)
        if isinstance(op, ast.Reg):
            out = self.register(op)
            self.check_size(op, out, size, wider)
            return out
        if isinstance(op, ast.Imm):
            if kind == "pred":
                return Operand(self.const(b"\xff" * 4 if op.value else bytes(4)).off, 0, 0)
            data = encode_immediate(op, kind)
            return self.const(data.ljust(size, b"\0"))
        if isinstance(op, ast.Sym):
            value = self.symbol(op.name, self.frame) + op.offset
            if size < 4:
                self.fail("an address does not fit")
            return self.const((value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))
        if isinstance(op, ast.Special) and op != ast.SINK:
            if size == 8:
                self.fail(f"{op.name} has 32 bits")
            out = self.special(op.name)
            # the low half of a 32-bit special register is not where a 16-bit one would lie
            if size != 4:
                self.fail(f"{op.name} read as {size * 8} bits")
            return out
        self.fail(f"operand {op} does not fit here")

    def pred_src(self, op) -> tuple[Operand, bool]:
        if isinstance(op, ast.Not):
            return self.src(op.operand, "pred"), True
        return self.src(op, "pred"), False

    def fail(self, why: str):
        raise Unsupported(f"line {self.line}: {self.insn.opcode}: {why}")

    # -- instructions --------------------------------------------------------------------------------------------
    def emit(self, key: str, dsts=(), srcs=(), imm=(), flags: int = 0, policy: int = PROPAGATE):
        """Adds an instruction that runs the engine's handler `key`."""
        handler = self.lookup(key)
        if handler < 0:
            self.fail(f"not implemented (no handler {key})")
        guard_off, guard_reg = NO_GUARD, 0
        if self.insn.guard is not None:
            g = self.register(self.insn.guard)
            guard_off, guard_reg = g.off, g.reg
        first = len(self.operands)
        self.operands += [(o.off, o.reg) for o in (*dsts, *srcs)]
        imm = tuple(imm) + (0,) * (4 - len(imm))
        self.rows.append(
            (handler, guard_off, guard_reg, self.insn.line, first, len(dsts), len(srcs), self.insn.guard_negated,
            policy,
             (0,) * 6, flags, imm)
        )  # fmt: skip
        self.opcodes.append(self.insn.opcode)
        self.locs.append(self.insn.loc)

    def emit_branch(self, label):
        """Adds a branch; its target is patched in when all labels are known."""
        self.patches.append((len(self.rows), self.frame, label))
        self.emit("bra", policy=STRICT)

    def body(self, frame: _Frame):
        outer = getattr(self, "frame", None), getattr(self, "insn", None), getattr(self, "line", 0)
        self.frame = frame
        at = {}
        for label, index in frame.fn.labels.items():
            at.setdefault(index, []).append(label)
        for index, insn in enumerate(frame.fn.body):
            for label in at.get(index, ()):
                frame.labels[label] = len(self.rows)
            self.insn, self.line = insn, insn.line
            name = insn.opcode.split(".")[0]
            if name not in OPCODES:
                self.fail("not implemented")
            OPCODES[name](self, insn.operands, Mods(insn.opcode, insn.line))
        for label in at.get(len(frame.fn.body), ()):
            frame.labels[label] = len(self.rows)
        frame.end = len(self.rows)
        self.frame, self.insn, self.line = outer

    def inline(self, callee: ast.Function, arguments: dict):
        """Decodes the body of a device function in place."""
        if callee.name in self.calls:
            self.fail(f"recursion through {callee.name} is not implemented")
        self.calls.append(callee.name)
        guard = self.insn.guard
        skip = None
        if guard is not None:
            # the body runs under the guard: jump around it
            skip = object()
            insn = self.insn
            self.insn = ast.Insn(insn.opcode, (), guard, not insn.guard_negated, insn.line, insn.loc)
            self.emit_branch(skip)
            self.insn = insn
        frame = _Frame(callee, f"{callee.name}@{len(self.rows)}:", arguments)
        caller = self.frame
        self.body(frame)
        if skip is not None:
            caller.labels[skip] = len(self.rows)
        self.calls.pop()

    def decode(self) -> Program:
        self.place_shared()
        self.place_params()
        self.line = self.entry.line
        self.body(_Frame(self.entry, "", {}))
        # threads that run off the end exit; labels at the end need an instruction to point at
        self.frame = _Frame(self.entry, "", {})
        self.insn = ast.Insn("exit", (), None, False, self.rows[-1][3] if self.rows else self.entry.line, None)
        self.emit("exit")
        rows = np.array(self.rows, dtype=INSN)
        for row, frame, label in self.patches:
            target = frame.end if label is None else frame.labels.get(label)
            if target is None:
                raise Unsupported(f"line {rows[row]['line']}: no label {label}")
            rows["imm"][row][0] = target
        specials = [(SPECIALS.index(n), o.reg, o.off) for n, o in self.special_slots.items()]
        return Program(
            name=self.entry.name,
            module=self.module,
            insns=rows,
            operands=np.array(self.operands or [(0, 0)], dtype=np.uint32),
            consts=bytes(self.consts),
            specials=np.array(specials, dtype=np.uint32).reshape(-1, 3),
            file_bytes=self.file_bytes + 64,
            nregs=self.nregs,
            local_bytes=_align(self.local_bytes, 16),
            static_shared=self.static_shared,
            shift_shared=self.smallest["shared"].bit_length() - 1,
            shift_global=self.smallest["global"].bit_length() - 1,
            params=self.params,
            param_bytes=self.param_bytes,
            variables=list(self.variables.values()),
            opcodes=self.opcodes,
            locs=self.locs,
            directives=self.entry.directives,
            next_window=self.next_window,
            uses_wgmma=self.uses_wgmma,
            uses_async=self.uses_async,
        )


def encode_immediate(imm: ast.Imm, kind: str) -> bytes:
    """The bytes of a literal as an operand of this type."""
    size = type_size(kind)
    if kind in ("f32", "f64"):
        if imm.bits is not None:
            if size == 4 and imm.bits >> 32:
                return struct.pack("<f", imm.value)
            if size == 8 and imm.bits < 1 << 32 and imm.value == struct.unpack("<f", imm.bits.to_bytes(4, "little"))[0]:
                return struct.pack("<d", imm.value)
            return imm.bits.to_bytes(size, "little")
        # an integer literal is a value only where it is written as a decimal
        return struct.pack("<f" if size == 4 else "<d", imm.value)
    value = imm.bits if imm.bits is not None else int(imm.value)
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def decode(module: ast.Module, kernel: str, lookup) -> Program:
    """The program of one kernel. `lookup` gives the number of an engine handler, or -1."""
    from . import decode_alu, decode_async, decode_convert, decode_memory, decode_sync, decode_tensor  # noqa: F401 (register the opcodes)

    return Decoder(module, kernel, lookup).decode()
