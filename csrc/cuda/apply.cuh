// A tile of the optimizer's step from a gradient that is there already.
#pragma once

#include "cuda/update.cuh"

namespace ffkernels::cuda {

template <typename T>
__device__ inline void apply_tile(const Layer& layer, int tile) {
  const int col_tiles = tiles(layer.depth), n0 = tile / col_tiles * kTile, k0 = tile % col_tiles * kTile;
  const int col = k0 + threadIdx.x % 16 * 4, count = min(max(layer.depth - col, 0), 4);
  const bool whole = count == 4 && fours_aligned<T>(layer) && aligned_for_four(layer.given_weight, 0, 4);
  const OptimizerStep step = begin_step(layer.optimizer);
#pragma unroll 1
  for (int n = n0 + threadIdx.x / 16; n < min(n0 + kTile, layer.cols); n += kEpilogueRows) {
    const int64_t at = static_cast<int64_t>(n) * layer.depth + col;
    float gradient[4];
    load_four(gradient, layer.given_weight + at, count, whole);
    if (count > 0) optimize_four<T>(layer, step, at, gradient, count, whole);
  }
  const int n = n0 + static_cast<int>(threadIdx.x);
  if (k0 == 0 && layer.given_bias && threadIdx.x < kTile && n < layer.cols) {
    optimize_bias<T>(layer, step, n, layer.given_bias[n]);
  }
}

}  // namespace ffkernels::cuda
