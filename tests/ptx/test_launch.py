"""Arguments, limits of the target, and what errors say."""

import struct

import pytest
import torch

from . import In, LaunchError, Out, PtxFault, Struct, TensorMap, Unsupported, compile_cuda, run
from .test_faults import kernel, launch


# -- arguments -------------------------------------------------------------------------------------------------------
def test_output_read_before_it_is_written():
    args = [Out(torch.zeros(256, dtype=torch.int32)), torch.zeros(256, dtype=torch.int32)]
    with pytest.raises(PtxFault) as caught:
        launch("ld.global.u32 %r4, [%p8];", args=args)
    assert caught.value.kind == "uninitialised read"
    launch("st.global.u32 [%p8], 1; ld.global.u32 %r4, [%p8];", args=args)


def test_unwritten_output_is_counted():
    out = torch.zeros(256, dtype=torch.int32)
    report = launch("st.global.u32 [%p8], 1;", args=[Out(out), torch.zeros(1)], block=192)
    assert {r.name: r.bytes_unwritten for r in report.regions}["argument 0 (a)"] == 256


def test_what_one_launch_wrote_is_there_in_the_next():
    out = Out(torch.zeros(256, dtype=torch.int32))
    launch("st.global.u32 [%p8], 7;", args=[out, torch.zeros(1)], block=192)
    report = launch("ld.global.u32 %r4, [%p8];", args=[out, torch.zeros(1)], block=192)
    assert {r.name: r.bytes_unwritten for r in report.regions}["argument 0 (a)"] == 256
    with pytest.raises(PtxFault) as caught:
        launch("ld.global.u32 %r4, [%p8];", args=[out, torch.zeros(1)], block=256)
    assert caught.value.kind == "uninitialised read"


def test_write_to_an_input():
    with pytest.raises(PtxFault) as caught:
        launch("st.global.u32 [%p8], 1;", args=[In(torch.zeros(256)), torch.zeros(1)])
    assert caught.value.kind == "write to read-only memory"


def test_padding_of_a_strided_view():
    """Bytes between the rows of a view belong to somebody else."""
    view = torch.zeros(8, 12, dtype=torch.int32)[:, :8]
    for body, caught in (
        ("st.global.u32 [%p0+32], 1;", True),
        ("ld.global.u32 %r4, [%p0+44];", True),
        ("st.global.u32 [%p0+48], 1;", False),
    ):
        if caught:
            with pytest.raises(PtxFault, match="between the rows of a strided view"):
                launch(body, args=[view, view[:1]], block=1)
        else:
            launch(body, args=[view, view[:1]], block=1)


def test_tensor_map_faults():
    source = torch.zeros(8, 32)
    body = """mov.u64 %p9, m; cvta.param.u64 %p9, %p9; @!%q0 bra END; mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 512;
        cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1+{to}], [%p9, {{0, 0}}], [%r1];
        {then} END:"""
    params = ("a", "b", ".param .align 64 .b8 m[128]")
    plain = [torch.zeros(64), torch.zeros(64)]

    def go(to=128, then="", box=(4, 32), swizzle=128):
        launch(body.format(to=to, then=then), args=[*plain, TensorMap(source, box, swizzle)], params=params)

    go()
    with pytest.raises(PtxFault, match="alignment 128"):
        go(to=64)
    with pytest.raises(PtxFault, match="swizzle"):
        go(swizzle=64)
    with pytest.raises(PtxFault, match="box dimension 1 is 300"):
        go(box=(300, 32))
    with pytest.raises(PtxFault) as caught:
        go(then="ld.shared.u32 %r4, [%r1+128];")
    assert caught.value.kind == "asynchronous operation not waited for"
    with pytest.raises(PtxFault) as caught:  # the barrier does not order the copy
        launch(
            body.format(to=128, then="") + "bar.sync 0; ld.shared.u32 %r4, [%r2+128];",
            args=[*plain, TensorMap(source, (4, 32))],
            params=params,
        )
    assert caught.value.kind == "asynchronous operation not waited for"


@pytest.mark.needs("nvcc")
def test_pointers_in_a_struct():
    source = """
struct Part { const float* x; float scale; float* y; };
extern "C" __global__ void k(const __grid_constant__ Part part) {
  part.y[threadIdx.x] = part.scale * part.x[threadIdx.x];
}"""
    x, y = torch.randn(32), torch.zeros(32)

    def go(out):
        data = bytes(8) + struct.pack("<f", 3) + bytes(12)
        return run(compile_cuda(source), "k", 1, 32, 0, [Struct(data, {0: In(x), 16: out})])

    report = go(Out(y))
    assert torch.equal(y, 3 * x)
    assert {r.name for r in report.regions} == {"argument 0 (k_param_0+0)", "argument 0 (k_param_0+16)"}
    with pytest.raises(PtxFault) as caught:
        go(y[:31])
    assert caught.value.kind == "out of range"
    with pytest.raises(LaunchError, match="gives 23"):
        run(compile_cuda(source), "k", 1, 32, 0, [Struct(bytes(23), {0: x})])


