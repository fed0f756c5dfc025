"""Kernels that this project did not write: liger-kernel's for Triton, nvcc's over the CUDA toolkit's headers."""

import pytest
import torch
import torch.nn.functional as F

from . import In, Out, PtxFault, compile_cuda, run, triton_launches

ARCHES = [80, 90]


def close(got, want, dtype=torch.float32):
    """Errors of a few roundings of the type at the size of the values."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (got.double() - want.double()).abs().max() <= tolerance * max(1.0, want.double().abs().max().item())


def leaf(*shape, dtype=torch.float32):
    """A leaf tensor, and its copy in float64 for the reference."""
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return x, x.detach().double().requires_grad_()


def backward_both(y, reference):
    g = torch.randn_like(y)
    y.backward(g.clone())
    reference.backward(g.double())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


liger = pytest.mark.needs("triton", "liger")


@liger
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "rows", "cols"), [(torch.float32, 40, 500), (torch.bfloat16, 9, 512), (torch.float16, 7, 255)]
)
def test_rms_norm(arch, dtype, rows, cols):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    (x, x2), (w, w2) = leaf(rows, cols, dtype=dtype), leaf(cols, dtype=dtype)
    with triton_launches(arch) as reports:
        y = LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "gemma", False)
        y2 = x2 * torch.rsqrt(x2.pow(2).mean(-1, keepdim=True) + 1e-6) * w2
        backward_both(y, y2)
    assert [r.kernel for r in reports] == ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]
    for got, want in ((y, y2), (x.grad, x2.grad), (w.grad, w2.grad)):
        close(got, want, dtype)


@liger
@pytest.mark.parametrize("arch", ARCHES)
def test_layer_norm(arch):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    (x, x2), (w, w2), (b, b2) = leaf(37, 300), leaf(300), leaf(300)
    with triton_launches(arch, seed=7):
        y = LigerLayerNormFunction.apply(x, w, b, 1e-6)
        y2 = F.layer_norm(x2, (300,), w2, b2, 1e-6)
        backward_both(y, y2)
    for got, want in ((y, y2), (x.grad, x2.grad), (w.grad, w2.grad), (b.grad, b2.grad)):
        close(got, want)


@liger
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("cols", [1000, 123])
def test_softmax(arch, cols):
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    x, x2 = leaf(17, cols)
    with triton_launches(arch):
        y = LigerSoftmaxFunction.apply(x)
        y2 = F.softmax(x2, -1)
        backward_both(y, y2)
    close(y, y2)
    close(x.grad, x2.grad)


@liger
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(arch, smoothing):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    x, x2 = leaf(23, 3000)
    target = torch.randint(0, 3000, (23,))
    target[3] = -100
    with triton_launches(arch):
        # the kernel writes the gradient over its input
        loss, *_ = LigerCrossEntropyFunction.apply(x.clone(), target, None, -100, 0.0, smoothing, "mean", None, False)
        loss.backward()
    want = F.cross_entropy(x2, target, ignore_index=-100, label_smoothing=smoothing)
    want.backward()
    close(loss, want)
    close(x.grad, x2.grad)


@liger
@pytest.mark.parametrize("arch", ARCHES)
def test_swiglu(arch):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    (a, a2), (b, b2) = leaf(19, 700), leaf(19, 700)
    with triton_launches(arch):
        c = LigerSiLUMulFunction.apply(a, b)
        c2 = F.silu(a2) * b2
        backward_both(c, c2)
    for got, want in ((c, c2), (a.grad, a2.grad), (b.grad, b2.grad)):
        close(got, want)


COOPERATIVE_GROUPS = r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
namespace cg = cooperative_groups;
// out = x / |x|; tickets[0] counts the threads of coalesced groups, tickets[1..] scans a tile
extern "C" __global__ void k(const float* x, float* partial, float* out, int n, int* tickets) {
  cg::grid_group grid = cg::this_grid();
  cg::thread_block block = cg::this_thread_block();
  auto warp = cg::tiled_partition<32>(block);
  __shared__ float sums[8];
  float s = 0;
  for (int i = grid.thread_rank(); i < n; i += grid.size()) s += x[i] * x[i];
  s = cg::reduce(warp, s, cg::plus<float>());
  if (warp.thread_rank() == 0) sums[warp.meta_group_rank()] = s;
  block.sync();
  if (block.thread_rank() == 0) {
    float t = 0;
    for (int i = 0; i < (int)warp.meta_group_size(); i++) t += sums[i];
    partial[blockIdx.x] = t;
  }
  grid.sync();
  float total = 0;
  for (int b = 0; b < (int)gridDim.x; b++) total += partial[b];
  for (int i = grid.thread_rank(); i < n; i += grid.size()) out[i] = x[i] * rsqrtf(total);
  auto tile = cg::tiled_partition<8>(warp);
  int scan = cg::inclusive_scan(tile, (int)tile.thread_rank(), cg::plus<int>());
  if (blockIdx.x == 0 && threadIdx.x < 32) tickets[1 + threadIdx.x] = scan;
  if (scan == 3) {
    auto active = cg::coalesced_threads();
    if (active.thread_rank() == 0) atomicAdd(tickets, active.size());
  }
}"""


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("seed", [0, 5])
def test_cooperative_groups(arch, seed):
    n = 5000
    x, out, tickets = torch.randn(n), torch.zeros(n), torch.zeros(33, dtype=torch.int32)
    args = [In(x), Out(torch.zeros(8)), Out(out), n, tickets]
    run(compile_cuda(COOPERATIVE_GROUPS, f"sm_{arch}"), "k", 8, 128, 0, args, cooperative=True, seed=seed)
    close(out, x / x.norm())
    assert tickets[0] == 8 * 128 // 8
    assert torch.equal(tickets[1:].long(), torch.arange(8).cumsum(0).repeat(4))


