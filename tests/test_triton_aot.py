"""Triton kernels compiled for GPUs that are not there, their machine code read: `python -m ffkernels.triton.aot`."""

import importlib.util
import json

import pytest
import torch

from ffkernels.triton.tiles import DEVICES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

MATRIX = {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma.sync",
          "gfx942": "mfma"}  # fmt: skip
# which of the kinds of operands are multiplied by which instruction
OPCODES = {"bf16": ("BF16", "_bf16"), "fp16": (".F32", "_f16"), "tf32": ("TF32", "_xf32"), "medium": ("BF16", "_bf16")}


@pytest.fixture(scope="module")
def aot():
    from ffkernels.triton import aot

    return aot


OPERANDS = ("bf16", "fp16", "tf32", "medium", "exact")


@pytest.mark.slow
@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("arch", MATRIX)
def test_the_tables_configurations(aot, arch, operands):
    """All that the report has for them: aligned and ragged rows, plain and labelled steps, a network's layers."""
    found = aot.compile_variants(arch, [v for v in aot.variants(arch) if v.operands == operands])
    for c in found:
        what = f"{arch} {c.kernel} {c.variant}"
        assert c.code.spills == 0, what
        assert c.in_flight == 0, what
        assert c.scratch == 0, what
        assert c.code.registers <= (512 if arch == "gfx942" else 255), what
        assert c.shared <= DEVICES[arch].shared, what
        if c.kernel == "reduce_kernel":
            assert max(c.code.loads) == 16, what  # the bias and the loss are narrower
        if "forward" in c.kernel or "update" in c.kernel:
            check_product(arch, c, what)
    assert {c.kernel for c in found} >= {
        "forward_kernel",
        "update_kernel",
        "label_forward_kernel",
        "label_update_kernel",
    }


def check_product(arch, c, what):
    """Native matrix instructions, accesses as wide as rows allow, no division in the main loop."""
    code, operands = c.code, c.variant.operands
    exact = operands == "exact"
    if exact and arch != "gfx942":  # float32 on ordinary units: only AMD's multiply it exactly
        assert not code.matrix, what
    else:
        # a few tiles of an update are kept off wgmma (tiles.py), and so are the labels' narrow products
        beside = arch in ("sm_90", "sm_100") and ("update" in c.kernel or "label" in c.kernel)
        assert code.matrix.keys() <= {MATRIX[arch], "mma.sync"} if beside else {MATRIX[arch]}, what
        assert code.matrix, what
    if arch != "sm_100" and not exact:
        names = OPCODES[operands][arch == "gfx942"]
        assert all(names in opcode for opcode in code.matrix_opcodes), (what, code.matrix_opcodes)
    if c.variant.ragged:  # x and weight: 2 elements at a time, y 4
        item = 2 if operands in ("bf16", "fp16") else 4
        if c.kernel == "forward_kernel":
            assert max(code.loads) == 2 * item, (what, code.loads)
        else:
            assert max(code.loads) >= 4 * item or code.bulk_copies, (what, code.loads)
    else:
        assert code.loads.get(16, 0) + code.bulk_copies >= 4, what
        assert max(code.stores) == 16 or arch == "gfx942", what  # there a thread has 8 bytes of a row
    assert code.loop["products"] > 0, what
    if c.variant.op != "ff_grad":  # which makes a row's scale of its squared norm
        assert code.loop["divisions"] == code.loop["reciprocals"] == 0, what


# ---------------------------------------------------------------------------------------------------------------------
# The reader sees what it should: kernels made to have one of each


@pytest.fixture(scope="module")
def product():
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, m, n, k, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                DIVIDE: tl.constexpr):  # fmt: skip
        rows, cols = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
        acc = tl.zeros((M, N), tl.float32)
        for start in range(0, k, K):
            inner = start + tl.arange(0, K)
            if DIVIDE:
                inner = inner % (stride + start)  # by a fixed divisor it would be a product
            a = tl.load(a_ptr + rows[:, None] * stride + inner[None, :], mask=inner[None, :] < k, other=0.0)
            b = tl.load(b_ptr + cols[None, :] * stride + inner[:, None], mask=inner[:, None] < k, other=0.0)
            acc = tl.dot(a, b, acc)
        tl.store(c_ptr + rows[:, None] * n + cols[None, :], acc.to(tl.bfloat16))

    return product


