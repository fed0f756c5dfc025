"""Counters of a launch, against what can be counted by hand."""

import pytest
import torch

from . import Out, PtxFault, compile_cuda, kernels, run, run_triton
from .limits import blocks_per_sm, limits
from .report import classify, tensor_flops
from .snippet import evaluate, module
from .test_faults import kernel, launch

# one warp writes the first 4608 bytes of shared memory
FILL = (
    "mov.u32 %r9, 0; mov.u32 %r10, %r2; F: st.shared.u32 [%r10], %r9; add.u32 %r10, %r10, 128;"
    "setp.lt.u32 %q1, %r10, 4608; @%q1 bra F;"
)


def only(report, opcode):
    (line,) = [line for line in report.lines if line.opcode.startswith(opcode) and line.warps]
    return line


@pytest.mark.parametrize(
    ("stride", "size", "sectors"),
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (128, 4, 32), (0, 4, 1), (16, 16, 16), (2, 2, 2)],
)
def test_sectors(stride, size, sectors):
    """32-byte sectors of one warp's load, by the distance between lanes."""
    load = {2: "ld.global.u16 %h0", 4: "ld.global.u32 %r4", 16: "ld.global.v4.u32 {%r4,%r5,%r6,%r7}"}[size]
    report = launch(
        f"mad.wide.u32 %p8, %r0, {stride}, %p0; {load}, [%p8];", block=32, args=[torch.zeros(2048), torch.zeros(1)]
    )
    line = only(report, "ld.global")
    assert (line.sectors, line.bytes, line.threads, line.warps) == (sectors, 32 * size, 32, 1)
    assert report.global_sectors == sectors
    assert report.l2_unique_bytes == 32 * sectors


def test_sectors_count_once_in_any_order():
    """Lanes that alternate between two sectors touch two."""
    report = launch("and.b32 %r4, %r0, 1; mad.wide.u32 %p8, %r4, 32, %p0; ld.global.u32 %r5, [%p8];", block=32)
    assert only(report, "ld.global").sectors == 2


def test_unique_bytes_count_a_sector_once():
    report = launch("ld.global.u32 %r4, [%p8]; ld.global.u32 %r5, [%p8]; st.global.u32 [%p8], %r4;", block=64, grid=1)
    assert report.global_bytes == 3 * 256
    assert report.global_sectors == 3 * 8
    (region,) = [r for r in report.regions if r.name == "argument 0 (a)"]
    assert (region.bytes_read, region.bytes_written, region.bytes_touched) == (256, 256, 256)
    assert report.l2_unique_bytes == 512


@pytest.mark.parametrize(
    ("pattern", "size", "wavefronts", "ideal"),
    [
        ("shl.b32 %r4, %r0, 2;", 4, 1, 1),  # neighbours
        ("shl.b32 %r4, %r0, 3;", 4, 2, 1),  # every other word
        ("shl.b32 %r4, %r0, 7;", 4, 32, 1),  # one bank
        ("mov.u32 %r4, 0;", 4, 1, 1),  # one word for all
        ("mul.lo.u32 %r4, %r0, 132;", 4, 1, 1),  # padded rows
        ("shl.b32 %r4, %r0, 3;", 8, 2, 2),
        ("shl.b32 %r4, %r0, 4;", 16, 4, 4),
        ("shl.b32 %r4, %r0, 7;", 16, 32, 4),
        ("shl.b32 %r4, %r0, 1;", 2, 1, 1),  # two lanes share a word
    ],
)
def test_bank_conflicts(pattern, size, wavefronts, ideal):
    load = {
        2: "ld.shared.u16 %h0",
        4: "ld.shared.u32 %r5",
        8: "ld.shared.v2.u32 {%r5,%r6}",
        16: "ld.shared.v4.u32 {%r5,%r6,%r7,%r8}",
    }[size]
    report = launch(f"{FILL} bar.warp.sync -1; {pattern} add.u32 %r4, %r4, %r1; {load}, [%r4];", block=32, shared=8192)
    line = only(report, "ld.shared")
    assert (line.wavefronts, line.ideal_wavefronts) == (wavefronts, ideal)
    assert report.bank_conflicts == wavefronts - ideal
    assert [c.line for c in report.conflicts()] == ([line.line] if wavefronts > ideal else [])


@pytest.mark.parametrize(("pitch", "wavefronts"), [(16, 4), (128, 32), (144, 4), (80, 4), (32, 8)])
def test_ldmatrix_conflicts(pitch, wavefronts):
    """Eight rows of 16 bytes a phase: a pitch of 16 bytes more than a multiple of 32 is free of conflicts."""
    body = (
        f"{FILL} bar.warp.sync -1; mad.lo.u32 %r4, %r0, {pitch}, %r1;"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5,%r6,%r7,%r8}, [%r4];"
    )
    line = only(launch(body, block=32, shared=8192), "ldmatrix")
    assert (line.wavefronts, line.ideal_wavefronts, line.bytes) == (wavefronts, 4, 512)


