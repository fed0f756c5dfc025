"""ld, st, atom, red, address conversion and variables (9.7.9, 9.7.13)."""

import numpy as np
import pytest
import torch

from . import Out, PtxFault, run
from .snippet import TORCH, evaluate, from_ints, samples, to_ints
from .test_integer import width, wrap

HEAD = ".version 8.8\n.target sm_90\n.address_size 64\n"


LOADS = [(m, r) for m in ("u8", "s8", "u16", "s16", "u32", "s32", "b64") for r in (16, 32, 64) if width(m) <= r]


@pytest.mark.parametrize(("memory", "register"), LOADS)
def test_load_extends(memory, register):
    """ld: the destination may be wider than the type, and is extended by its sign."""
    values = samples(memory, 0)
    kind = memory[0].replace("b", "u") + str(register)
    x = from_ints(values, memory)
    outs = [torch.zeros(len(values), dtype=TORCH[kind])]
    body = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b) {{
        .reg .b64 %p, %q; .reg .b32 %t; .reg .b{register} %v;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [a]; ld.param.u64 %q, [b];
        mad.wide.u32 %p, %t, {width(memory) // 8}, %p; mad.wide.u32 %q, %t, {register // 8}, %q;
        ld.global.{memory} %v, [%p]; st.global.b{register} [%q], %v; ret; }}"""
    run(body, "k", 1, len(values), 0, [x, *outs])
    assert to_ints(outs[0], kind) == [wrap(v, kind) for v in values]


@pytest.mark.parametrize("space", ["shared", "local", "shared::cta"])
@pytest.mark.parametrize("vector", [1, 2, 4])
def test_spaces_and_vectors(space, vector):
    """st and ld by vectors, through the space's own addresses and through generic ones (cvta, isspacep)."""
    short = space.split("::")[0]
    count = 64
    x = torch.arange(count * vector, dtype=torch.int32)
    out, where = torch.zeros_like(x), torch.zeros(count, dtype=torch.int32)
    v = "" if vector == 1 else f".v{vector}"
    regs = lambda name: "{" + ",".join(f"%{name}{i}" for i in range(vector)) + "}" if vector > 1 else f"%{name}0"  # noqa: E731
    # each thread of the block has its own place in shared memory, and all of local memory
    index = "%t" if short == "shared" else "0"
    text = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c) {{
        .{short} .align 16 .b8 room[2048]; .reg .b64 %p, %q, %r, %s, %g; .reg .b32 %t, %n, %v<4>, %w<4>; .reg .pred %is;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [a]; ld.param.u64 %q, [b]; ld.param.u64 %r, [c];
        mad.wide.u32 %p, %t, {4 * vector}, %p; mad.wide.u32 %q, %t, {4 * vector}, %q; mad.wide.u32 %r, %t, 4, %r;
        ld.global{v}.b32 {regs("v")}, [%p];
        mov.u64 %s, room; mov.u32 %n, {index}; mad.wide.u32 %s, %n, {4 * vector}, %s;
        st.{space}{v}.b32 [%s], {regs("v")};
        cvta.{short}.u64 %g, %s; isspacep.{short} %is, %g; selp.b32 %n, 1, 0, %is; st.global.b32 [%r], %n;
        ld{v}.b32 {regs("w")}, [%g]; st{v}.b32 [%g], {regs("w")};
        cvta.to.{short}.u64 %g, %g; ld.volatile.{short}{v}.b32 {regs("w")}, [%g];
        st.global{v}.b32 [%q], {regs("w")}; ret; }}"""
    run(text, "k", 1, count, 0, [x, Out(out), Out(where)])
    assert torch.equal(out, x)
    assert where.all()


def test_variables_parameters_and_initialisers():
    text = f"""{HEAD}
    .const .align 4 .b32 table[3] = {{5, -6, 0x10}};
    .global .align 8 .u64 pointer = generic(cell);
    .global .align 4 .f32 cell = 0f3FC00000;
    .visible .entry k(.param .align 8 .b8 s[12], .param .f32 f, .param .s16 h, .param .u64 out) {{
        .reg .b64 %p, %o, %a; .reg .b32 %v<8>; .reg .b16 %h; .reg .f32 %f<3>;
        ld.param.u64 %o, [out];
        ld.param.v2.b32 {{%v0, %v1}}, [s]; ld.param.b32 %v2, [s+8]; ld.param.f32 %f0, [f]; ld.param.s16 %h, [h];
        mov.u64 %a, s; cvta.param.u64 %a, %a; ld.b32 %v3, [%a+8];
        ld.const.b32 %v4, [table+4]; mov.u64 %p, table; ld.const.b32 %v5, [%p+8];
        ld.global.u64 %p, [pointer]; ld.f32 %f1, [%p]; add.f32 %f1, %f1, %f1; st.f32 [%p], %f1;
        ld.global.f32 %f2, [cell];
        cvt.s32.s16 %v6, %h;
        st.global.v4.b32 [%o], {{%v0, %v1, %v2, %v3}}; st.global.v2.b32 [%o+16], {{%v4, %v5}};
        st.global.f32 [%o+24], %f2; st.global.b32 [%o+28], %v6; st.global.f32 [%o+32], %f0; ret; }}"""
    out = torch.zeros(9, dtype=torch.int32)
    struct = np.array([1, 2, 3], dtype=np.int32).tobytes()
    run(text, "k", 1, 1, 0, [struct, 2.5, -7, Out(out)])
    assert out[:6].tolist() == [1, 2, 3, 3, -6, 16]
    assert out[[6, 8]].view(torch.float32).tolist() == [3.0, 2.5]
    assert out[7] == -7


def test_ordered_accesses_and_hints():
    """The memory-order, cache and eviction modifiers of ld and st do not change values."""
    x = torch.arange(32, dtype=torch.int32)
    body = (
        "createpolicy.fractional.L2::evict_first.b64 %a20, 1.0;"
        "ld.relaxed.gpu.global.b32 %o0, [%a0]; ld.acquire.sys.global.b32 %o1, [%a0]; "
        "ld.global.nc.L1::no_allocate.b32 %o2, [%a0];"
        "ldu.global.b32 %o3, [%a0]; ld.global.L2::cache_hint.b32 %o4, [%a0], %a20; prefetch.global.L2 [%a0]; "
        "prefetchu.L1 [%a0];"
        "applypriority.global.L2::evict_normal [%a0], 128; discard.global.L2 [%a1], 128;"
        "st.release.gpu.global.b32 [%a1], %o0; st.relaxed.cta.global.b32 [%a1], %o0; st.global.wt.b32 [%a1], %o0;"
    )
    for out in evaluate(body, [("s32", x)], ["s32"] * 5):
        assert torch.equal(out, x)


REFERENCE = {
    "add": lambda old, b: old + b, "min": min, "max": max, "inc": lambda old, b: 0 if old >= b else old + 1,
    "dec": lambda old, b: b if old == 0 or old > b else old - 1, "and": lambda old, b: old & b, "or": lambda old,
    b: old | b,
    "xor": lambda old, b: old ^ b, "exch": lambda old, b: b,
}  # fmt: skip
ATOMS = [("add", k) for k in ("u32", "s32", "u64", "s64")] + [
    (o, k) for o in ("min", "max") for k in ("u32", "s32", "u64", "s64")
]
ATOMS += [("inc", "u32"), ("dec", "u32")] + [(o, k) for o in ("and", "or", "xor", "exch") for k in ("b32", "b64")]


def atomic_kernel(kind, instruction, space):
    """Each thread applies `instruction` to its own cell, and atom's result and the cell are stored."""
    size = width(kind) // 8
    room = f".shared .align 8 .b8 room[{256 * size}];" if space == "shared" else ""
    cell = (
        f"mov.u64 %c, room; mad.wide.u32 %c, %t, {size}, %c; ld.global.b{8 * size} %v, [%p]; "
        f"st.shared.b{8 * size} [%c], %v;"
    )
    cell = cell if space == "shared" else "mov.u64 %c, %p;"
    return f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 o, .param .u64 r) {{
        {room} .reg .b64 %p, %q, %o, %r, %c; .reg .b32 %t; .reg .b{8 * size} %v, %b, %d, %e;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [a]; ld.param.u64 %q, [b]; ld.param.u64 %o, [o]; ld.param.u64 %r, [r];
        mad.wide.u32 %p, %t, {size}, %p; mad.wide.u32 %q, %t, {size}, %q; mad.wide.u32 %o, %t, {size}, %o;
        mad.wide.u32 %r, %t, {size}, %r;
        ld.global.b{8 * size} %b, [%q]; {cell} {instruction}
        ld.relaxed.gpu.{space}.b{8 * size} %e, [%c]; st.global.b{8 * size} [%o], %d; st.global.b{8 * size} [%r], %e;
        ret; }}"""


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("op", "kind"), ATOMS)
def test_atom_and_red(op, kind, space):
    a, b = samples(kind, 0), samples(kind, 1)
    want = [wrap(REFERENCE[op](x, y), kind) for x, y in zip(a, b, strict=True)]
    forms = [f"atom.{space}.{op}.{kind} %d, [%c], %b;", f"atom.acq_rel.gpu.{space}.{op}.{kind} %d, [%c], %b;"]
    if op != "exch":
        forms.append(f"mov.b{width(kind)} %d, %b; red.{space}.{op}.{kind} [%c], %b;")
    for form in forms:
        cells, old, new = from_ints(a, kind), from_ints(b, kind), from_ints(b, kind)
        run(atomic_kernel(kind, form, space), "k", 1, 256, 0, [cells, from_ints(b, kind), old, new])
        assert to_ints(new, kind) == want
        assert to_ints(old, kind) == (a if "atom" in form else b)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_compare_and_swap(kind):
    a = samples(kind, 0)
    b = [x if i % 2 else y for i, (x, y) in enumerate(zip(a, samples(kind, 1), strict=True))]
    cells, old, new = from_ints(a, kind), from_ints(a, kind), from_ints(a, kind)
    run(
        atomic_kernel(kind, f"atom.global.cas.{kind} %d, [%c], %b, 77;", "global"),
        "k",
        1,
        256,
        0,
        [cells, from_ints(b, kind), old, new],
    )
    assert to_ints(new, kind) == [77 if x == y else x for x, y in zip(a, b, strict=True)]
    assert to_ints(old, kind) == a


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
def test_float_atomics(kind):
    rng = torch.Generator().manual_seed(0)
    dtype = TORCH[kind.removesuffix("x2")]
    n = 256 * (2 if kind.endswith("x2") else 1)
    a, b = (torch.randn(n, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    cells, old, new = a.clone(), a.clone(), a.clone()
    noftz = "" if kind in ("f32", "f64") else ".noftz"
    run(
        atomic_kernel(kind, f"atom.global.add{noftz}.{kind} %d, [%c], %b;", "global"),
        "k",
        1,
        256,
        0,
        [cells, b, old, new],
    )
    assert torch.equal(new, (a + b).to(dtype))
    assert torch.equal(old, a)
    assert torch.equal(cells, new)


def test_vector_and_128_bit_atomics():
    text = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c) {{
        .reg .b64 %p, %q, %r; .reg .b32 %t; .reg .f32 %f<2>; .reg .b128 %x, %y, %z;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [a]; ld.param.u64 %q, [b]; ld.param.u64 %r, [c];
        red.global.add.v2.f32 [%p], {{1.0, 2.0}}; atom.global.v2.f32.add {{%f0, %f1}}, [%p], {{0.0, 0.0}};
        mad.wide.u32 %q, %t, 16, %q; mad.wide.u32 %r, %t, 16, %r;
        ld.global.b128 %x, [%q]; ld.global.b128 %y, [%r];
        atom.global.cas.b128 %z, [%q], %x, %y; st.global.b128 [%r], %z; ret; }}"""
    text = text.replace("atom.global.v2.f32.add", "atom.global.add.v2.f32")
    sums, cells, new = torch.zeros(2), torch.arange(64), torch.arange(100, 164)
    before = cells.clone(), new.clone()
    run(text, "k", 1, 32, 0, [sums, cells, new])
    assert sums.tolist() == [32.0, 64.0]
    assert torch.equal(cells, before[1])
    assert torch.equal(new, before[0])


