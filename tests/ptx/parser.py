"""PTX text to a Module: functions, variables and instructions, with their line and the source line from .loc.

The parser knows PTX's syntax and no opcode: what an opcode means, and whether it is implemented, is `decode`'s
business.
Register and variable names are resolved to scopes here, because inline assembly opens brace scopes of its own.
"""

from __future__ import annotations

import re
import struct

from .syntax import (
    SINK,
    TYPE_SIZES,
    Addr,
    Function,
    Group,
    Imm,
    Insn,
    Loc,
    Module,
    Not,
    Pair,
    PtxSyntaxError,
    Reg,
    Special,
    Sym,
    Var,
    Vec,
    type_size,
)
from .tokens import Tokens, to_int

_SPACES = {".global": "global", ".const": "const", ".shared": "shared", ".local": "local", ".param": "param"}
_SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)(?:\.[xyz])$|%(?:laneid|warpid|nwarpid|smid|"
    r"nsmid|gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(?:eq|le|lt|ge|gt)|"
    r"total_smem_size|aggr_smem_size|dynamic_smem_size|cluster_ctarank|cluster_nctarank|is_explicit_cluster|"
    r"envreg\d+|reserved_smem_offset_\w+|current_graph_exec|pm\d+(?:_64)?)$|WARP_SZ$"
)


class _Scope:
    """The names visible inside one pair of braces."""

    def __init__(self, parent: _Scope | None, suffix: str):
        self.parent, self.suffix = parent, suffix
        self.regs: dict[str, Reg] = {}
        self.ranges: dict[str, tuple[int, str]] = {}
        self.vars: dict[str, str] = {}
        self.labels: dict[str, str] = {}

    def find_reg(self, name: str) -> Reg | None:
        scope = self
        while scope is not None:
            if name in scope.regs:
                return scope.regs[name]
            m = re.match(r"(.*?)(\d+)$", name)
            if m and m.group(1) in scope.ranges:
                count, kind = scope.ranges[m.group(1)]
                if int(m.group(2)) < count:
                    return scope.regs.setdefault(name, Reg(name + scope.suffix, kind))
            scope = scope.parent
        return None

    def find(self, table: str, name: str) -> str | None:
        scope = self
        while scope is not None:
            found = getattr(scope, table).get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None


