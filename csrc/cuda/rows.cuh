// What belongs to a row of a layer: its squared norm, its goodness and loss, and what the update multiplies it by.
#pragma once

#include "cuda/block.cuh"
#include "cuda/gemm.cuh"

namespace ffkernels::cuda {

// Vectors of M floats that a layer's rows leave for its update: u = 2 c r, 2 c, r, a.
enum RowVector { kScale, kCoef, kNorm, kTerm };

__device__ inline float* row_vector(const Params& params, int index, RowVector which) {
  return params.workspace.rows + static_cast<int64_t>(index % 2 * kRowVectors + which) * params.rows;
}
// The squared norms of the first layer's x where they are computed.
__device__ inline float* computed_sqnorm(const Params& params) {
  return params.workspace.rows + static_cast<int64_t>(2 * kRowVectors) * params.rows;
}

__device__ inline bool labelled(const Params& params, int index) { return index == 0 && params.labels.num_classes > 0; }
__device__ inline int candidates_of(const Params& params, int index) {
  return index == 0 ? params.labels.candidates : 1;
}
// The row of y for row b of x under candidate c.
__device__ inline int result_row(const Labels& labels, int rows, int b, int c) {
  return labels.separate ? c * rows + b : b * labels.candidates + c;
}
__device__ inline int label_of(const Labels& labels, int b, int c) {
  const int64_t at =
      labels.separate ? b * labels.row_stride[c] : b * labels.row_stride[0] + c * labels.candidate_stride;
  return static_cast<int>(labels.label[labels.separate ? c : 0][at]);
}

__device__ inline float row_sqnorm(const Params& params, int index, int m, int base_row) {
  const Layer& layer = params.layer[index];
  if (layer.normalize == Normalize::none) return 0.f;
  if (layer.x_sqnorm.data) return at(layer.x_sqnorm, m);
  const float q = computed_sqnorm(params)[base_row];
  return labelled(params, index) ? q + params.labels.strength * params.labels.strength : q;
}

// Leaves row m's terms for the update; returns how large its coefficients are.
__device__ inline float leave_row_terms(const Params& params, int index, int m, float c, float q) {
  const Layer& layer = params.layer[index];
  const float r = row_scale(layer, q), a = layer.row_term.data ? at(layer.row_term, m) : 0.f;
  row_vector(params, index, kScale)[m] = 2.f * c * r;
  row_vector(params, index, kCoef)[m] = 2.f * c;
  row_vector(params, index, kNorm)[m] = r;
  if (layer.row_term.data) row_vector(params, index, kTerm)[m] = a;
  return fmaxf(fabsf(2.f * c), fabsf(a));
}

// fp16 has a short range: the update multiplies all coefficients by a power of two that brings the largest below 1.
__device__ inline void leave_range(const Params& params, int index, float largest) {
  const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(largest));
  if (threadIdx.x % 32 == 0) atomicMax(params.workspace.words + kRangeWords + index, bits);
}
__device__ inline float range_factor(const Params& params, int index) {
  const uint32_t bits = params.workspace.words[kRangeWords + index];
  if (bits == 0 || bits >= 0x7f800000u) return 1.f;
  const int exponent = min(max(static_cast<int>(bits >> 23) - 126, -125), 126);
  return __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
}

// Rows of one tile, once all their columns are there: goodness, loss, and the terms for the update.
template <Math math>
__device__ inline void finish_rows(const Params& params, int index, int row_tile, float* scratch, uint32_t* flag) {
  const Layer& layer = params.layer[index];
  const int candidates = candidates_of(params, index), rows = params.rows / candidates, parts = tiles(layer.cols);
  float loss = 0.f, largest = 0.f;
  for (int i = threadIdx.x; i < kTile * candidates; i += kThreads) {
    const int b = row_tile * kTile + i % kTile, candidate = i / kTile;
    if (b >= rows) continue;
    const int m = candidates > 1 ? result_row(params.labels, rows, b, candidate) : b;
    float goodness = 0.f;
    for (int part = 0; part < parts; ++part) {
      goodness += params.workspace.partial[static_cast<int64_t>(part) * params.rows + m];
    }
    layer.goodness[m] = goodness;
    if (!layer.loss) continue;
    const float sign = layer.sign.data ? at(layer.sign, m) : candidate == 0 ? 1.f : -1.f;
    const RowLoss own = row_loss(layer, goodness, sign, params.rows);
    loss += own.loss;
    largest = fmaxf(largest, leave_row_terms(params, index, m, own.coef, row_sqnorm(params, index, m, b)));
  }
  if (!layer.loss) return;
  if constexpr (math == Math::fp16) leave_range(params, index, largest);
  const int row_tiles = tiles(rows);
  loss = block_sum(loss, scratch);
  float* partial = params.workspace.loss_partial;
  if (threadIdx.x == 0) partial[row_tile] = loss;
  if (!last_to_arrive(params.workspace.words + kDoneWord, row_tiles, flag)) return;
  loss = 0.f;
  for (int i = threadIdx.x; i < row_tiles; i += kThreads) loss += partial[i];
  loss = block_sum(loss, scratch);
  if (threadIdx.x == 0) *layer.loss = loss / static_cast<float>(params.rows);
}

// The same where the coefficients are given.
template <Math math>
__device__ inline void given_rows(const Params& params, int index, int row_tile) {
  using T = Element<math>;
  const Layer& layer = params.layer[index];
  const int first = row_tile * kTile;
  if (layer.normalize != Normalize::none && !layer.x_sqnorm.data) {
    const T* x = static_cast<const T*>(layer.x.data);
    for (int row = first + threadIdx.x / 32; row < min(first + kTile, params.rows); row += kThreads / 32) {
      float q = 0.f;
#pragma unroll 4
      for (int k = threadIdx.x % 32; k < layer.depth; k += 32) {
        const float v = to_float(x[row * layer.x.row_stride + k * layer.x.col_stride]);
        q = fmaf(v, v, q);
      }
      q = lanes_sum<32>(q);
      if (threadIdx.x % 32 == 0) computed_sqnorm(params)[row] = q;
    }
    __syncthreads();
  }
  float largest = 0.f;
  const int m = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kTile && m < params.rows) {
    largest = leave_row_terms(params, index, m, at(layer.coef, m), row_sqnorm(params, index, m, m));
  }
  if constexpr (math == Math::fp16) leave_range(params, index, largest);
}

}  // namespace ffkernels::cuda
