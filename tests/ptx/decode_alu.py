"""Decoding of arithmetic, logic, comparison, selection and movement between registers."""

from __future__ import annotations

from . import syntax as ast
from .decode import CUSTOM, FTZ, NAN, RELU, ROUND, SAT, XORSIGN, Decoder, opcode
from .modifiers import Mods
from .syntax import type_size

_INTS = ("u16", "s16", "u32", "s32", "u64", "s64")
_FLOATS = ("f32", "f64")
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_UNSIGNED = {"b16": "u16", "b32": "u32", "b64": "u64"}


def simple(d: Decoder, ops, key: str, kinds, flags: int = 0, imm=()):
    """Emits d, a, b, ... with one type an operand."""
    if len(ops) != len(kinds):
        d.fail(f"{len(kinds)} operands expected, {len(ops)} found")
    d.emit(key, [d.dst(ops[0], kinds[0])], [d.src(o, k) for o, k in zip(ops[1:], kinds[1:], strict=True)], imm, flags)


def rounding(m: Mods) -> int:
    word = m.choice("rn", "rz", "rm", "rp")
    return ROUND[word] if word else 0


def float_flags(m: Mods, relu: bool = False) -> int:
    flags = rounding(m)
    flags |= FTZ if m.take("ftz") else 0
    flags |= SAT if m.take("sat") else 0
    if relu:
        flags |= RELU if m.take("relu") else 0
    return flags


@opcode("add", "sub")
def add(d, ops, m):
    name = m.text.split(".")[0]
    if m.take("cc"):
        return carry(d, ops, m, with_carry=False, set_carry=True, subtract=name == "sub")
    kind = m.type()
    if kind in _INTS or kind in ("u16x2", "s16x2"):
        if m.take("sat"):
            name += ".sat"
        flags = 0
    else:
        flags = float_flags(m)
    m.done()
    simple(d, ops, f"{name}.{kind}", [kind] * 3, flags)


@opcode("addc", "subc")
def addc(d, ops, m):
    carry(d, ops, m, with_carry=True, set_carry=m.take("cc"), subtract=m.text.startswith("sub"))


def carry(d, ops, m, with_carry, set_carry, subtract):
    kind = m.type()
    m.done()
    if kind not in ("u32", "s32", "u64", "s64"):
        m.fail("type not implemented")
    simple(d, ops, f"addcarry.{type_size(kind) * 8}", [kind] * 3, imm=(with_carry, set_carry, subtract))


@opcode("mul")
def mul(d, ops, m):
    kind = m.type()
    if kind in _INTS:
        part = m.need("lo", "hi", "wide")
        m.done()
        return simple(d, ops, f"mul.{part}.{kind}", [_wide(kind) if part == "wide" else kind, kind, kind])
    flags = float_flags(m)
    m.done()
    simple(d, ops, f"mul.{kind}", [kind] * 3, flags)


def _wide(kind: str) -> str:
    return kind[0] + {"16": "32", "32": "64"}.get(kind[1:], "128")


@opcode("mad", "madc")
def mad(d, ops, m):
    with_carry, set_carry = m.text.startswith("madc"), m.take("cc")
    kind = m.type()
    if kind in _FLOATS:
        flags = float_flags(m)
        m.done()
        return simple(d, ops, f"fma.{kind}", [kind] * 4, flags)
    part = m.need("lo", "hi", "wide")
    sat = m.take("sat")
    m.done()
    if with_carry or set_carry:
        return simple(d, ops, f"madcarry.{kind}", [kind] * 4, imm=(with_carry, set_carry, part == "hi"))
    wide = _wide(kind) if part == "wide" else kind
    simple(d, ops, f"mad.{part}.{'sat.' if sat else ''}{kind}", [wide, kind, kind, wide])


@opcode("mul24", "mad24")
def mul24(d, ops, m):
    kind, part, name = m.type(), m.need("lo", "hi"), m.text.split(".")[0]
    m.done()
    simple(d, ops, f"{name}.{part}.{kind}", [kind] * (3 if name == "mul24" else 4))