def test_instructions_by_class_and_divergence():
    body = """setp.lt.u32 %q1, %r0, 7; @%q1 bra A; add.u32 %r4, %r0, 1; add.u32 %r4, %r4, 1;
    A: cvt.rn.f32.u32 %f0, %r0; add.f32 %f0, %f0, %f0;
        shfl.sync.idx.b32 %r5, %r0, 0, 31, -1; bar.sync 0; ex2.approx.f32 %f1, %f0;"""
    report = launch(body, block=64)
    by_opcode = {line.opcode: (line.warps, line.threads, line.divergent) for line in report.lines}
    assert by_opcode["bra"] == (2, 7, 1)
    assert by_opcode["add.u32"] == (2, 57, 0)
    assert by_opcode["add.f32"] == (2, 64, 0)
    classes = report.by_class
    assert {k: classes[k] for k in ("float", "warp", "synchronisation", "special function")} == {
        "float": 2, "warp": 2, "synchronisation": 2, "special function": 2,
    }  # fmt: skip
    assert report.thread_instructions == sum(line.threads for line in report.lines)
    text = str(report)
    assert "warp instructions" in text
    assert "k: grid (1, 1, 1), block (64, 1, 1)" in text


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "tensor"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16", "tensor"),
        ("wgmma.wait_group.sync.aligned", "synchronisation"), ("ld.global.v4.b32", "global memory"), ("ld.u32",
        "global memory"),
        ("cp.async.cg.shared.global", "global memory"), ("ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "shared memory"), ("atom.shared.add.u32", "shared memory"),
        ("st.local.u32", "local memory"), ("ld.param.u64", "constant memory"), ("bar.sync", "synchronisation"),
        ("mbarrier.arrive.shared.b64", "synchronisation"),
        ("vote.sync.any.pred", "warp"), ("bra.uni", "control"), ("cvt.rn.bf16.f32", "conversion"), ("selp.b32",
        "move"), ("rsqrt.approx.f32", "special function"),
        ("fma.rn.f32", "float"), ("max.bf16x2", "float"), ("mad.lo.s32", "integer"), ("and.b32", "integer"),
    ],
)  # fmt: skip
def test_classes(opcode, name):
    assert classify(opcode) == name


def test_tensor_flops():
    assert tensor_flops("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == 2 * 16 * 8 * 16
    assert 4 * tensor_flops("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 2 * 64 * 128 * 16
    assert tensor_flops("ldmatrix.sync.aligned.m8n8.x4.shared.b16") == 0


@pytest.mark.needs("triton")
@pytest.mark.parametrize("arch", [80, 90])
def test_triton_product_counts_its_work(arch):
    """A product of whole tiles: the flops are 2 n^3, and every byte of the operands is read."""
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        rows, cols = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, n, K):
            inner = k + tl.arange(0, K)
            a, b = (
                tl.load(a_ptr + rows[:, None] * n + inner[None, :]),
                tl.load(b_ptr + inner[:, None] * n + cols[None, :]),
            )
            acc = tl.dot(a, b, acc)
        tl.store(c_ptr + rows[:, None] * n + cols[None, :], acc)

    n = 128
    a, b, c = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16(), torch.zeros(n, n)
    report = run_triton(product, (2, 2), [a, b, Out(c), n], {"M": 64, "N": 64, "K": 64}, arch=arch)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-4, atol=1e-3)
    assert report.tensor_flops == 2 * n**3
    assert report.l2_unique_bytes == 2 * 2 * n * n + 4 * n * n
    assert report.by_class["tensor"] > 0


@pytest.mark.needs("nvcc")
def test_seeds_change_the_order_of_blocks():
    text = compile_cuda("__global__ void last(int* x) { x[0] = blockIdx.x; }")
    (name,) = kernels(text)
    first = set()
    for seed in range(6):
        with pytest.raises(PtxFault) as caught:  # the race is found whichever block comes first
            run(text, name, 4, 1, 0, [torch.zeros(1, dtype=torch.int32)], seed=seed)
        first.add(caught.value.block)
    assert len(first) > 1


def test_granules_follow_the_smallest_access():
    """Bytes written by different warps side by side are no race, whatever else the kernel loads."""
    body = """cvt.u16.u32 %h0, %i0; mov.u32 %t6, room; add.u32 %t4, %t0, %t6; st.shared.u8 [%t4], %h0; bar.sync 0;
        and.b32 %t5, %t0, 60; add.u32 %t5, %t5, %t6; ld.shared.u32 %o0, [%t5];"""
    x = torch.arange(64, dtype=torch.int32)
    (out,) = evaluate(body, [("s32", x)], ["s32"], block=64, declarations=".shared .align 4 .b8 room[64];")
    assert out.tolist() == [int.from_bytes(bytes(range(i & ~3, (i & ~3) + 4)), "little") for i in range(64)]


@pytest.mark.parametrize(
    ("arch", "threads", "shared", "regs", "blocks"),
    [
        (80, 128, 0, 32, 16),
        (80, 256, 0, 255, 1),
        (80, 1024, 0, 64, 1),
        (90, 128, 100 * 1024, 32, 2),
        (89, 128, 0, 16, 12),
        (80, 32, 0, 16, 32),
    ],
)
def test_occupancy(arch, threads, shared, regs, blocks):
    """By hand: 64 warps (48 on sm_89), 32 blocks, 65,536 registers, and 1 KiB of shared memory a block for the
    system.
    """
    assert blocks_per_sm(limits(arch), threads, shared, regs) == blocks


def test_kernels_are_found_by_name():
    text = module("", [], [], "sm_80")
    assert kernels(text) == ["k"]
    with pytest.raises(ValueError, match="no kernel 'missing' in this PTX; it has k"):
        run(text, "missing", 1, 1, 0, [])
    assert kernels(kernel("")) == ["k"]