def read(aot, product, arch, stride=512, divide=False, **options):
    x = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
    with aot.compiling(arch) as kernels:
        product[(1, 1)](x, x, x, 512, 512, 512, stride, M=128, N=128, K=32, DIVIDE=divide, **options)
    (kernel,) = kernels
    return aot._read(arch, [(None, kernel)])[0].code


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_the_reader_sees_each_fault(aot, product, arch):
    good = read(aot, product, arch, num_warps=8)
    assert good.spills == good.loop["divisions"] == 0
    assert set(good.matrix) == {MATRIX[arch]}
    assert max(good.loads) == 16
    assert max(read(aot, product, arch, stride=511, num_warps=8).loads) < 16  # rows that start anywhere
    assert read(aot, product, arch, divide=True, num_warps=8).loop["divisions"] > 0
    if arch == "sm_80":
        assert read(aot, product, arch, num_warps=8, maxnreg=64).spills > 0


def test_the_reader_sees_memory_that_a_launch_needs(aot):
    """As for a descriptor that the kernel makes itself."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(a, b, m, n):
        source = tl.make_tensor_descriptor(a, [m, n], [n, 1], [16, 64])
        rows, cols = tl.arange(0, 16), tl.arange(0, 64)
        tl.store(b + rows[:, None] * n + cols[None, :], source.load([0, 0]))

    x = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
    with aot.compiling("sm_90") as kernels:
        copy[(1,)](x, x, 512, 512)
    assert aot._read("sm_90", [(None, kernels[0])])[0].scratch > 0


def test_a_loop_is_what_every_way_leads_through():
    """An instruction a number: 2 to 5 are a loop, from which 3 goes to 8, out of line, where 9 leads back into it."""
    from ffkernels.triton.machine_code import _Jump, _loops

    waits = {3: _Jump(8, False), 7: _Jump(None, True), 8: _Jump(8, False), 9: _Jump(4, True)}
    assert _loops(10, {5: _Jump(2, False), **waits}) == [[2, 3, 4, 5, 8, 9], [8]]
    assert _loops(10, waits) == [[8]], "back to 4 alone is none: 4 is also come to from 3"
    nested = {4: _Jump(2, False), 6: _Jump(1, False)}
    assert sorted(_loops(8, nested)) == [[1, 2, 3, 4, 5, 6], [2, 3, 4]]
    assert _loops(4, {1: _Jump(None, True), 3: _Jump(2, True)}) == [], "nothing leads there"


def test_nothing_stays_behind(aot):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, driver._active
    with pytest.raises(RuntimeError, match="inside"), aot.compiling("sm_80"):
        raise RuntimeError("inside")
    assert before == (JITFunction.run, driver._active)


def test_every_kind_of_operand_and_tile_is_compiled(aot):
    from ffkernels.triton.tiles import candidates

    for arch in aot.ARCHS:
        found = aot.variants(arch)
        for operands, (_, _, kind) in aot.OPERANDS.items():
            cases = [("ff_step_", False)]
            if operands in aot.RAGGED_TOO:
                cases += [("ff_step_", True), ("ff_label_step_", False)]
            for op, ragged in cases:
                steps = [v for v in found if (v.op, v.operands, v.ragged) == (op, operands, ragged)]
                which = {"labelled": op == "ff_label_step_", "narrow": ragged}
                assert {v.tile for v in steps} == set(candidates(arch, kind, **which))
                assert {v.update_tile for v in steps} == set(candidates(arch, kind, True, **which))


@pytest.mark.slow
def test_the_command(aot, capsys, monkeypatch, tmp_path):
    small = aot.variants("gfx942")[-1:]
    monkeypatch.setattr(aot, "report", lambda *a: aot.compile_variants("gfx942", small))
    assert aot.main(["--arch", "gfx942", "--json", str(tmp_path / "report.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["arch", "kernel", "op", "operands"]
    assert lines[1].startswith("gfx942  label_forward_kernel")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content[0]["code"]["matrix"]["mfma"] > 0
    assert aot.main(["--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == content


@pytest.mark.parametrize("rows", [4096, 100_000])
@pytest.mark.parametrize(
    "op", ["ff_forward", "ff_step_", "ff_update_", "ff_grad", "ff_label_forward", "ff_label_step_"]
)
def test_the_plan_names_only_constants_that_its_kernels_take(op, rows):
    """Triton's JIT refuses others; its interpreter and the PTX tests, which bind arguments themselves, do not."""
    from ffkernels.triton import halves, plan
    from ffkernels.triton import rows as row_kernels

    kernels = vars(halves) | vars(row_kernels)
    labels = {"candidates": 2, "num_classes": 10} if "label" in op else {}
    for planned in plan.plan(op, plan.Layer(rows, 784, 500, **labels), "sm_80"):
        assert planned.constants.keys() <= set(kernels[planned.kernel].arg_names), planned.kernel


def test_usage_errors(aot, capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--arch", "sm_1"])
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--jobs", "0"])
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