PIPELINE = r"""
#include <cooperative_groups.h>
#include <cuda/barrier>
#include <cuda/pipeline>
namespace cg = cooperative_groups;
extern "C" __global__ void k(const float* x, float* out, int tiles) {
  constexpr int kStages = 2;
  auto block = cg::this_thread_block();
  extern __shared__ float buffer[];
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, kStages> state;
  __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
  if (threadIdx.x == 0) init(&barrier, blockDim.x);
  auto pipe = cuda::make_pipeline(block, &state);
  block.sync();
  int n = blockDim.x;
  float sum = 0;
  for (int t = 0, fetch = 0; t < tiles; t++) {
    for (; fetch < tiles && fetch < t + kStages; fetch++) {
      pipe.producer_acquire();
      cuda::memcpy_async(block, buffer + (fetch % kStages) * n, x + fetch * n,
      cuda::aligned_size_t<16>(sizeof(float) * n), pipe);
      pipe.producer_commit();
    }
    pipe.consumer_wait();
    sum += buffer[(t % kStages) * n + (n - 1 - threadIdx.x)];
    pipe.consumer_release();
  }
  barrier.arrive_and_wait();
  buffer[threadIdx.x] = sum;
  auto token = barrier.arrive();
  barrier.wait(std::move(token));
  out[threadIdx.x] = buffer[(threadIdx.x + 1) % n];
}"""


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("arch", ARCHES)
def test_barrier_and_pipeline(arch):
    x, out = torch.randn(7, 128), torch.zeros(128)
    run(compile_cuda(PIPELINE, f"sm_{arch}"), "k", 1, 128, 2 * 128 * 4, [In(x), Out(out), 7])
    close(out, x.sum(0).flip(0).roll(-1))


WMMA = r"""
#include <cuda_bf16.h>
#include <mma.h>
using namespace nvcuda;
template <class T, class Layout, int M, int N, int K, class LayoutB>
__device__ void product(const T* a, int lda, const T* b, int ldb, float* c, int ldc, wmma::layout_t out) {
  wmma::fragment<wmma::matrix_a, M, N, K, T, Layout> fa;
  wmma::fragment<wmma::matrix_b, M, N, K, T, LayoutB> fb;
  wmma::fragment<wmma::accumulator, M, N, K, float> fc;
  wmma::fill_fragment(fc, 1.0f);
  wmma::load_matrix_sync(fa, a, lda);
  wmma::load_matrix_sync(fb, b, ldb);
  wmma::mma_sync(fc, fa, fb, fc);
  for (int i = 0; i < fc.num_elements; i++) fc.x[i] *= 2.0f;
  wmma::store_matrix_sync(c, fc, ldc, out);
}
extern "C" __global__ void k(const half* a, const half* b, float* c, const __nv_bfloat16* a2,
        const __nv_bfloat16* b2, float* c2) {
  __shared__ half staged[256];
  for (int i = threadIdx.x; i < 256; i += 32) staged[i] = a[i];
  __syncwarp();
  product<half, wmma::row_major, 16, 16, 16, wmma::col_major>(staged, 16, b, 16, c, 16, wmma::mem_row_major);
  product<__nv_bfloat16, wmma::col_major, 32, 8, 16, wmma::row_major>(a2, 32, b2, 8, c2, 32, wmma::mem_col_major);
}"""


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("arch", ARCHES)
def test_nvcuda_wmma(arch):
    a, b, a2, b2 = (
        torch.randn(16, 16).half(),
        torch.randn(16, 16).half(),
        torch.randn(16, 32).bfloat16(),
        torch.randn(16, 8).bfloat16(),
    )
    c, c2 = torch.zeros(16, 16), torch.zeros(8, 32)
    run(compile_cuda(WMMA, f"sm_{arch}"), "k", 1, 32, 0, [In(a), In(b), Out(c), In(a2), In(b2), Out(c2)])
    close(c, 2 * (a.float() @ b.float().T + 1))
    close(c2.T, 2 * (a2.float().T @ b2.float() + 1))


