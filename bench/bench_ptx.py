"""Speed of the PTX interpreter of the tests, in thread instructions a second on one core, all checks on.

pytest bench/bench_ptx.py -s    prints the rates; --benchmark-json keeps them as extra_info
"""

import ptx
import pytest
import torch

WANTED = 20e6  # thread instructions a second, in the kernels that are not dominated by tensor cores

ROWS = r"""
// Squared norms of rows, then the rows scaled: loads, shuffles, shared memory, barriers.
extern "C" __global__ void k(const float* x, float* y, int cols) {
  __shared__ float sums[4];
  const float* row = x + blockIdx.x * cols;
  float s = 0;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) s += row[i] * row[i];
  for (int step = 16; step; step /= 2) s += __shfl_xor_sync(~0u, s, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
  __syncthreads();
  s = sums[0] + sums[1] + sums[2] + sums[3];
  for (int i = threadIdx.x; i < cols; i += blockDim.x) y[blockIdx.x * cols + i] = row[i] * rsqrtf(s);
}"""

ARITHMETIC = r"""
extern "C" __global__ void k(float* x, int steps) {
  float v = x[threadIdx.x];
  for (int i = 0; i < steps; i++) v = v * 1.0001f + (i & 3 ? expf(-v * v) : 0.5f);
  x[threadIdx.x] = v;
}"""

SHARED = r"""
// A tiled product of square matrices through shared memory, without tensor cores.
extern "C" __global__ void k(const float* a, const float* b, float* c, int n) {
  __shared__ float ta[16][16], tb[16][16];
  int row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x;
  float sum = 0;
  for (int t = 0; t < n; t += 16) {
    ta[threadIdx.y][threadIdx.x] = a[row * n + t + threadIdx.x];
    tb[threadIdx.y][threadIdx.x] = b[(t + threadIdx.y) * n + col];
    __syncthreads();
    for (int i = 0; i < 16; i++) sum += ta[threadIdx.y][i] * tb[i][threadIdx.x];
    __syncthreads();
  }
  c[row * n + col] = sum;
}"""


def measure(benchmark, launch):
    report = launch()  # decodes
    benchmark.pedantic(launch, rounds=5, warmup_rounds=1)
    rate = report.thread_instructions / benchmark.stats.stats.median
    benchmark.extra_info["Mti_per_s"] = round(rate / 1e6, 1)
    benchmark.extra_info["gflop_per_s"] = round(report.tensor_flops / benchmark.stats.stats.median / 1e9, 2)
    print(
        f"\n{benchmark.name}: {rate / 1e6:.1f} M thread instructions/s, "
        f"{benchmark.extra_info['gflop_per_s']} tensor GFLOP/s"
    )
    return rate


def bench_rows(benchmark):
    x, y = torch.randn(64, 2000), torch.zeros(64, 2000)
    text = ptx.compile_cuda(ROWS)
    assert measure(benchmark, lambda: ptx.run(text, "k", 64, 128, 0, [ptx.In(x), ptx.Out(y), 2000])) >= WANTED


def bench_arithmetic(benchmark):
    x = torch.rand(256)
    text = ptx.compile_cuda(ARITHMETIC)
    assert measure(benchmark, lambda: ptx.run(text, "k", 1, 256, 0, [x, 2000])) >= WANTED


def bench_shared_memory_product(benchmark):
    n = 128
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.zeros(n, n)
    text = ptx.compile_cuda(SHARED)

    def launch():
        return ptx.run(text, "k", (n // 16, n // 16), (16, 16), 0, [ptx.In(a), ptx.In(b), ptx.Out(c), n])

    assert measure(benchmark, launch) >= WANTED


def _product():
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        rows, cols = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
        inner = tl.arange(0, K)
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, n, K):
            a = tl.load(a_ptr + rows[:, None] * n + (k + inner)[None, :])
            b = tl.load(b_ptr + (k + inner)[:, None] * n + cols[None, :])
            acc = tl.dot(a, b, acc)
        tl.store(c_ptr + rows[:, None] * n + cols[None, :], acc.to(tl.bfloat16))

    return product


@pytest.mark.parametrize("arch", [80, 90])
def bench_triton_product(benchmark, arch):
    """Dominated by tensor-core operations, a thousand times the work of an ordinary instruction: no rate is
    demanded.
    """
    n = 256
    a, b, c = (torch.randn(n, n).bfloat16() for _ in range(3))
    args = [ptx.In(a), ptx.In(b), ptx.Out(c), n]
    kernel = ptx.compile_triton(_product(), args, {"M": 64, "N": 64, "K": 32}, arch)
    measure(benchmark, lambda: ptx.run_compiled(kernel, (n // 64, n // 64), args))
    assert torch.allclose(c.float(), a.float() @ b.float(), atol=0.5, rtol=0.02)
