"""Decoding of loads, stores, atomics, address conversion and cache hints."""

from __future__ import annotations

from . import syntax as ast
from .decode import CUSTOM, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, SPACES, STRICT, Decoder, Operand, opcode
from .modifiers import Mods
from .syntax import type_size

ORDERS = {"weak": 0, "relaxed": 1, "acquire": 2, "release": 3, "acq_rel": 4, "sc": 5}
SCOPES = {"cta": 0, "cluster": 1, "gpu": 2, "sys": 3}
_SPACE_WORDS = {
    "global": "global", "shared": "shared", "shared::cta": "shared", "shared::cluster": "shared", "local": "local",
    "const": "const",
    "param": "param", "param::entry": "param", "param::func": "param",
}  # fmt: skip
_HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B", "L2::evict_last", "L2::evict_first", "L2::evict_normal",
)  # fmt: skip


def space(m: Mods, default: str = "generic") -> str:
    word = m.choice(*_SPACE_WORDS)
    return _SPACE_WORDS[word] if word else default


def semantics(where: str, order: str = "weak", scope: str = "gpu") -> int:
    """The flags of a memory operation."""
    return SPACES[where] << 32 | ORDERS[order] << 36 | SCOPES[scope] << 40


CONSTANT = 1 << 44  # of a load: what it reads must not change while the kernel runs


def address(d: Decoder, op) -> tuple[Operand, int, int]:
    """The base operand, the offset, and the bytes of the base."""
    if not isinstance(op, ast.Addr):
        d.fail("an address is needed")
    base = op.base
    if isinstance(base, ast.Reg):
        reg = d.register(base)
        if reg.size not in (4, 8):
            d.fail("an address has 32 or 64 bits")
        return reg, op.offset, reg.size
    return d.src(base, "u64"), op.offset, 8


def _semantics_of(m: Mods, where_default: str = "generic") -> tuple[str, int]:
    order = "weak"
    scope = "gpu"
    if m.take("volatile"):
        order, scope = "relaxed", "sys"
    elif m.take("mmio"):
        m.need("relaxed")
        order, scope = "relaxed", m.need("sys")
    else:
        order = m.choice("weak", "relaxed", "acquire", "release", default="weak")
        if order != "weak":
            scope = m.need(*SCOPES)
    where = space(m, where_default)
    return where, semantics(where, order, scope)


def _elements(d: Decoder, op, m: Mods) -> tuple:
    words = m.choice("v2", "v4", "v8")
    if words is None:
        return op.items if isinstance(op, ast.Vec) and len(op.items) == 1 else (op,)
    if not isinstance(op, ast.Vec) or len(op.items) != int(words[1:]):
        d.fail(f"a vector of {words[1:]} is needed")
    return op.items


def drop_cache_hint(d: Decoder, m: Mods, ops):
    """Drops the cache policy: it does not change what the operation does."""
    if m.take("L2::cache_hint"):
        d.src(ops[-1], "b64")
        return ops[:-1]
    return ops


def touch(d: Decoder, where: str, nbytes: int):
    """Notes an access: race detection works in pieces as small as the smallest."""
    for name in ("shared", "global") if where == "generic" else (where,):
        if name in d.smallest:
            d.smallest[name] = min(d.smallest[name], nbytes)


def _function_param(d: Decoder, op) -> bool:
    """Whether this names a parameter of an inlined function or call, which lives in local memory."""
    return isinstance(op.base, ast.Sym) and not (d.frame.prefix == "" and op.base.name in d.param_offsets)


@opcode("ld", "ldu")
def ld(d, ops, m):
    ops = drop_cache_hint(d, m, ops)
    kind = m.type()
    where, flags = _semantics_of(m)
    constant = m.text.startswith("ldu")
    while hint := m.choice(*_HINTS):
        constant |= hint == "nc"
    flags |= constant * CONSTANT
    items = _elements(d, ops[0], m)
    m.done()
    dsts = [d.dst(o, kind, wider=True) if o != ast.SINK else d.sink(max(type_size(kind), 2)) for o in items]
    sizes = {o.size for o in dsts}
    if len(sizes) != 1:
        d.fail("destinations of different sizes")
    shape = type_size(kind) | (kind[0] == "s") << 8 | dsts[0].size << 16
    if where == "param":
        if _function_param(d, ops[1]):
            where, flags = "local", semantics("local")
        elif isinstance(ops[1].base, ast.Sym):
            offset = d.param_offsets[ops[1].base.name] + ops[1].offset
            return d.emit("ld.param", dsts, (), (offset, shape))
    base, offset, size = address(d, ops[1])
    touch(d, where, type_size(kind) * len(items))
    d.emit("ld", dsts, [base], (offset, shape, 0, size), flags, CUSTOM)


