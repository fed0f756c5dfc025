"""cp.async, mbarrier, bulk copies and tensor maps (9.7.9, 9.7.13), and wgmma (9.7.15)."""

import itertools

import pytest
import torch

from . import Out, TensorMap, run

HEAD = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def kernel(params, body, shared=0, target="sm_90a"):
    listed = ", ".join(p if p.startswith(".") else f".param .u64 {p}" for p in params)
    room = f".shared .align 1024 .b8 room[{shared}];" if shared else ""
    return f"""{HEAD.replace("sm_90a", target)}.visible .entry k({listed}) {{ {room}
        .reg .b64 %p<16>; .reg .b32 %r<32>; .reg .f32 %f<8>; .reg .pred %q<8>; mov.u32 %r0, %tid.x; {body} ret; }}"""


def loads(*names):
    return "".join(f"ld.param.u64 %p{i}, [{n}];" for i, n in enumerate(names))


WAIT = "W{n}: mbarrier.try_wait.parity.shared::cta.b64 %q7, [{bar}], {parity}; @!%q7 bra W{n};"


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_sizes_and_zero_fill(size):
    """The bytes beyond the source size read as zero; ignore-src writes zeros alone; groups complete in order."""
    cache = "cg" if size == 16 else "ca"
    body = f"""{loads("a", "b", "n")} ld.param.u64 %p2, [n]; mad.wide.u32 %p2, %r0, 4, %p2; ld.global.u32 %r3, [%p2];
        mad.wide.u32 %p3, %r0, {size}, %p0; mov.u32 %r1, room; mad.lo.u32 %r2, %r0, {size}, %r1;
        cp.async.{cache}.shared.global [%r2], [%p3], {size}, %r3; cp.async.commit_group;
        setp.ge.u32 %q0, %r0, 16; cp.async.{cache}.shared.global.L2::128B [%r2+1024], [%p3], {size}, %q0;
        cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.u32 %r5, [%r2]; cp.async.wait_all; ld.shared.u32 %r6, [%r2+1024];
        mad.wide.u32 %p4, %r0, 8, %p1; st.global.v2.u32 [%p4], {{%r5, %r6}};"""
    x = torch.arange(1, 32 * size + 1, dtype=torch.uint8)
    valid = torch.arange(32, dtype=torch.int32) % (size + 1)
    out = torch.zeros(32, 2, dtype=torch.int32)
    run(kernel(["a", "b", "n"], body, 2048, "sm_80"), "k", 1, 32, 0, [x, Out(out), valid])
    source = x.view(32, size)[:, :4]
    kept = torch.where(torch.arange(4) < valid[:, None], source, torch.zeros_like(source))
    assert torch.equal(out[:, 0], kept.contiguous().view(torch.int32).flatten())
    whole = source.contiguous().view(torch.int32).flatten()
    assert torch.equal(out[:, 1], torch.where(torch.arange(32) >= 16, 0, whole))


