// The kernel: the stages of a network's training step in one launch (params.h says which). No value depends on which
// block does what, so any grid gives the same bits.
#pragma once

#include "cuda/apply.cuh"

namespace ffkernels::cuda {

template <Math math>
__device__ inline void run_stages(const Params& params) {
  extern __shared__ __align__(256) unsigned char shared[];
  uint32_t* flag = reinterpret_cast<uint32_t*>(shared + shared_bytes(math) - 16);
  for (int stage = params.stage_begin; stage < params.stage_end; ++stage) {
    if (stage > params.stage_begin) grid_barrier(params.workspace.words + kBarrierWords + stage % 2);
    int forward = 0, update = 0;
    bool given = false;
    if (stage < params.layers) {
      const Layer& layer = params.layer[stage];
      const int row_tiles = tiles(params.rows / candidates_of(params, stage));
      given = layer.coef.data != nullptr;
      forward = layer.forward ? row_tiles * static_cast<int>(tiles(layer.cols)) : given ? row_tiles : 0;
    }
    if (stage > 0 && params.layer[stage - 1].update) {
      const Layer& layer = params.layer[stage - 1];
      update = static_cast<int>(update_items(layer.cols, layer.depth, layer.splits));
    }
    for (int item = blockIdx.x; item < forward + update; item += gridDim.x) {
      __syncthreads();  // the item before is done with shared memory
      if (item >= forward) {
        const Layer& layer = params.layer[stage - 1];
        if (layer.given_weight) {
          apply_tile<Element<math>>(layer, item - forward);
        } else {
          update_tile<math>(params, stage - 1, item - forward, shared, flag);
        }
      } else if (given) {
        given_rows<math>(params, stage, item);
      } else {
        forward_tile<math>(params, stage, item, shared, flag);
      }
    }
  }
  // The update reads the step counts until the last block is done.
  if (params.stage_end <= params.layers) return;
  if (last_to_arrive(params.workspace.words + kLeftWord, gridDim.x, flag) && threadIdx.x < params.layers) {
    const Layer& layer = params.layer[threadIdx.x];
    if (layer.update && layer.optimizer.kind != OptimizerKind::store) *layer.optimizer.step += 1.f;
    params.workspace.words[kRangeWords + threadIdx.x] = 0;
  }
}

}  // namespace ffkernels::cuda

// 3 blocks a multiprocessor: the shared memory of sm_80 allows as many.
#define FFKERNELS_STAGES(math)                                                   \
  extern "C" __global__ void __launch_bounds__(ffkernels::cuda::kThreads, 3)     \
      ff_stages_##math(const __grid_constant__ ffkernels::cuda::Params params) { \
    ffkernels::cuda::run_stages<ffkernels::cuda::Math::math>(params);            \
  }
