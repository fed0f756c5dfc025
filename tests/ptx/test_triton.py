"""Matrix products that Triton compiles: pipelined, by pointers and by tensor descriptors, on sm_80 and sm_90."""

import pytest
import torch

from . import In, Out, PtxFault, compile_triton, run_compiled, run_triton, triton_launches

pytestmark = pytest.mark.needs("triton")


@pytest.fixture(scope="module")
def jit():
    import triton
    import triton.language as tl

    @triton.jit
    def by_pointers(a_ptr, b_ptr, c_ptr, m, n, k, lda, ldb, ldc, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        rows = tl.program_id(0) * M + tl.arange(0, M)
        cols = tl.program_id(1) * N + tl.arange(0, N)
        acc = tl.zeros((M, N), tl.float32)
        for start in range(0, k, K):
            inner = start + tl.arange(0, K)
            a_mask, b_mask = (rows[:, None] < m) & (inner[None, :] < k), (cols[None, :] < n) & (inner[:, None] < k)
            a = tl.load(a_ptr + rows[:, None] * lda + inner[None, :], mask=a_mask, other=0.0)
            b = tl.load(b_ptr + cols[None, :] * ldb + inner[:, None], mask=b_mask, other=0.0)
            acc = tl.dot(a, b, acc)
        c = tl.maximum(acc, 0).to(c_ptr.dtype.element_ty)
        tl.store(c_ptr + rows[:, None] * ldc + cols[None, :], c, mask=(rows[:, None] < m) & (cols[None, :] < n))

    @triton.jit
    def by_maps(a_ptr, b_ptr, c_ptr, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
        if T:  # both operands transposed in memory
            a_map = tl.make_tensor_descriptor(a_ptr, [k, m], [m, 1], [K, M])
            b_map = tl.make_tensor_descriptor(b_ptr, [k, n], [n, 1], [K, N])
        else:
            a_map = tl.make_tensor_descriptor(a_ptr, [m, k], [k, 1], [M, K])
            b_map = tl.make_tensor_descriptor(b_ptr, [n, k], [k, 1], [N, K])
        c_map = tl.make_tensor_descriptor(c_ptr, [m, n], [n, 1], [M, N])
        row, col = tl.program_id(0) * M, tl.program_id(1) * N
        acc = tl.zeros((M, N), tl.float32)
        for start in range(0, k, K):
            if T:
                acc = tl.dot(a_map.load([start, row]).T, b_map.load([start, col]), acc)
            else:
                acc = tl.dot(a_map.load([row, start]), b_map.load([col, start]).T, acc)
        c_map.store([row, col], tl.maximum(acc, 0).to(c_ptr.dtype.element_ty))

    @triton.jit
    def scaled(source, out_ptr, factor, M: tl.constexpr, N: tl.constexpr):
        tile = source.load([tl.program_id(0) * M, 0])
        place = (tl.program_id(0) * M + tl.arange(0, M))[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out_ptr + place, tile * factor)

    return {"by_pointers": by_pointers, "by_maps": by_maps, "scaled": scaled}


def operands(m, n, k, dtype, padding=0):
    torch.manual_seed(0)
    a = torch.randn(m, k + padding).to(dtype)[:, :k]
    b = torch.randn(n, k + padding).to(dtype)[:, :k]
    return a, b, torch.zeros(m, n, dtype=dtype)


def check(c, a, b):
    """Within a rounding of the output of the exact product, and of tf32 inputs where those are used."""
    want = (a.double() @ b.double().T).relu()
    result, inputs = {torch.bfloat16: (8, 18), torch.float16: (10, 18), torch.float32: (20, 8)}[c.dtype]
    scale = a.double().abs() @ b.double().abs().T
    assert ((c.double() - want).abs() <= 2.0**-result * want + 2.0**-inputs * scale).all()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(70, 100, 96), (129, 65, 250), (64, 64, 507)])