class Parser(Tokens):
    """Recursive descent over the token list; `parse` is the one entry point."""

    def __init__(self, text: str):
        super().__init__(text)
        self.loc: Loc | None = None
        self.inlined_at: dict[tuple, tuple] = {}
        self.scope_count = 0

    # -- module --------------------------------------------------------------------------------------------------
    def parse(self) -> Module:
        module = Module((0, 0), "", {}, {}, {})
        self.module_scope = _Scope(None, "")
        self.module = module
        while self.kinds[self.i] != "end":
            self.statement_at_module_level(module)
        if not module.target:
            raise PtxSyntaxError("no .target directive")
        return module

    def statement_at_module_level(self, module: Module):
        word = self.word
        if word == ".version":
            self.take()
            major, minor = self.take().split(".")
            module.version = (int(major), int(minor))
        elif word == ".target":
            self.take()
            names = self.rest_of_line()
            module.target = names[0]
        elif word == ".address_size":
            self.take()
            if self.integer() != 64:
                raise PtxSyntaxError(f"line {self.lines[self.i - 1]}: only .address_size 64 is supported")
        elif word == ".file":
            self.take()
            index = self.integer()
            module.files[index] = self.take().strip('"')
            self.rest_of_line_if_same(",")
        elif word == ".section":
            self.take()
            while not self.accept("{"):
                self.take()
            while not self.accept("}"):
                self.take()
        elif word == ".loc":
            self.location()
        elif word == ".pragma":
            self.take()
            self.take()
            self.expect(";")
        elif word in (".visible", ".extern", ".weak", ".common", ".func", ".entry", ".global", ".const", ".shared"):
            self.declaration(module)
        else:
            self.fail("unknown directive at module level")

    def rest_of_line_if_same(self, sep: str):
        while self.word == sep:
            self.take()
            self.take()

    def declaration(self, module: Module):
        extern = False
        while self.word in (".visible", ".extern", ".weak", ".common"):
            extern |= self.take() == ".extern"
        if self.word in (".func", ".entry"):
            self.function(module)
            return
        for var in self.variable_list():
            var.extern = extern
            module.variables[var.name] = var
            self.module_scope.vars[var.name] = var.name

    def variable_list(self) -> list[Var]:
        line = self.lines[self.i]
        space = _SPACES[self.take()]
        out = []
        align = kind = None
        while True:
            if self.word == ".align":
                self.take()
                align = self.integer()
            elif self.word == ".attribute":
                self.take()
                while not self.accept(")"):
                    self.take()
            elif self.word in (".v2", ".v4"):
                self.fail("vector variables are not supported")
            elif self.word.startswith("."):
                kind = self.take()[1:]
                if kind not in TYPE_SIZES:
                    raise PtxSyntaxError(f"line {line}: unknown type .{kind}")
            else:
                break
        while True:
            var = Var(self.take(), space, kind, align or type_size(kind), 1, line=line)
            while self.accept("["):
                var.count = 0 if self.word == "]" else var.count * self.integer()
                self.expect("]")
            if self.accept("="):
                var.init = self.initializer()
                if var.count == 0:
                    var.count = len(var.init)
            out.append(var)
            if not self.accept(","):
                break
        self.expect(";")
        return out

    def initializer(self) -> list:
        if not self.accept("{"):
            return [self.init_item()]
        out = []
        while not self.accept("}"):
            if self.word == "{":
                out += self.initializer()
            else:
                out.append(self.init_item())
            self.accept(",")
        return out

    def init_item(self):
        if self.kinds[self.i] == "word":
            name = self.take()
            if name == "generic":
                self.expect("(")
                name = self.take()
                self.expect(")")
            return Sym(name, self.integer() if self.accept("+") else 0)
        return self.immediate()

    # -- functions -----------------------------------------------------------------------------------------------
    def param_list(self) -> list[Var]:
        out = []
        self.expect("(")
        while not self.accept(")"):
            line, align, kind = self.lines[self.i], None, None
            if self.word not in (".param", ".reg"):
                self.fail("expected .param")
            space = self.take()[1:]
            while self.word.startswith("."):
                mod = self.take()
                if mod == ".ptr":
                    # what follows tells of the pointee
                    if self.word in (".global", ".const", ".shared", ".local"):
                        self.take()
                    if self.accept(".align"):
                        self.integer()
                elif mod == ".align":
                    align = self.integer()
                else:
                    kind = mod[1:]
            if kind not in TYPE_SIZES:
                raise PtxSyntaxError(f"line {line}: unknown parameter type .{kind}")
            var = Var(self.take(), "param" if space == "param" else "reg", kind, align or type_size(kind), 1, line=line)
            while self.accept("["):
                var.count = var.count * self.integer()
                self.expect("]")
            out.append(var)
            self.accept(",")
        return out

    def function(self, module: Module):
        line = self.lines[self.i]
        entry = self.take() == ".entry"
        results = self.param_list() if self.word == "(" else []
        name = self.take()
        params = self.param_list() if self.word == "(" else []
        fn = Function(name, entry, params, results, line)
        while self.word.startswith("."):
            key, values = self.take(), []
            while self.kinds[self.i] in ("int",) or self.word == ",":
                word = self.take()
                if word != ",":
                    values.append(to_int(word))
            if key == ".pragma":
                self.take()
                self.expect(";")
                continue
            fn.directives[key] = values
        if self.accept(";"):
            module.functions.setdefault(name, fn)
            return
        self.expect("{")
        fn.body, self.fn = [], fn
        self.loc = None
        self.fixups: list[tuple[int, _Scope]] = []
        scope = _Scope(self.module_scope, "")
        for var in params + results:
            scope.vars[var.name] = var.name
            fn.variables[var.name] = var
            if var.space == "reg":
                raise PtxSyntaxError(f"line {line}: register parameters (.reg in a signature) are not supported")
        self.block(scope)
        for index, where in self.fixups:
            insn = fn.body[index]
            insn.operands = tuple(self.resolve_label(op, where) for op in insn.operands)
        module.functions[name] = fn

    def resolve_label(self, op, scope: _Scope):
        if isinstance(op, Sym):
            found = scope.find("labels", op.name)
            if found is not None:
                return Sym(found, op.offset)
        return op

    def block(self, scope: _Scope):
        fn = self.fn
        while not self.accept("}"):
            word, kind = self.word, self.kinds[self.i]
            if kind == "end":
                self.fail("function body not closed")
            if word == "{":
                self.take()
                self.scope_count += 1
                self.block(_Scope(scope, f"#{self.scope_count}"))
            elif word == ";":
                self.take()
            elif word == ".loc":
                self.location()
            elif word == ".reg":
                self.registers(scope)
            elif word in _SPACES:
                for var in self.variable_list():
                    unique = var.name + scope.suffix if var.space == "param" else var.name
                    scope.vars[var.name] = unique
                    fn.variables[unique] = var
            elif word == ".pragma":
                self.take()
                self.take()
                self.expect(";")
            elif kind == "word" and self.words[self.i + 1] == ":" and not word.startswith("."):
                self.take()
                self.take()
                if self.word in (".branchtargets", ".calltargets"):
                    self.take()
                    names = []
                    while not self.accept(";"):
                        names.append(self.take())
                        self.accept(",")
                    fn.branch_targets[word] = names
                    continue
                if self.word == ".callprototype":
                    while not self.accept(";"):
                        self.take()
                    continue
                unique = word + scope.suffix
                scope.labels[word] = unique
                fn.labels[unique] = len(fn.body)
            elif word.startswith("."):
                self.fail("unknown directive in a function")
            else:
                self.instruction(scope)

    def registers(self, scope: _Scope):
        self.take()
        kind = self.take()[1:]
        if kind in ("v2", "v4") or kind not in TYPE_SIZES:
            self.fail(f"register type .{kind} is not supported")
        while True:
            name = self.take()
            if self.accept("<"):
                scope.ranges[name] = (self.integer(), kind)
                self.expect(">")
            else:
                scope.regs[name] = Reg(name + scope.suffix, kind)
            if not self.accept(","):
                break
        self.expect(";")

    def location(self):
        """A .loc line ends with its line. Inlined positions are followed out to the line that the kernel's author
        wrote.
        """
        words = self.rest_of_line()
        position = tuple(int(word) for word in words[1:4])
        self.inlined_at.pop(position, None)
        if "inlined_at" in words:
            at = words.index("inlined_at")
            self.inlined_at[position] = tuple(int(word) for word in words[at + 1 : at + 4])
        seen = set()
        while position in self.inlined_at and position not in seen:
            seen.add(position)
            position = self.inlined_at[position]
        file, line, _ = position
        # line 0 means "no line": the previous one is nearer to the truth than none
        if line:
            self.loc = Loc(file, line)

    # -- instructions --------------------------------------------------------------------------------------------
    def instruction(self, scope: _Scope):
        line = self.lines[self.i]
        guard, negated = None, False
        if self.accept("@"):
            negated = self.accept("!")
            guard = self.register(scope)
        if self.kinds[self.i] != "word":
            self.fail("expected an instruction")
        opcode = self.take()
        operands = []
        labels = opcode.split(".")[0] in ("bra", "brx", "call")
        while not self.accept(";"):
            operands.append(self.operand(scope))
            if not self.accept(","):
                self.expect(";")
                break
        if labels:
            self.fixups.append((len(self.fn.body), scope))
        self.fn.body.append(Insn(opcode, tuple(operands), guard, negated, line, self.loc))

    def register(self, scope: _Scope) -> Reg:
        name = self.take()
        reg = scope.find_reg(name)
        if reg is None:
            raise PtxSyntaxError(f"line {self.lines[self.i - 1]}: register {name} is not declared")
        return reg

    def operand(self, scope: _Scope):
        word = self.word
        if word == "{":
            self.take()
            items = []
            while not self.accept("}"):
                items.append(self.operand(scope))
                self.accept(",")
            return Vec(tuple(items))
        if word == "[":
            self.take()
            base, offset, coords = self.operand(scope), 0, ()
            if isinstance(base, Sym):
                base, offset = Sym(base.name), base.offset
            if self.word == "+":
                self.take()
                offset += self.integer()
            elif self.word == "-":
                offset += self.integer()
            if self.accept(","):
                vec = self.operand(scope)
                coords = vec.items if isinstance(vec, Vec) else (vec,)
            self.expect("]")
            return Addr(base, offset, coords)
        if word == "(":
            self.take()
            items = []
            while not self.accept(")"):
                items.append(self.operand(scope))
                self.accept(",")
            return Group(tuple(items))
        if word == "!":
            self.take()
            return Not(self.register(scope))
        if self.kinds[self.i] == "word":
            self.take()
            value = self.named(word, scope)
            if self.accept("|"):
                return Pair(value, self.operand(scope))
            if isinstance(value, Sym) and self.word in ("+", "-"):
                self.accept("+")
                return Sym(value.name, self.integer())
            return value
        return self.immediate()

    def named(self, word: str, scope: _Scope):
        if word == "_":
            return SINK
        reg = scope.find_reg(word)
        if reg is not None:
            return reg
        if _SPECIAL.match(word):
            return Imm(32) if word == "WARP_SZ" else Special(word)
        if word.startswith("%"):
            raise PtxSyntaxError(f"line {self.lines[self.i - 1]}: register {word} is not declared")
        return Sym(scope.find("vars", word) or word)

    def immediate(self) -> Imm:
        kind = self.kinds[self.i]
        if kind == "float":
            word = self.take()
            bits = int(word[2:], 16)
            value = struct.unpack(
                "<f" if word[1] in "fF" else "<d", bits.to_bytes(4 if word[1] in "fF" else 8, "little")
            )
            return Imm(value[0], bits)
        sign = 1
        while self.word in "-+":
            if self.take() == "-":
                sign = -sign
        if self.kinds[self.i] == "decimal":
            return Imm(sign * float(self.take()))
        if self.kinds[self.i] == "float":
            inner = self.immediate()
            width = 31 if inner.bits < 1 << 32 else 63
            return Imm(-inner.value, inner.bits ^ (1 << width))
        if self.kinds[self.i] == "int":
            return Imm(sign * to_int(self.take()))
        self.fail("expected an operand")


def parse(text: str) -> Module:
    """Parse a PTX module."""
    return Parser(text).parse()