def test_cp_async_completes_on_an_mbarrier():
    """cp.async.mbarrier.arrive.noinc: those who wait on the mbarrier see the copies of all warps."""
    body = f"""{loads("a", "b")} mov.u32 %r1, room; setp.eq.u32 %q0, %r0, 0;
    @%q0 mbarrier.init.shared.b64 [%r1], 64; bar.sync 0;
        mad.wide.u32 %p2, %r0, 16, %p0; mad.lo.u32 %r2, %r0, 16, %r1;
        cp.async.cg.shared.global [%r2+16], [%p2], 16; cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];
        {WAIT.format(n=0, bar="%r1", parity=0)}
        xor.b32 %r3, %r0, 33; mad.lo.u32 %r3, %r3, 16, %r1; ld.shared.u32 %r4, [%r3+16];
        mad.wide.u32 %p3, %r0, 4, %p1; st.global.u32 [%p3], %r4;"""
    x, out = torch.arange(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(kernel(["a", "b"], body, 2048, "sm_80"), "k", 1, 64, 0, [x, Out(out)])
    assert torch.equal(out, x.view(64, 4)[torch.arange(64) ^ 33, 0])


def test_mbarrier_phases():
    """arrive gives the phase's token, test_wait with it or with the parity; counts, drops and expect_tx as defined."""
    body = """mov.u32 %r1, room; ld.param.u64 %p0, [o]; mbarrier.init.shared.b64 [%r1], 3;
        mbarrier.arrive.noComplete.shared.b64 %p1, [%r1], 2; mbarrier.test_wait.shared.b64 %q0, [%r1], %p1;
        selp.b32 %r2, 1, 0, %q0;
        mbarrier.arrive.shared.b64 _, [%r1]; mbarrier.test_wait.shared.b64 %q0, [%r1], %p1; selp.b32 %r3, 1, 0, %q0;
        mbarrier.test_wait.parity.shared.b64 %q0, [%r1], 0; selp.b32 %r4, 1, 0, %q0;
        mbarrier.test_wait.parity.shared.b64 %q0, [%r1], 1; selp.b32 %r5, 1, 0, %q0;
        mbarrier.arrive_drop.shared.b64 %p2, [%r1]; mbarrier.arrive.shared.b64 %p2, [%r1], 2;
        mbarrier.test_wait.shared.b64 %q0, [%r1], %p2; selp.b32 %r6, 1, 0, %q0;
        mbarrier.arrive.shared.b64 %p3, [%r1], 2; mbarrier.try_wait.shared.b64 %q0, [%r1], %p3; selp.b32 %r7, 1, 0, %q0;
        mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 8; mbarrier.arrive.shared.b64 %p4, [%r1], 2;
        mbarrier.test_wait.shared.b64 %q0, [%r1], %p4; selp.b32 %r8, 1, 0, %q0;
        mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 8; mbarrier.test_wait.shared.b64 %q0, [%r1], %p4;
        selp.b32 %r9, 1, 0, %q0;
        mbarrier.inval.shared.b64 [%r1];
        st.global.v4.u32 [%p0], {%r2, %r3, %r4, %r5}; st.global.v4.u32 [%p0+16], {%r6, %r7, %r8, %r9};"""
    out = torch.zeros(8, dtype=torch.int32)
    run(kernel(["o"], body, 64), "k", 1, 1, 0, [Out(out)])
    assert out.tolist() == [0, 1, 1, 0, 1, 1, 0, 1]


def test_bulk_copies():
    """cp.async.bulk in, cp.async.bulk and cp.reduce.async.bulk out."""
    body = f"""{loads("a", "b", "c")} mov.u32 %r1, room; setp.eq.u32 %q0, %r0, 0; @!%q0 bra GO;
        mbarrier.init.shared::cta.b64 [%r1], 1; fence.proxy.async;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+128], [%p0], 256, [%r1];
        GO: bar.sync 0; {WAIT.format(n=0, bar="%r1", parity=0)}
        mad.lo.u32 %r2, %r0, 4, %r1; ld.shared.f32 %f0, [%r2+128]; add.f32 %f0, %f0, 0f3F800000;
        st.shared.f32 [%r2+128], %f0;
        fence.proxy.async; bar.sync 0; @!%q0 ret;
        cp.async.bulk.global.shared::cta.bulk_group [%p1], [%r1+128], 256;
        cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%p2], [%r1+128], 256;
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0;"""
    x, y, z = torch.randn(64), torch.zeros(64), torch.randn(64)
    total = z + (x + 1)
    run(kernel(["a", "b", "c"], body, 512), "k", 1, 64, 0, [x, Out(y), z])
    assert torch.equal(y, x + 1)
    assert torch.equal(z, total)


def swizzle(offset, span):
    """9.7.9, tensor copies: 16-byte chunks are exchanged within a pattern of 8 rows of 128 bytes."""
    return offset ^ (offset >> 7 & span // 16 - 1) << 4 if span else offset


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(
    ("shape", "box", "at"),
    [((9, 24), (8, 16), (0, 0)), ((9, 24), (8, 16), (5, 11)), ((3, 5, 32), (2, 4, 8), (2, -1, 28))],
)
def test_tensor_copies(span, shape, box, at):
    """Boxes that reach beyond the tensor: zeros come in, nothing goes out. Chunks lie where the swizzle puts them."""
    if span:
        box = (*box[:-1], min(box[-1], span // 2))
    rank = len(shape)
    x = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.int16).view(shape)
    out = torch.zeros_like(x)
    count = torch.Size(box).numel()
    image = torch.zeros(count, dtype=torch.int16)
    coords = "{" + ", ".join(str(c) for c in reversed(at)) + "}"
    body = f"""ld.param.u64 %p2, [image]; mov.u64 %p0, source; cvta.param.u64 %p0, %p0;
        mov.u64 %p1, target; cvta.param.u64 %p1, %p1; mov.u32 %r1, room;
    setp.eq.u32 %q0, %r0, 0; @!%q0 bra GO;
        prefetch.tensormap [%p0];
        mbarrier.init.shared::cta.b64 [%r1+8192], 1;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+8192], {2 * count};
        cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%p0,
        {coords}], [%r1+8192];
        GO: bar.sync 0; {WAIT.format(n=0, bar="%r1+8192", parity=0)}
        COPY: mad.lo.u32 %r2, %r0, 16, %r1; setp.ge.u32 %q1, %r0, {count // 8}; @%q1 bra END;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2]; mad.wide.u32 %p3, %r0, 16, %p2;
        st.global.v4.b32 [%p3], {{%r4, %r5, %r6, %r7}};
        END: @!%q0 ret;
        cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%p1, {coords}], [%r1];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    params = [".param .align 64 .b8 source[128]", ".param .align 64 .b8 target[128]", "image"]
    maps = [TensorMap(x, box, span), TensorMap(out, box, span, output=True)]
    run(kernel(params, body, 9216), "k", 1, 64, 0, [*maps, Out(image)])
    want_image, want_out = torch.zeros_like(image), torch.zeros_like(out)
    for offset, index in enumerate(itertools.product(*map(range, box))):
        where = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= w < s for w, s in zip(where, shape, strict=True)):
            want_image[swizzle(2 * offset, span) // 2] = x[where]
            want_out[where] = x[where]
    assert torch.equal(image, want_image)
    assert torch.equal(out, want_out)


def test_tensor_reduction():
    x = torch.ones(8, 32)
    body = """mov.u64 %p0, target; cvta.param.u64 %p0, %p0; mov.u32 %r1, room;
        cvt.rn.f32.u32 %f0, %r0; mad.lo.u32 %r2, %r0, 4, %r1;
    st.shared.f32 [%r2], %f0;
        fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %q0, %r0, 0; @!%q0 ret;
        cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%p0, {0, 1}], [%r1];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    run(kernel([".param .align 64 .b8 target[128]"], body, 1024), "k", 1, 128, 0, [TensorMap(x, (4, 32))])
    assert torch.equal(x[1:5].flatten(), 1 + torch.arange(128.0))
    assert (x[0] == 1).all()
    assert (x[5:] == 1).all()


def test_tensormap_replace():
    """A map built in shared memory, field by field, and published through global memory."""
    x, out = torch.arange(40.0).view(5, 8), torch.zeros(4, 4)
    scratch = torch.zeros(256, dtype=torch.uint8)[:128]
    fields = [
        ("global_address", "b64", "%p0"), ("rank", "b32", "1"), ("box_dim", "b32", "0, 4"), ("box_dim", "b32",
        "1, 4"), ("global_dim", "b32", "0, 8"),
        ("global_dim", "b32", "1, 5"), ("global_stride", "b64", "0, 32"), ("element_stride", "b32", "0, 1"),
        ("element_stride", "b32", "1, 1"),
        ("elemtype", "b32", "7"), ("interleave_layout", "b32", "0"), ("swizzle_mode", "b32", "0"), ("fill_mode",
        "b32", "0"),
    ]  # fmt: skip
    replaced = "".join(f"tensormap.replace.tile.{f}.shared::cta.b1024.{t} [%p3], {v};" for f, t, v in fields)
    body = f"""{loads("a", "b", "m")} mov.u32 %r1, room; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], 0;
    bar.warp.sync -1;
        cvt.u64.u32 %p3, %r1; setp.eq.u32 %q0, %r0, 0; @!%q0 bra MADE; {replaced} MADE: bar.warp.sync -1;
        tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%p2], [%p3], 128;
        fence.proxy.tensormap::generic.acquire.gpu [%p2], 128; @!%q0 bra GO;
        mbarrier.init.shared::cta.b64 [%r1+512], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+512], 64;
        cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1+256], [%p2, {{2, 3}}], [%r1+512];
        GO: bar.sync 0; {WAIT.format(n=0, bar="%r1+512", parity=0)} setp.lt.u32 %q1, %r0, 16; @!%q1 ret;
        mad.lo.u32 %r2, %r0, 4, %r1; ld.shared.f32 %f0, [%r2+256]; mad.wide.u32 %p4, %r0, 4, %p1;
        st.global.f32 [%p4], %f0;"""
    run(kernel(["a", "b", "m"], body, 1024), "k", 1, 32, 0, [x, Out(out), Out(scratch)])
    assert torch.equal(out, torch.cat([x[3:5, 2:6], torch.zeros(2, 4)]))


# -- wgmma -----------------------------------------------------------------------------------------------------------
DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "s8": torch.int8, "u8": torch.uint8,
}  # fmt: skip


def place(x, mn_major, span, base):
    """Shared-memory bytes of an operand (rows m or n, columns k) in the canonical layouts of 9.7.15.5, and its
    descriptor.

    Without swizzle a core matrix of 8 rows of 16 bytes is contiguous; with it, rows of `span` bytes are.
    """
    rows, k = x.shape
    size = x.element_size()
    per = 16 // size
    raw = x.contiguous().view(torch.uint8).view(rows, k, size)
    image = {}
    width = span or 16
    if mn_major:
        if span:
            leading, stride = k // 8 * 8 * width, 8 * width  # next `width` bytes of m or n; next 8 of k
        else:
            leading, stride = 128, k // 8 * 128  # next 8 of k; next 8 of m or n
    elif span:
        leading, stride = 16, 8 * width
    else:
        leading, stride = 128, k // per * 128
    for r in range(rows):
        for c in range(k):
            if mn_major:
                inner = r * size
                if span:
                    offset = inner // width * leading + c // 8 * stride + c % 8 * width + inner % width
                else:
                    offset = inner // 16 * stride + c // 8 * leading + c % 8 * 16 + inner % 16
            else:
                inner = c * size
                offset = r // 8 * stride + r % 8 * width + (inner if span else inner // 16 * leading + inner % 16)
            address = swizzle(base + offset, span)
            for j in range(size):
                image[address + j] = int(raw[r, c, j])
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    descriptor = base >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62
    return image, descriptor


def operand(kind, rows, k, seed):
    g = torch.Generator().manual_seed(seed)
    if kind in ("s8", "u8"):
        return torch.randint(-128 if kind == "s8" else 0, 128, (rows, k), generator=g).to(DTYPES[kind])
    x = torch.randn(rows, k, generator=g).to(DTYPES[kind])
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if kind == "tf32" else x


def a_fragment(a, per, k):
    """Registers of A: as the m16 fragments of mma, a warp for 16 rows."""
    raw = a.contiguous().view(torch.uint8).view(64, k, a.element_size())
    words = torch.zeros(128, 4, dtype=torch.int64)
    for t in range(128):
        warp, lane = divmod(t, 32)
        for r in range(4):
            row, col = 16 * warp + lane // 4 + 8 * (r % 2), r // 2 * 4 * per + lane % 4 * per
            data = bytes(raw[row, col : col + per].flatten().tolist())
            words[t, r] = int.from_bytes(data, "little")
    return words.to(torch.int32)


CASES = [
    (kind, kind, n, acc, source, ta, tb, span)
    for kind, accs in (("f16", ("f32", "f16")), ("bf16", ("f32",)))
    for acc in accs
    for n, source, ta, tb, span in (
        (8, "shared", 0, 0, 0), (64, "shared", 0, 0, 32), (128, "shared", 0, 0, 128), (64, "shared", 1, 1, 128),
        (32, "shared", 1, 0, 64),
        (16, "shared", 1, 1, 32), (64, "shared", 0, 1, 64), (8, "shared", 1, 1, 0), (256, "registers", 0, 1, 128),
        (24, "registers", 0, 0, 64),
    )
]  # fmt: skip
CASES += [("tf32", "tf32", 32, "f32", s, 0, 0, span) for s in ("shared", "registers") for span in (0, 32, 64, 128)]
CASES += [
    (a, b, 16, acc, "shared", 0, 0, 128) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for acc in ("f32", "f16")
]
CASES += [("e4m3", "e4m3", 8, "f32", "registers", 0, 0, 32)]
CASES += [(a, b, 16, "s32", s, 0, 0, 32) for a in ("s8", "u8") for b in ("s8", "u8") for s in ("shared", "registers")]


@pytest.mark.parametrize(("a_kind", "b_kind", "n", "acc", "source", "trans_a", "trans_b", "span"), CASES)
def test_wgmma(a_kind, b_kind, n, acc, source, trans_a, trans_b, span):
    """D = A B + D, then D = -A B + D, in all layouts of the operands."""
    k = {16: 16, 32: 8, 8: 32}[8 * torch.empty(0, dtype=DTYPES[a_kind]).element_size()]
    a, b = operand(a_kind, 64, k, 0), operand(b_kind, n, k, 1)
    if span and not trans_a and k * a.element_size() > span:
        pytest.fail("a case whose rows are longer than its swizzle")
    base_b = 16384
    image_a, descriptor_a = place(a, trans_a, span, 0)
    image_b, descriptor_b = place(b, trans_b, span, base_b)
    image = torch.zeros(49152, dtype=torch.uint8)
    for address, byte in (image_a | image_b).items():
        image[address] = byte
    regs = n // 4 if acc == "f16" else n // 2
    d = "{" + ",".join(f"%d{i}" for i in range(regs)) + "}"
    in_registers = source == "registers"
    operand_a = "{%r4,%r5,%r6,%r7}" if in_registers else "%p4"
    if acc == "s32":
        forms = [("", "%q2")]
    else:
        trans = ""
        if a_kind in ("f16", "bf16"):
            trans = f", {trans_b}" if in_registers else f", {trans_a}, {trans_b}"
        forms = [(f", 1, 1{trans}", "%q2"), (f", -1, 1{trans}", "%q1")]
    multiplies = "".join(
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{acc}.{a_kind}.{b_kind} {d}, {operand_a}, %p5, {scale}{tail};"
        for tail, scale in forms
    )
    body = f"""{loads("image", "out", "frag")} ld.param.u64 %p6, [frag]; mov.u32 %r1, room; .reg .b32 %d<{regs}>;
        mov.u32 %r2, %r0; FILL: mad.wide.u32 %p3, %r2, 16, %p0; ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%p3];
        mad.lo.u32 %r3, %r2, 16, %r1;
        st.shared.v4.b32 [%r3], {{%r4,%r5,%r6,%r7}}; add.u32 %r2, %r2, 128; setp.lt.u32 %q0, %r2, 3072; @%q0 bra FILL;
        fence.proxy.async; bar.sync 0; mov.u64 %p4, {descriptor_a}; mov.u64 %p5, {descriptor_b};
        mad.wide.u32 %p3, %r0, 16, %p6; ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%p3];
        setp.ne.u32 %q1, 1, 0; setp.eq.u32 %q2, 1, 0; wgmma.fence.sync.aligned;
        {multiplies} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %p3, %r0, {4 * regs}, %p1;
        {"".join(f"st.global.b32 [%p3+{4 * i}], %d{i};" for i in range(regs))}"""
    per = 4 // a.element_size()
    fragment = a_fragment(a, per, k)
    dtype = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[acc]
    out = torch.zeros(128, n // 2, dtype=dtype)
    text = kernel(["image", "out", "frag"], body, 49152)
    if len(forms) == 2:  # with the negated second product the sum is zero: drop it for the value, and check it after
        single = text.replace(multiplies, multiplies.split(";")[0] + ";")
        run(single, "k", 1, 128, 0, [image, Out(out), fragment])
        cancelled = torch.zeros_like(out)
        run(text, "k", 1, 128, 0, [image, Out(cancelled), fragment])
        scale = (a.double().abs() @ b.double().abs().T).max()
        assert cancelled.double().abs().max() <= 2.0 ** (-9 if acc == "f16" else -20) * scale
    else:
        run(text, "k", 1, 128, 0, [image, Out(out), fragment])
    got = torch.zeros(64, n, dtype=torch.float64)
    for t in range(128):
        warp, lane = divmod(t, 32)
        for e in range(n // 2):
            got[16 * warp + lane // 4 + 8 * (e // 2 % 2), e // 4 * 8 + lane % 4 * 2 + e % 2] = out[t, e]
    want = a.double() @ b.double().T
    tolerance = {"f32": 2.0**-20, "f16": 2.0**-9, "s32": 0.0}[acc]
    assert ((got - want).abs() <= tolerance * (a.double().abs() @ b.double().abs().T)).all()
