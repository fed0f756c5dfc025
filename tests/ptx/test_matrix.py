"""Fragments of mma, ldmatrix, stmatrix, movmatrix and wmma against plain matrix products (9.7.14)."""

import pytest
import torch

from . import Out, run
from .snippet import evaluate

HEAD = ".version 8.8\n.target sm_90\n.address_size 64\n"


def group(lane):
    return lane >> 2


def within(lane):
    return lane & 3


# Where element i of a lane's fragment of A and B lies, as the ISA's formulas for each shape say (9.7.14.5).
# name: (k, element bits, A(lane, i) -> row, column; B(lane, i) -> row)
def _a_two_rows(per):  # one block of columns
    return lambda n, i: (group(n) + 8 * (i >= per), within(n) * per + i % per)


def _a_four(per, step):  # two blocks of columns
    return lambda n, i: (group(n) + 8 * (i // per % 2), within(n) * per + i % per + step * (i >= 2 * per))


def _b(per, step):
    return lambda n, i: within(n) * per + i % per + step * (i // per)


LAYOUTS = {
    ("m16n8k8", 16): (_a_two_rows(2), _b(2, 8)),
    ("m16n8k16", 16): (_a_four(2, 8), _b(2, 8)),
    ("m16n8k4", 32): (_a_two_rows(1), _b(1, 4)),
    ("m16n8k8", 32): (_a_four(1, 4), _b(1, 4)),
    ("m16n8k16", 8): (_a_two_rows(4), _b(4, 16)),
    ("m16n8k32", 8): (_a_four(4, 16), _b(4, 16)),
    ("m16n8k32", 4): (_a_two_rows(8), _b(8, 32)),
    ("m16n8k64", 4): (_a_four(8, 32), _b(8, 32)),
}


def c_place(lane, i):
    return group(lane) + 8 * (i >= 2), within(lane) * 2 + (i & 1)


DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "s8": torch.int8, "u8": torch.uint8, "s4": torch.int8, "u4": torch.uint8,
}  # fmt: skip
RANGES = {"s8": (-128, 128), "u8": (0, 256), "s4": (-8, 8), "u4": (0, 16)}


def matrix(kind, rows, cols, seed):
    g = torch.Generator().manual_seed(seed)
    if kind in RANGES:
        return torch.randint(*RANGES[kind], (rows, cols), generator=g).to(DTYPES[kind])
    return torch.randn(rows, cols, generator=g).to(DTYPES[kind])


def element_bits(x, kind):
    """The elements as integers, as a fragment holds them."""
    size = {"f16": torch.int16, "bf16": torch.int16, "tf32": torch.int32}.get(kind, torch.int8)
    width = 4 if kind in ("s4", "u4") else 8 * x.element_size()
    return (x.contiguous().view(size).to(torch.int64) & ((1 << width) - 1)).tolist(), width


def fragments(table, place, per_lane):
    """32-bit registers, [register][lane]."""
    bits, width = table
    per = 32 // width
    out = []
    for r in range(per_lane // per):
        row = []
        for lane in range(32):
            word = 0
            for j in range(per):
                y, x = place(lane, r * per + j)
                word |= bits[y][x] << (j * width)
            row.append(word)
        out.append(torch.tensor(row, dtype=torch.int64).to(torch.int32).view(torch.uint32))
    return out


def regs(prefix, first, count):
    return "{" + ",".join(f"%{prefix}{first + i}" for i in range(count)) + "}"


CASES = [
    (s, t, t, acc) for s in ("m16n8k8", "m16n8k16") for t, acc in (("f16", "f32"), ("bf16", "f32"), ("f16", "f16"))
]
CASES += [("m16n8k4", "tf32", "tf32", "f32"), ("m16n8k8", "tf32", "tf32", "f32")]
CASES += [(s, a, b, "s32") for s in ("m16n8k16", "m16n8k32") for a in ("s8", "u8") for b in ("s8", "u8")]
CASES += [(s, a, b, "s32") for s in ("m16n8k32", "m16n8k64") for a in ("s4", "u4") for b in ("s4", "u4")]
CASES += [
    (s, a, b, acc)
    for s in ("m16n8k16", "m16n8k32")
    for a in ("e4m3", "e5m2")
    for b in ("e4m3", "e5m2")
    for acc in ("f32", "f16")
]


@pytest.mark.parametrize(("shape", "a_kind", "b_kind", "acc"), CASES, ids=lambda c: c)
def test_mma(shape, a_kind, b_kind, acc):
    k = int(shape.split("k")[1])
    a, b = matrix(a_kind, 16, k, 0), matrix(b_kind, k, 8, 1)
    width = element_bits(a, a_kind)[1]
    a_place, b_row = LAYOUTS[shape, width]
    a_regs = fragments(element_bits(a, a_kind), a_place, 16 * k // 32)
    b_regs = fragments(element_bits(b, b_kind), lambda n, i: (b_row(n, i), group(n)), k * 8 // 32)
    if acc == "s32":
        c = torch.randint(-1000, 1000, (16, 8), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    else:
        c = torch.randn(16, 8, generator=torch.Generator().manual_seed(2)).to(
            torch.float16 if acc == "f16" else torch.float32
        )
    order = [[c_place(lane, i) for lane in range(32)] for i in range(4)]
    c_rows = [torch.stack([c[y, x] for y, x in row]) for row in order]
    if acc == "f16":
        c_regs = [
            torch.stack(c_rows[2 * r : 2 * r + 2], 1).contiguous().view(torch.int32).view(torch.uint32).flatten()
            for r in range(2)
        ]
    else:
        c_regs = [row.view(torch.int32).view(torch.uint32) for row in c_rows]
    inputs = [("b32", t) for t in (*a_regs, *b_regs, *c_regs)]
    na, nb, nc = len(a_regs), len(b_regs), len(c_regs)
    text = (
        f"mma.sync.aligned.{shape}.row.col.{acc}.{a_kind}.{b_kind}.{acc} {regs('o', 0, nc)}, {regs('i', 0, na)}, "
        f"{regs('i', na, nb)}, {regs('i', na + nb, nc)};"
    )
    outs = evaluate(text, inputs, ["b32"] * nc, target="sm_90")
    dtype = {"s32": torch.int32, "f32": torch.float32, "f16": torch.float16}[acc]
    got = torch.zeros(16, 8, dtype=dtype)
    for i, row in enumerate(order):
        values = (
            outs[i // 2].view(torch.float16).view(-1, 2)[:, i % 2]
            if acc == "f16"
            else outs[i].view(torch.int32).view(dtype)
        )
        for lane, (y, x) in enumerate(row):
            got[y, x] = values[lane]
    if a_kind == "tf32":  # the lower 13 bits do not take part
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    want = a.double() @ b.double() + c.double()
    if acc == "s32":
        assert torch.equal(got.double(), want)
    else:
        error = 2.0**-20 if acc == "f32" else 2.0**-9
        scale = a.double().abs() @ b.double().abs() + c.double().abs()
        assert ((got.double() - want).abs() <= error * scale).all()


@pytest.mark.parametrize("shape", ["m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"])
def test_mma_f64(shape):
    rows, k = int(shape[1 : shape.index("n")]), int(shape.split("k")[1])
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, k), (k, 8), (rows, 8)))
    tall = rows == 16
    na, nb, nc = rows * k // 32, k // 4, rows // 4
    a_regs = [
        torch.stack(
            [a[group(n) + (8 * (i % 2) if tall else 0), within(n) + 4 * (i // 2 if tall else i)] for n in range(32)]
        )
        for i in range(na)
    ]
    b_regs = [torch.stack([b[within(n) + 4 * i, group(n)] for n in range(32)]) for i in range(nb)]
    place = lambda n, i: (group(n) + 8 * (i // 2), within(n) * 2 + i % 2)  # noqa: E731
    c_regs = [torch.stack([c[place(n, i)] for n in range(32)]) for i in range(nc)]
    inputs = [("f64", t) for t in (*a_regs, *b_regs, *c_regs)]
    sources = ", ".join(regs("i", first, n) for first, n in ((0, na), (na, nb), (na + nb, nc)))
    text = f"mma.sync.aligned.{shape}.row.col.f64.f64.f64.f64 {regs('o', 0, nc)}, {sources};"
    outs = evaluate(text, inputs, ["f64"] * nc, target="sm_90")
    want = a @ b + c
    for i, out in enumerate(outs):
        torch.testing.assert_close(out, torch.stack([want[place(n, i)] for n in range(32)]), rtol=1e-13, atol=1e-13)


def test_integer_saturation():
    """.satfinite clamps the sum to 32 bits; without it the sum wraps."""
    ones = torch.full((32,), 0x7F7F7F7F, dtype=torch.uint32)
    c = torch.full((32,), 0x7FFFFFFF, dtype=torch.uint32)
    for modifier, want in ((".satfinite", 0x7FFFFFFF), ("", (0x7FFFFFFF + 32 * 127 * 127) & 0xFFFFFFFF)):
        operands = "{%o0,%o1,%o2,%o3}, {%i0,%i0,%i0,%i0}, {%i0,%i0}, {%i1,%i1,%i1,%i1}"
        text = f"mma.sync.aligned.m16n8k32.row.col{modifier}.s32.s8.s8.s32 {operands};"
        assert set(evaluate(text, [("b32", ones), ("b32", c)], ["u32"] * 4)[3].tolist()) == {want}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count, trans):
    """Rows go where the lanes of each octet point; a lane gets two neighbours of its row, or of its column with
    .trans.
    """
    x = torch.arange(count * 64, dtype=torch.int16)
    tiles = x.view(count, 8, 8)
    rows = 8 * count
    # rows lie in shared memory in reverse order
    body = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c) {{
        .shared .align 16 .b8 room[{16 * rows}]; .shared .align 16 .b8 copy[{16 * rows}];
        .reg .b64 %p, %q, %r; .reg .b32 %t, %s, %u, %v<4>, %w<4>; .reg .pred %in;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [a]; ld.param.u64 %q, [b]; ld.param.u64 %r, [c];
        rem.u32 %u, %t, {rows}; mad.wide.u32 %p, %u, 16, %p; sub.u32 %s, {rows - 1}, %u; shl.b32 %s, %s, 4;
        setp.lt.u32 %in, %t, {rows};
        mov.u32 %w0, room; add.u32 %w0, %w0, %s; @%in ld.global.v4.b32 {{%v0,%v1,%v2,%v3}}, [%p];
        @%in st.shared.v4.b32 [%w0], {{%v0,%v1,%v2,%v3}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {regs("v", 0, count)}, [%w0];
        mov.u32 %w1, copy; mad.lo.u32 %w1, %u, 16, %w1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%w1], {regs("v", 0, count)};
        bar.warp.sync -1;
        mad.wide.u32 %q, %t, {4 * count}, %q; {"".join(f"st.global.b32 [%q+{4 * i}], %v{i};" for i in range(count))}
        mad.wide.u32 %r, %u, 16, %r; @%in ld.shared.v4.b32 {{%v0,%v1,%v2,%v3}}, [%w1];
        @%in st.global.v4.b32 [%r], {{%v0,%v1,%v2,%v3}}; ret; }}"""
    out, back = torch.zeros(32, count, 2, dtype=torch.int16), torch.zeros(rows, 8, dtype=torch.int16)
    run(body, "k", 1, 32, 0, [x, Out(out), Out(back)])
    for lane in range(32):
        for m in range(count):
            for j in range(2):
                y, z = lane // 4, lane % 4 * 2 + j
                assert out[lane, m, j] == (tiles[m, z, y] if trans else tiles[m, y, z])
    assert torch.equal(back.view(count, 8, 8), tiles)


def test_movmatrix():
    tile = torch.arange(64, dtype=torch.int16).view(8, 8)
    x = tile.contiguous().view(torch.int32).flatten().view(torch.uint32)
    (out,) = evaluate("movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i0;", [("b32", x)], ["b32"])
    assert torch.equal(out.view(torch.int16).view(8, 8), tile.T)


WMMA = [
    ("m16n16k16", "f16", "f32"),
    ("m16n16k16", "bf16", "f32"),
    ("m8n32k16", "f16", "f16"),
    ("m32n8k16", "bf16", "f32"),
    ("m16n16k8", "tf32", "f32"),
]
WMMA += [("m16n16k16", "s8", "s32"), ("m32n8k16", "u8", "s32"), ("m8n32k16", "s8", "s32"), ("m8n8k4", "f64", "f64")]


@pytest.mark.parametrize(("shape", "kind", "acc"), WMMA)
@pytest.mark.parametrize("layouts", [("row", "col", "row"), ("col", "row", "col")])
def test_wmma(shape, kind, acc, layouts):
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    m, n, k = int(m), int(n), int(k)
    from .decode_tensor import _WMMA_SHAPES

    na, nb = _WMMA_SHAPES[shape][kind]
    nc = {"f16": 4, "f32": 8, "s32": 8, "f64": 2}[acc]
    g = torch.Generator().manual_seed(0)
    accs = {"f16": torch.float16, "f32": torch.float32, "s32": torch.int32, "f64": torch.float64}
    if kind == "f64":
        a, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((m, k), (k, n)))
    else:
        a, b = matrix(kind, m, k, 3), matrix(kind, k, n, 4)
    if kind == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    c = (torch.randn(m, n, generator=g) * 10).to(accs[acc])
    d = torch.zeros(m, n, dtype=accs[acc])
    order = lambda x, layout: x.contiguous() if layout == "row" else x.T.contiguous()  # noqa: E731
    pitch = {
        "a": k if layouts[0] == "row" else m,
        "b": n if layouts[1] == "row" else k,
        "c": n if layouts[2] == "row" else m,
    }
    reg = "b64" if kind == "f64" else "b32"
    types = f"{acc}.{acc}" if kind == "f16" else f"{acc}.{kind}.{kind}.{acc}"
    rn = ".rn" if kind == "f64" else ""
    frag = lambda p, count: "{" + ",".join(f"%{p}{i}" for i in range(count)) + "}"  # noqa: E731
    text = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {{
        .reg .b64 %p<4>; .reg .{reg} %a<8>, %b<8>, %c<8>;
        ld.param.u64 %p0, [a]; ld.param.u64 %p1, [b]; ld.param.u64 %p2, [c]; ld.param.u64 %p3, [d];
        wmma.load.a.sync.aligned.{layouts[0]}.{shape}.global.{kind} {frag("a", na)}, [%p0], {pitch["a"]};
        wmma.load.b.sync.aligned.{layouts[1]}.{shape}.global.{kind} {frag("b", nb)}, [%p1], {pitch["b"]};
        wmma.load.c.sync.aligned.{layouts[2]}.{shape}.{acc} {frag("c", nc)}, [%p2], {pitch["c"]};
        wmma.mma.sync.aligned.{layouts[0]}.{layouts[1]}.{shape}{rn}.{types} {frag("c", nc)}, {frag("a", na)},
        {frag("b", nb)}, {frag("c", nc)};
        wmma.store.d.sync.aligned.{layouts[2]}.{shape}.global.{acc} [%p3], {frag("c", nc)}, {pitch["c"]}; ret; }}"""
    stored = order(d, layouts[2])
    run(text, "k", 1, 32, 0, [order(a, layouts[0]), order(b, layouts[1]), order(c, layouts[2]), Out(stored)])
    got = (stored if layouts[2] == "row" else stored.T).double()
    want = a.double() @ b.double() + c.double()
    tolerance = {"f16": 2.0**-9, "f32": 2.0**-20, "s32": 0.0, "f64": 2.0**-45}[acc]
    assert ((got - want).abs() <= tolerance * (a.double().abs() @ b.double().abs() + c.double().abs())).all()