@opcode("sad")
def sad(d, ops, m):
    kind = m.type()
    m.done()
    simple(d, ops, f"sad.{kind}", [kind] * 4)


@opcode("fma")
def fma(d, ops, m):
    kind = m.type()
    flags = float_flags(m, relu=kind in _HALVES)
    m.done()
    simple(d, ops, f"fma.{kind}", [kind] * 4, flags)


@opcode("div")
def div(d, ops, m):
    kind = m.type()
    key = f"div.{kind}"
    if kind == "f32":
        how = m.choice("approx", "full")
        key = "div.approx.f32" if how == "approx" else key
    flags = float_flags(m) if kind in _FLOATS else 0
    m.done()
    simple(d, ops, key, [kind] * 3, flags)


@opcode("rem")
def rem(d, ops, m):
    kind = m.type()
    m.done()
    simple(d, ops, f"rem.{kind}", [kind] * 3)


@opcode("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
def approximate(d, ops, m):
    """The engine computes these to rounding, which is within the error that the ISA allows .approx."""
    name, kind = m.text.split(".")[0], m.type()
    approx = m.take("approx")
    if not approx and name not in ("rcp", "sqrt"):
        m.fail(".approx is needed")
    flags = float_flags(m)
    m.done()
    simple(d, ops, f"{name}.{kind}", [kind] * 2, flags)


@opcode("abs", "neg")
def sign(d, ops, m):
    name, kind = m.text.split(".")[0], m.type()
    flags = FTZ if m.take("ftz") else 0
    m.done()
    if kind in _HALVES:
        if flags:
            m.fail(".ftz of 16-bit formats is not implemented")
        return simple(d, ops, f"{name}.16x2" if kind.endswith("x2") else f"{name}.16", [kind] * 2)
    simple(d, ops, f"{name}.{kind}", [kind] * 2, flags)


@opcode("min", "max")
def minmax(d, ops, m):
    name, kind = m.text.split(".")[0], m.type()
    if kind in _INTS or kind in ("u16x2", "s16x2"):
        relu = m.take("relu")
        m.done()
        return simple(d, ops, f"{name}.{'relu.' if relu else ''}{kind}", [kind] * 3)
    flags = FTZ if m.take("ftz") else 0
    flags |= NAN if m.take("NaN") else 0
    if m.take("xorsign"):
        if not m.take("abs"):
            m.fail(".xorsign needs .abs")
        flags |= XORSIGN
    m.done()
    simple(d, ops, f"minmax.{kind}", [kind] * 3, flags, (name == "max",))


@opcode("copysign")
def copysign(d, ops, m):
    kind = m.type()
    m.done()
    simple(d, ops, f"copysign.{kind}", [kind] * 3)


@opcode("testp")
def testp(d, ops, m):
    kind = m.type()
    names = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    which = names.index(m.need(*names))
    m.done()
    simple(d, ops, f"testp.{kind}", ["pred", kind], imm=(which,))


@opcode("and", "or", "xor", "not", "cnot")
def logic(d, ops, m):
    name, kind = m.text.split(".")[0], m.type()
    m.done()
    simple(d, ops, f"{name}.{kind}", [kind] * (2 if name in ("not", "cnot") else 3))


@opcode("shl", "shr")
def shift(d, ops, m):
    name, kind = m.text.split(".")[0], m.type()
    m.done()
    simple(d, ops, f"{name}.{kind}", [kind, kind, "u32"])


@opcode("shf")
def shf(d, ops, m):
    kind, side, mode = m.type(), m.need("l", "r"), m.need("clamp", "wrap")
    m.done()
    simple(d, ops, "shf", [kind] * 4, imm=(side == "l", mode == "wrap"))


@opcode("prmt")
def prmt(d, ops, m):
    modes = ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    mode = modes.index(m.choice(*modes[1:], default=""))
    kind = m.type()
    m.done()
    simple(d, ops, "prmt", [kind] * 4, imm=(mode,))


@opcode("lop3")
def lop3(d, ops, m):
    kind = m.type()
    boolean = m.choice("or", "and")
    m.done()
    lut = _constant(d, ops[4])
    if boolean is None:
        return simple(d, ops[:4], "lop3", [kind] * 4, imm=(lut,))
    q, negated = d.pred_src(ops[5])
    dsts = [d.dst(ops[0].first, kind), d.dst(ops[0].second, "pred")]
    d.emit("lop3.pred", dsts, [*(d.src(o, kind) for o in ops[1:4]), q], (lut, boolean == "and", negated))


def _constant(d, op) -> int:
    if not isinstance(op, ast.Imm):
        d.fail("an immediate is needed")
    return int(op.value)


@opcode("bfe")
def bfe(d, ops, m):
    kind = m.type()
    m.done()
    simple(d, ops, f"bfe.{kind}", [kind, kind, "u32", "u32"])


@opcode("bfi")
def bfi(d, ops, m):
    kind = m.type()
    m.done()
    simple(d, ops, f"bfi.{kind}", [kind, kind, kind, "u32", "u32"])


@opcode("bfind", "popc", "clz")
def count_bits(d, ops, m):
    name, kind = m.text.split(".")[0], m.type()
    shiftamt = m.take("shiftamt")
    m.done()
    simple(d, ops, f"{name}.{'shiftamt.' if shiftamt else ''}{kind}", ["u32", kind])


@opcode("brev")
def brev(d, ops, m):
    kind = m.type()
    m.done()
    simple(d, ops, f"brev.{kind}", [kind] * 2)


@opcode("fns")
def fns(d, ops, m):
    m.type()
    m.done()
    simple(d, ops, "fns.b32", ["b32", "b32", "b32", "s32"])


@opcode("szext")
def szext(d, ops, m):
    kind, mode = m.type(), m.need("clamp", "wrap")
    m.done()
    simple(d, ops, "szext", [kind, kind, "u32"], imm=(kind == "s32", mode == "wrap"))


@opcode("bmsk")
def bmsk(d, ops, m):
    kind, mode = m.type(), m.need("clamp", "wrap")
    m.done()
    simple(d, ops, "bmsk", [kind, "u32", "u32"], imm=(mode == "wrap",))


@opcode("dp4a")
def dp4a(d, ops, m):
    b, a = m.type(), m.type()
    m.done()
    simple(d, ops, f"dp4a.{a}.{b}", ["u32", a, b, "u32"])


@opcode("dp2a")
def dp2a(d, ops, m):
    b, a, part = m.type(), m.type(), m.need("lo", "hi")
    m.done()
    simple(d, ops, "dp2a", ["u32", a, b, "u32"], imm=(part == "hi", a == "s32", b == "s32"))


# -- comparison and selection --------------------------------------------------------------------------------------
_UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMPARE = (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equ",
    "neu",
    "ltu",
    "leu",
    "gtu",
    "geu",
    "num",
    "nan",
    *_UNSIGNED_COMPARE,
)
_BOOL = ("", "and", "or", "xor")


def _comparison(m: Mods):
    kind = m.type()
    compare = m.parts.pop(0)
    if compare not in _COMPARE:
        m.fail(f"comparison .{compare} is not implemented")
    boolean = _BOOL.index(m.choice("and", "or", "xor", default=""))
    flags = FTZ if m.take("ftz") else 0
    if flags and kind != "f32":
        m.fail(".ftz is implemented for .f32 only")
    if compare in _UNSIGNED_COMPARE:
        compare, kind = _UNSIGNED_COMPARE[compare], "u" + kind[1:]
    return _UNSIGNED.get(kind, kind), compare, boolean, flags


@opcode("setp")
def setp(d, ops, m):
    kind, compare, boolean, flags = _comparison(m)
    m.done()
    both = isinstance(ops[0], ast.Pair)
    dsts = [d.dst(o, "pred") for o in (ops[0] if both else ops[:1])]
    srcs = [d.src(o, kind) for o in ops[1:3]]
    negated = False
    if boolean:
        q, negated = d.pred_src(ops[3])
        srcs.append(q)
    if kind.endswith("x2") and not both:
        d.fail("two destinations are needed")
    d.emit(f"setp.{compare}.{kind}", dsts, srcs, (boolean, negated), flags)


@opcode("set")
def set_(d, ops, m):
    kind = m.type()
    result = m.type()
    m.parts.append(kind)
    kind, compare, boolean, flags = _comparison(m)
    m.done()
    true = {
        "u32": 0xFFFFFFFF,
        "s32": 0xFFFFFFFF,
        "f32": 0x3F800000,
        "u16": 0xFFFF,
        "s16": 0xFFFF,
        "f16": 0x3C00,
        "bf16": 0x3F80,
    }
    if result not in true or kind.endswith("x2"):
        m.fail("type not implemented")
    srcs = [d.src(o, kind) for o in ops[1:3]]
    negated = False
    if boolean:
        q, negated = d.pred_src(ops[3])
        srcs.append(q)
    d.emit(
        f"set.{compare}.{kind}",
        [d.dst(ops[0], result)],
        srcs,
        (boolean, negated, true[result], type_size(result)),
        flags,
    )


@opcode("selp")
def selp(d, ops, m):
    kind = m.type()
    m.done()
    p, negated = d.pred_src(ops[3])
    a, b = ops[1], ops[2]
    if negated:
        a, b = b, a
    d.emit(f"selp.{type_size(kind) * 8}", [d.dst(ops[0], kind)], [d.src(a, kind), d.src(b, kind), p], policy=CUSTOM)


@opcode("slct")
def slct(d, ops, m):
    chooser, kind = m.type(), m.type()
    flags = m.take("ftz")  # -0 and subnormals flush to zero, which is >= 0 either way only for positive ones
    if flags:
        m.fail(".ftz is not implemented")
    m.done()
    simple(d, ops, f"slct.{type_size(kind) * 8}.{chooser}", [kind, kind, kind, chooser])


# -- movement ------------------------------------------------------------------------------------------------------
_CLOCKS = {
    "%clock": (4, 0),
    "%clock_hi": (4, 32),
    "%clock64": (8, 0),
    "%globaltimer": (8, 0),
    "%globaltimer_lo": (4, 0),
    "%globaltimer_hi": (4, 32),
}


@opcode("mov")
def mov(d, ops, m):
    kind = m.type()
    m.done()
    to, value = ops
    if kind == "pred":
        return d.emit("mov.pred", [d.dst(to, "pred")], [d.src(value, "pred")])
    if isinstance(value, ast.Special) and value.name in _CLOCKS:
        size, shift = _CLOCKS[value.name]
        return d.emit("clock", [d.dst(to, f"u{size * 8}")], imm=(size, shift))
    if isinstance(to, ast.Vec) or isinstance(value, ast.Vec):
        vec, whole = (to, value) if isinstance(to, ast.Vec) else (value, to)
        element = type_size(kind) // len(vec.items)
        if element < 2:
            d.fail("elements of 8 bits are not implemented")
        part = f"b{element * 8}"
        if vec is to:
            return d.emit("unpack", [d.dst(o, part) for o in vec.items], [d.src(whole, kind)], (element,))
        return d.emit("pack", [d.dst(whole, kind)], [d.src(o, part) for o in vec.items], (element,))
    if isinstance(value, ast.Special) and value.name == "%gridid" and type_size(kind) == 8:
        value = ast.Imm(0)
    d.emit(f"mov.{type_size(kind) * 8}", [d.dst(to, kind)], [d.src(value, kind)])
