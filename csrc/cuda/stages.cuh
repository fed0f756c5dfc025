// The kernel: the stages of a network's training steps in one launch (params.h says which). No value depends on which
// block does what, so any grid gives the same bits.
#pragma once

#include "cuda/apply.cuh"

namespace ffkernels::cuda {

// What minibatch `turn` of a launch does in a stage.
struct Work {
  int index, minibatch, forward, update;  // the layer that it enters, which minibatch it is, and the numbers of items
  bool given;
};

__device__ inline Work work_of(const Params& params, int stage, int turn) {
  const int index = stage - kBehind * turn;
  Work work = {index, params.minibatches.begin + turn, 0, 0, false};
  if (index < params.layers) {
    const Layer& layer = params.layer[index];
    const int row_tiles = tiles(params.rows / candidates_of(params, index));
    work.given = layer.coef.data != nullptr;
    work.forward = layer.forward ? row_tiles * static_cast<int>(tiles(layer.cols)) : work.given ? row_tiles : 0;
  }
  if (index > 0 && params.layer[index - 1].update) {
    const Layer& layer = params.layer[index - 1];
    work.update = static_cast<int>(update_items(layer.cols, layer.depth, layer.splits));
  }
  return work;
}

// What the item is of that has number *item among those of all minibatches on their way, the first of which is in the
// highest layer, and its number there; nothing, if there are not so many.
__device__ inline Work find_item(const Params& params, int stage, int* item) {
  const int last = min(params.minibatches.end - params.minibatches.begin - 1, stage / kBehind);
#pragma unroll 1
  for (int turn = max(0, (stage - params.layers + kBehind - 1) / kBehind); turn <= last; ++turn) {
    const Work work = work_of(params, stage, turn);
    if (*item < work.forward + work.update) return work;
    *item -= work.forward + work.update;
  }
  return {};
}

template <Math math>
__device__ inline void run_item(const Params& params, const Work& work, int item, unsigned char* shared,
                                uint32_t* flag) {
  if (item >= work.forward) {
    const Layer& layer = params.layer[work.index - 1];
    if (layer.given_weight) {
      apply_tile<Element<math>>(layer, item - work.forward);
    } else {
      update_tile<math>(params, work.index - 1, work.minibatch, item - work.forward, shared, flag);
    }
  } else if (work.given) {
    given_rows<math>(params, work.index, item);
  } else {
    forward_tile<math>(params, work.index, work.minibatch, item, shared, flag);
  }
}

template <Math math>
__device__ inline void run_stages(const Params& params) {
  extern __shared__ __align__(256) unsigned char shared[];
  uint32_t* flag = reinterpret_cast<uint32_t*>(shared + shared_bytes(math) - 16);
  for (int stage = params.stage_begin; stage < params.stage_end; ++stage) {
    if (stage > params.stage_begin) grid_barrier(params.workspace.words + kBarrierWords + stage % 2);
    // Items are dealt to the blocks one after the other. Which minibatch one is of is found anew each time: `stage` and
    // `place` are all that takes registers while an item is worked on.
#pragma unroll 1
    for (int place = blockIdx.x;; place += gridDim.x) {
      int item = place;
      const Work work = find_item(params, stage, &item);
      if (work.forward + work.update == 0) break;
      __syncthreads();  // the item before is done with shared memory
      run_item<math>(params, work, item, shared, flag);
    }
  }
  // The update reads the step counts until the last block is done.
  const int steps = params.minibatches.end - params.minibatches.begin;
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
