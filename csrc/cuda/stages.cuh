// The kernel: the stages of a network's training steps in one launch (params.h says which). No value depends on which
// block does what, so any grid gives the same bits.
#pragma once

#include "cuda/apply.cuh"

namespace ffkernels::cuda {

template <Math math>
__device__ inline void run_stages(const Params& params) {
  extern __shared__ __align__(256) unsigned char shared[];
  uint32_t* flag = reinterpret_cast<uint32_t*>(shared + shared_bytes(math) - 16);
  const Minibatches& minibatches = params.minibatches;
  const int steps = minibatches.end - minibatches.begin;
  for (int stage = params.stage_begin; stage < params.stage_end; ++stage) {
    if (stage > params.stage_begin) grid_barrier(params.workspace.words + kBarrierWords + stage % 2);
    // The minibatches that are on their way, the first one in the highest layer; their items are dealt to the blocks
    // one after the other.
    const int last = min(steps - 1, stage / kBehind);
    int next = blockIdx.x;
#pragma unroll 1
    for (int turn = max(0, (stage - params.layers + kBehind - 1) / kBehind); turn <= last; ++turn) {
      const int index = stage - kBehind * turn, minibatch = minibatches.begin + turn;
      int forward = 0, update = 0;
      bool given = false;
      if (index < params.layers) {
        const Layer& layer = params.layer[index];
        const int row_tiles = tiles(params.rows / candidates_of(params, index));
        given = layer.coef.data != nullptr;
        forward = layer.forward ? row_tiles * static_cast<int>(tiles(layer.cols)) : given ? row_tiles : 0;
      }
      if (index > 0 && params.layer[index - 1].update) {
        const Layer& layer = params.layer[index - 1];
        update = static_cast<int>(update_items(layer.cols, layer.depth, layer.splits));
      }
      for (; next < forward + update; next += gridDim.x) {
        __syncthreads();  // the item before is done with shared memory
        if (next >= forward) {
          const Layer& layer = params.layer[index - 1];
          if (layer.given_weight) {
            apply_tile<Element<math>>(layer, next - forward);
          } else {
            update_tile<math>(params, index - 1, minibatch, next - forward, shared, flag);
          }
        } else if (given) {
          given_rows<math>(params, index, next);
        } else {
          forward_tile<math>(params, index, minibatch, next, shared, flag);
        }
      }
      next -= forward + update;
    }
  }
  // The update reads the step counts until the last block is done.
  if (params.stage_end <= params.layers + kBehind * (steps - 1)) return;
  if (last_to_arrive(params.workspace.words + kLeftWord, gridDim.x, flag) && threadIdx.x < params.layers) {
    const Layer& layer = params.layer[threadIdx.x];
    if (layer.update && layer.optimizer.kind != OptimizerKind::store) {
      *layer.optimizer.step += static_cast<float>(steps);
    }
#pragma unroll
    for (int i = 0; i < kInTurn; ++i) params.workspace.words[kRangeWords + kInTurn * threadIdx.x + i] = 0;
  }
}

}  // namespace ffkernels::cuda

// 3 blocks a multiprocessor: the shared memory of sm_80 allows as many.
#define FFKERNELS_STAGES(math)                                                   \
  extern "C" __global__ void __launch_bounds__(ffkernels::cuda::kThreads, 3)     \
      ff_stages_##math(const __grid_constant__ ffkernels::cuda::Params params) { \
    ffkernels::cuda::run_stages<ffkernels::cuda::Math::math>(params);            \
  }