# -- limits ----------------------------------------------------------------------------------------------------------
LIMITS = [
    ("at most 1024", {"block": 1025}),
    ("at most 232448", {"dynamic": 232448}),
    ("at most 49152", {"static": 49153}),
    ("a cooperative grid of 9 blocks, but 1 multiprocessors hold 8", {"cooperative": True, "grid": 9, "sms": 1,
    "registers": 128}),
    ("hold 1 ", {"cooperative": True, "grid": 2, "sms": 1, "registers": 32, "dynamic": 120000}),
    ("takes 2 arguments, 1 given", {"args": [None]}),
    ("argument 0", {"args": [b"abc", None]}),
    ("requires", {"directive": ".reqntid 32, 1, 1"}),
    ("compiled for at most 32", {"directive": ".maxntid 32"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "case"), LIMITS, ids=[m for m, _ in LIMITS])
def test_launch_limits(message, case):
    text = kernel("", shared=case.get("static", 1024))
    if "directive" in case:
        text = text.replace(") { .shared", f") {case['directive']} {{ .shared")
    options = {k: case[k] for k in ("cooperative", "sms", "registers") if k in case}
    with pytest.raises(LaunchError, match=message):
        run(
            text,
            "k",
            case.get("grid", 1),
            case.get("block", 64),
            case.get("dynamic", 0),
            case.get("args", [torch.zeros(64), torch.zeros(64)]),
            **options,
        )


def test_registers_come_from_the_assembler():
    """A cooperative launch asks ptxas how many registers the compiled kernel has."""
    args = [torch.zeros(64), torch.zeros(64)]
    run(kernel(""), "k", 32, 64, 0, args, cooperative=True, sms=1)
    with pytest.raises(LaunchError, match=r"1 multiprocessors hold 32 \(\d+ registers a thread"):
        run(kernel(""), "k", 33, 64, 0, args, cooperative=True, sms=1)


# -- what is not implemented, and what is reported -------------------------------------------------------------------
@pytest.mark.parametrize(
    "instruction",
    [
        "tex.2d.v4.f32.f32 {%f0,%f1,%f2,%f3}, [a, {%f0,%f1}];", "add.rn.sat.oob.f32 %f0, %f1, %f2;",
        "ld.global.v3.u32 {%r4,%r5,%r6}, [%p0];",
        "vadd.s32.s32.s32 %r4, %r5, %r6;", "add.u8 %r4, %r5, %r6;",
        "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%r4,%r4,%r4,%r4}, {%r4,%r4,%r4,%r4}, {%r4,%r4}, "
        "{%r4,%r4,%r4,%r4};",
        "add.u32 %p0, %p1, 1;", "mapa.shared::cluster.u32 %r4, %r5, 0;", "mov.u32 %r4, %pm0;",
    ],
)  # fmt: skip
def test_unsupported_instructions_stop_with_their_line(instruction):
    text = kernel("\n" + instruction)
    line = text[: text.index(instruction)].count("\n") + 1
    with pytest.raises(Unsupported, match=f"line {line}: "):
        run(text, "k", 1, 32, 0, [torch.zeros(64), torch.zeros(64)])


@pytest.mark.needs("nvcc")
def test_fault_names_kernel_lines_block_and_thread():
    source = """
extern "C" __global__ void writes_beyond(float* x, int n) {
  int i = (blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  if (i <= n)
    x[i] = i;
}"""
    x = torch.zeros(100)
    with pytest.raises(PtxFault) as caught:
        run(compile_cuda(source), "writes_beyond", (2, 1), (8, 8), 0, [x, 100])
    fault = caught.value
    assert fault.kernel == "writes_beyond"
    assert (fault.block, fault.thread) == ((1, 0, 0), (4, 4, 0))
    assert fault.source.endswith("kernel.cu:5")
    assert fault.opcode.startswith("st.global")
    assert all(part in str(fault) for part in ("writes_beyond", "PTX line", "kernel.cu:5", "block", "thread"))


@pytest.mark.needs("nvcc")
def test_device_assertion():
    source = """
#include <cassert>
extern "C" __global__ void k(const int* x) { assert(x[threadIdx.x] < 40); }"""
    text = compile_cuda(source)
    run(text, "k", 1, 64, 0, [torch.zeros(64, dtype=torch.int32)])
    with pytest.raises(PtxFault) as caught:
        run(text, "k", 1, 64, 0, [torch.arange(64, dtype=torch.int32)])
    assert (caught.value.kind, caught.value.thread) == ("device assertion", (40, 0, 0))