def test_product_by_pointers(jit, arch, dtype, shape):
    m, n, k = shape
    a, b, c = operands(m, n, k, dtype)
    args = [In(a), In(b), Out(c), m, n, k, a.stride(0), b.stride(0), c.stride(0)]
    run_triton(jit["by_pointers"], (-(-m // 64), -(-n // 64)), args, {"M": 64, "N": 64, "K": 32}, arch=arch, seed=1)
    check(c, a, b)


@pytest.mark.parametrize("arch", [80, 90])
def test_pipelined_copies(jit, arch):
    """Rows of a multiple of 16 bytes let Triton use cp.async; a stage less to wait for is caught."""
    a, b, c = operands(128, 128, 256, torch.float16)
    args = [In(a), In(b), Out(c), 128, 128, 256, 256, 256, 128]
    kernel = compile_triton(jit["by_pointers"], args, {"M": 64, "N": 64, "K": 32}, arch, num_stages=3)
    if "cp.async.wait_group" not in kernel.ptx:
        args[:2] = a, b  # masks of whole tiles keep the copies synchronous
    run_compiled(kernel, (2, 2), args)
    check(c, a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [(64, 64, 32), (128, 64, 64), (64, 128, 64), (64, 32, 128)])
def test_product_by_maps(jit, dtype, transposed, tile):
    """Tensor maps made by the kernel, copies through mbarriers, wgmma on swizzled tiles, the result stored by TMA."""
    m, n, k = 200, 136, 192
    a, b, c = operands(m, n, k, dtype)
    stored = (a.T.contiguous(), b.T.contiguous()) if transposed else (a, b)
    constants = {"M": tile[0], "N": tile[1], "K": tile[2], "T": transposed}
    grid = (-(-m // tile[0]), -(-n // tile[1]))
    kernel = compile_triton(jit["by_maps"], [*stored, c, m, n, k], constants, 90)
    assert "wgmma.mma_async" in kernel.ptx
    assert "cp.async.bulk.tensor" in kernel.ptx
    run_compiled(kernel, grid, [In(stored[0]), In(stored[1]), Out(c), m, n, k])
    check(c, a, b)


@pytest.mark.parametrize(
    ("removed", "kinds"),
    [
        (r"fence\.proxy\.async\.shared::cta;", {"missing fence.proxy.async"}),
        (r"wgmma\.fence\.sync\.aligned;", {"missing wgmma.fence"}),
        (r"wgmma\.wait_group\.sync\.aligned \d;", {"asynchronous operation not waited for"}),
        (r"@!complete bra\.uni waitLoop;", {"asynchronous operation not waited for"}),
        (
            r"bar\.sync\s+0;",
            {"race", "asynchronous operation not waited for", "invalid mbarrier", "uninitialised read"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_removed_synchronisation_is_caught(jit, removed, kinds):
    """Triton's own code with one kind of synchronisation taken out."""
    import re

    m, n, k = 128, 128, 192
    a, b, c = operands(m, n, k, torch.bfloat16)
    kernel = compile_triton(jit["by_maps"], [a, b, c, m, n, k], {"M": 64, "N": 64, "K": 64, "T": False}, 90)
    kernel.ptx, count = re.subn(removed, "", kernel.ptx)
    assert count, "the compiler no longer emits this"
    with pytest.raises(PtxFault) as caught:
        run_compiled(kernel, (2, 2), [In(a), In(b), Out(c), m, n, k])
    assert caught.value.kind in kinds, caught.value


@pytest.mark.parametrize("arch", [80, 90])
def test_descriptor_from_the_host(jit, arch):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = torch.randn(100, 64), torch.zeros(128, 64)
    source = TensorDescriptor.from_tensor(x, [32, 64])
    with triton_launches(arch) as reports:
        jit["scaled"][(4,)](source, out, 2.0, M=32, N=64)
    assert torch.equal(out, torch.cat([2 * x, torch.zeros(28, 64)]))
    assert len(reports) == 1