def test_contended_atomics_count_every_thread():
    text = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b) {{
        .reg .b64 %p, %q; .reg .b32 %v, %t; ld.param.u64 %p, [a]; ld.param.u64 %q, [b];
        atom.global.add.u32 %v, [%p], 1; mad.wide.u32 %q, %v, 4, %q; mov.u32 %t, %ctaid.x; st.global.u32 [%q], %t;
        ret; }}"""
    counter, tickets = torch.zeros(1, dtype=torch.int32), torch.full((7 * 96,), -1, dtype=torch.int32)
    run(text, "k", 7, 96, 0, [counter, tickets], seed=3)
    assert counter == 7 * 96
    assert tickets.bincount().tolist() == [96] * 7


def test_views_of_one_storage_alias():
    """Two arguments that overlap are one piece of memory; disjoint views are two."""
    text = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b) {{
        .reg .b64 %p, %q; .reg .b32 %v; ld.param.u64 %p, [a]; ld.param.u64 %q, [b];
        st.global.b32 [%p+4], 42; ld.global.b32 %v, [%q]; st.global.b32 [%q+4], %v; ret; }}"""
    storage = torch.zeros(8, dtype=torch.int32)
    run(text, "k", 1, 1, 0, [storage[:4], storage[1:6]])
    assert storage.tolist() == [0, 42, 42, 0, 0, 0, 0, 0]
    with pytest.raises(PtxFault, match="out of range"):
        run(text, "k", 1, 1, 0, [storage[:1], storage[1:6]])