@opcode("st")
def st(d, ops, m):
    ops = drop_cache_hint(d, m, ops)
    kind = m.type()
    if m.parts and m.parts[0] == "async":
        m.fail("not implemented")
    where, flags = _semantics_of(m)
    while m.choice(*_HINTS):
        pass
    items = _elements(d, ops[1], m)
    m.done()
    srcs = [d.src(o, kind, wider=True) for o in items]
    if where == "param":
        where, flags = "local", semantics("local")
    base, offset, size = address(d, ops[0])
    if len({o.size for o in srcs}) != 1:
        d.fail("sources of different sizes")
    touch(d, where, type_size(kind) * len(items))
    d.emit("st", (), [base, *srcs], (offset, type_size(kind) | srcs[0].size << 16, 0, size), flags, CUSTOM)


_ATOM_OPS = ("add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas")
_ATOM_TYPES = {
    "u32": 0, "b32": 0, "s32": 1, "u64": 2, "b64": 2, "s64": 3, "f32": 4, "f64": 5, "f16": 6, "bf16": 7, "f16x2": 8,
    "bf16x2": 9, "b16": 0,
}  # fmt: skip
# what the ISA allows, by operation
_ATOM_ALLOWED = {
    "add": "u32 s32 u64 s64 f32 f64 f16 bf16 f16x2 bf16x2", "min": "u32 s32 u64 s64 f16 bf16 f16x2 bf16x2",
    "max": "u32 s32 u64 s64 f16 bf16 f16x2 bf16x2", "inc": "u32", "dec": "u32", "and": "b32 b64", "or": "b32 b64",
    "xor": "b32 b64",
    "exch": "b32 b64 b128", "cas": "b16 b32 b64 b128",
}  # fmt: skip


@opcode("atom", "red")
def atom(d, ops, m):
    returns = m.text.startswith("atom")
    if m.take("async"):
        m.fail("not implemented")
    ops = drop_cache_hint(d, m, ops)
    kind = m.type()
    order = m.choice("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    scope = m.choice(*SCOPES, default="gpu")
    where = space(m)
    op = m.need(*_ATOM_OPS)
    m.take("noftz")
    vector = m.choice("v2", "v4", "v8")
    m.done()
    if kind not in _ATOM_ALLOWED[op].split() and not (op in ("min", "max") and vector and kind in ("f32",)):
        m.fail("type not implemented")
    if vector and kind not in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        m.fail("type not implemented")
    flags = semantics(where, order, scope)
    rest = list(ops)
    dsts = []
    count = int(vector[1:]) if vector else 1
    if returns:
        target = rest.pop(0)
        dsts = [d.dst(o, kind) for o in (target.items if vector else (target,))]
    base, offset, size = address(d, rest[0])
    values = rest[1].items if vector else rest[1:]
    srcs = [base, *(d.src(o, kind) for o in values)]
    nbytes = type_size(kind)
    touch(d, where, nbytes * count)
    if kind == "b128":
        return d.emit("atom.128", dsts, srcs, (offset, 0, 0, size), flags, STRICT)
    if kind == "b16" and op != "cas":
        m.fail("type not implemented")
    shape = nbytes | _ATOM_OPS.index(op) << 8 | _ATOM_TYPES[kind] << 16 | count << 24
    d.emit("atom", dsts, srcs, (offset, shape, 0, size), flags, CUSTOM)


@opcode("cvta")
def cvta(d, ops, m):
    kind = m.type()
    to = m.take("to")
    where = space(m)
    m.done()
    if kind != "u64":
        m.fail("only 64-bit addresses are implemented")
    base = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(where, 0)
    d.emit("cvta", [d.dst(ops[0], kind)], [d.src(ops[1], kind)], (-base if to else base,))


@opcode("isspacep")
def isspacep(d, ops, m):
    where = space(m)
    m.done()
    d.emit("isspacep", [d.dst(ops[0], "pred")], [d.src(ops[1], "u64")], (SPACES[where],))


@opcode("prefetch", "prefetchu", "applypriority", "discard")
def prefetch(d, ops, m):
    """Has no effect that a program can see, so only the address has to be defined."""
    space(m)
    m.choice("L1", "L2", "tensormap", "L2::evict_last", "L2::evict_normal")
    m.choice("L1", "L2", "L2::evict_last", "L2::evict_normal")
    m.take("tensormap")
    m.done()
    base, _, _ = address(d, ops[0])
    d.emit("prefetch", (), [base], policy=CUSTOM)


@opcode("createpolicy")
def createpolicy(d, ops, m):
    """A cache policy only steers caches; its value is opaque, so zero does."""
    d.emit("mov.64", [d.dst(ops[0], "b64")], [d.src(ast.Imm(0), "b64")])
