// What the threads of a block, and the blocks of a grid, do together. All sums are added in a fixed order.
#pragma once

#include "cuda/params.h"
#include "cuda/ptx.cuh"

namespace ffkernels::cuda {

// The sum of `count` neighbouring lanes' values, in each of them.
template <int count>
__device__ inline float lanes_sum(float v) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

// The sum over the block, in every thread; scratch: a float a warp.
__device__ inline float block_sum(float v, float* scratch) {
  v = lanes_sum<32>(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += scratch[i];
  return sum;
}

// Counts the blocks that are done with a piece of work. True in all threads of the last of `blocks`: it sees what the
// others wrote before, and the counter is ready for its next use.
__device__ inline bool last_to_arrive(uint32_t* counter, uint32_t blocks, uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = add_ordered(counter, 1) == blocks - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  __syncthreads();
  return *flag != 0;
}

// Waits until all blocks of the grid have come here; each sees what the others wrote before. The word's top bit changes
// when the last one comes, and its other bits are then 0 again: block 0 adds what makes the sum a power of two.
// Barriers that follow each other take turns with two words: a block that still polls at one sees nothing of the next,
// so what lacks an order between two barriers gets none by chance, and the PTX interpreter finds it.
__device__ inline void grid_barrier(uint32_t* word) {
  constexpr uint32_t kTop = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = add_ordered(word, blockIdx.x == 0 ? kTop - (gridDim.x - 1) : 1);
    while (((load_ordered(word) ^ before) & kTop) == 0) __nanosleep(40);
  }
  __syncthreads();
}

}  // namespace ffkernels::cuda