CUB = r"""
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
template <cub::BlockReduceAlgorithm Algorithm>
__device__ float sum(float v) {
  using Reduce = cub::BlockReduce<float, 128, Algorithm>;
  __shared__ typename Reduce::TempStorage storage;
  return Reduce(storage).Sum(v);
}
extern "C" __global__ void k(const float* x, const int* keys, float* sums, int* scanned, int* sorted) {
  using Scan = cub::BlockScan<int, 128>;
  using Sort = cub::BlockRadixSort<int, 128, 4>;
  __shared__ union { typename Scan::TempStorage scan; typename Sort::TempStorage sort; } storage;
  int i = blockIdx.x * 128 + threadIdx.x, items[4], before;
  float warps = sum<cub::BLOCK_REDUCE_WARP_REDUCTIONS>(x[i]), raking = sum<cub::BLOCK_REDUCE_RAKING>(x[i]);
  if (threadIdx.x == 0) sums[2 * blockIdx.x] = warps, sums[2 * blockIdx.x + 1] = raking;
  Scan(storage.scan).ExclusiveSum(keys[4 * i], before);
  scanned[i] = before;
  __syncthreads();
  for (int j = 0; j < 4; j++) items[j] = keys[4 * i + j];
  Sort(storage.sort).Sort(items);
  for (int j = 0; j < 4; j++) sorted[4 * i + j] = items[j];
}"""


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("arch", ARCHES)
def test_cub(arch):
    x, keys = torch.randn(3, 128), torch.randint(-1000, 1000, (3, 512), dtype=torch.int32)
    sums, scanned, ordered = (
        torch.zeros(3, 2),
        torch.zeros(3, 128, dtype=torch.int32),
        torch.zeros(3, 512, dtype=torch.int32),
    )
    run(compile_cuda(CUB, f"sm_{arch}"), "k", 3, 128, 0, [In(x), In(keys), Out(sums), Out(scanned), Out(ordered)])
    close(sums, x.sum(1, keepdim=True).expand(3, 2) + 0)
    assert torch.equal(scanned, (keys[:, ::4].cumsum(1) - keys[:, ::4]).int())
    assert torch.equal(ordered, keys.sort(1).values)


MATH = r"""
extern "C" __global__ void k(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  float f[] = {expf(v), logf(fabsf(v)), tanhf(v), sinf(v), cosf(v), erff(v), log1pf(fabsf(v)), cbrtf(v),
  sinf(v * 1e6f), float(exp(double(v)))};
  for (int j = 0; j < 10; j++) y[j * n + i] = f[j];
}"""


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("arch", ARCHES)
def test_libdevice_functions(arch):
    """The toolkit's own float functions, with their slow paths (range reduction through local memory)."""
    x = torch.linspace(-9, 9, 300)
    y = torch.zeros(10, 300)
    run(compile_cuda(MATH, f"sm_{arch}"), "k", 3, 128, 0, [In(x), Out(y), 300])
    d = x.double()
    far = torch.sin((x * 1e6).double())
    want = [
        d.exp(),
        d.abs().log(),
        d.tanh(),
        d.sin(),
        d.cos(),
        d.erf(),
        d.abs().log1p(),
        d.sign() * d.abs().pow(1 / 3),
        far,
        d.exp(),
    ]
    for got, exact in zip(y, want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


MESSAGE = r"""
#include <cuda/atomic>
extern "C" __global__ void k(float* data, int* flag, float* out) {
  cuda::atomic_ref<int, cuda::thread_scope_device> ready(*flag);
  if (blockIdx.x == 0) {
    data[threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) ready.store(1, STORE);
  } else {
    if (threadIdx.x == 0)
      while (ready.load(LOAD) == 0) __nanosleep(20);
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x] + 1;
  }
}"""


@pytest.mark.needs("nvcc")
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("orders", ["release acquire", "seq_cst seq_cst", "relaxed acquire", "release relaxed"])
def test_atomic_ref_passes_a_message(arch, orders):
    """Release and acquire order the data; with either relaxed it is a race, even if the values come out right."""
    store, load = (f"cuda::memory_order_{order}" for order in orders.split())
    text = compile_cuda(MESSAGE.replace("STORE", store).replace("LOAD", load), f"sm_{arch}")
    data, out = torch.zeros(64), torch.zeros(64)

    def go():
        run(text, "k", 2, 64, 0, [data, torch.zeros(1, dtype=torch.int32), Out(out)], cooperative=True)

    if "relaxed" in orders:
        with pytest.raises(PtxFault) as caught:
            go()
        assert caught.value.kind == "race"
    else:
        go()
        assert torch.equal(out, torch.arange(64.0) + 1)
