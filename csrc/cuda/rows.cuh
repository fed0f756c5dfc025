// What belongs to a row of a layer: its squared norm, its goodness and loss, and what the update multiplies it by.
#pragma once

#include "cuda/block.cuh"
#include "cuda/sums.cuh"

namespace ffkernels::cuda {

// Counters of the blocks that are done with a tile.
__device__ inline uint32_t* row_counters(const Params& params) { return params.workspace.words + kRowWords; }
__device__ inline uint32_t* weight_counters(const Params& params) {
  return row_counters(params) + tiles(params.layers > 1 ? params.rows : params.rows / params.labels.candidates);
}
__device__ inline uint32_t* column_counters(const Params& params) {
  int64_t most = 0;
  for (int i = 0; i < params.layers; ++i) most = max(most, tiles(params.layer[i].cols) * tiles(params.layer[i].depth));
  return weight_counters(params) + most;
}

// Vectors of M floats that a layer's rows leave for its update: u = 2 c r, 2 c, r, a.
enum RowVector { kScale, kCoef, kNorm, kTerm };

__device__ inline float* row_vector(const Params& params, int index, RowVector which) {
  return params.workspace.rows + static_cast<int64_t>(index % 2 * kRowVectors + which) * params.rows;
}
// The squared norms of the first layer's x where they are computed.
__device__ inline float* computed_sqnorm(const Params& params) {
  return params.workspace.rows + static_cast<int64_t>(2 * kRowVectors) * params.rows;
}

__device__ inline int widest(const Params& params) {
  int cols = 0;
  for (int i = 0; i < params.layers; ++i) cols = max(cols, params.layer[i].cols);
  return cols;
}
// What peer normalisation leaves for a layer's update, (N,) each: d and the new mean; and the sums by row tile.
struct PeerColumns {
  float *term, *mean, *sums;
};
__device__ inline PeerColumns peer_columns(const Params& params, int index) {
  const int64_t pitch = widest(params);
  float* columns = params.workspace.columns;
  return {columns + index % 2 * 2 * pitch, columns + (index % 2 * 2 + 1) * pitch, columns + 4 * pitch};
}
__device__ inline bool has_row_term(const Layer& layer) { return layer.row_term.data || layer.peer_mean; }

__device__ inline bool labelled(const Params& params, int index) { return index == 0 && params.labels.num_classes > 0; }
__device__ inline int candidates_of(const Params& params, int index) {
  return index == 0 ? params.labels.candidates : 1;
}
// The row of y for row b of x under candidate c.
__device__ inline int result_row(const Labels& labels, int rows, int b, int c) {
  return labels.separate ? c * rows + b : b * labels.candidates + c;
}
// Within range, whatever the tensor holds: nobody has looked at its values, and no access may leave the weight.
__device__ inline int label_of(const Labels& labels, int b, int c) {
  const int64_t at =
      labels.separate ? b * labels.row_stride[c] : b * labels.row_stride[0] + c * labels.candidate_stride;
  const int64_t label = labels.label[labels.separate ? c : 0][at];
  return static_cast<int>(label < 0 ? 0 : label < labels.num_classes ? label : labels.num_classes - 1);
}

__device__ inline float row_sqnorm(const Params& params, int index, int m, int base_row) {
  const Layer& layer = params.layer[index];
  if (layer.normalize == Normalize::none) return 0.f;
  if (layer.x_sqnorm.data) return at(layer.x_sqnorm, m);
  const float q = computed_sqnorm(params)[base_row];
  return labelled(params, index) ? q + params.labels.strength * params.labels.strength : q;
}

__device__ inline bool positive_row(const Params& params, const Layer& layer, int m) {
  return layer.sign.data ? at(layer.sign, m) > 0.f : m < params.positive_rows;
}

// Leaves row m's terms for the update; returns how large its coefficients are.
__device__ inline float leave_row_terms(const Params& params, int index, int m, bool positive, float c, float q) {
  const Layer& layer = params.layer[index];
  const float r = row_scale(layer, q);
  float a = 0.f;
  if (layer.row_term.data) a = at(layer.row_term, m);
  if (layer.peer_mean && positive) a = 2.f / (layer.divisor * static_cast<float>(params.rows));
  row_vector(params, index, kScale)[m] = 2.f * c * r;
  row_vector(params, index, kCoef)[m] = 2.f * c;
  row_vector(params, index, kNorm)[m] = r;
  if (has_row_term(layer)) row_vector(params, index, kTerm)[m] = a;
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

// Whether the next layer has dropout: then the forward pass makes that layer's input beside its own y.
__device__ inline bool drops_output(const Params& params, int index) {
  return index + 1 < kMaxLayers && params.layer[index + 1].dropout > 0.0;
}

// The sum of a row's shares in the column tiles.
__device__ inline float row_sum(const Params& params, int first, int count, int m) {
  const float* share = params.workspace.partial + static_cast<int64_t>(first) * params.rows + m;
  float sum = 0.f;
  for (int i = 0; i < count; ++i) sum += share[static_cast<int64_t>(i) * params.rows];
  return sum;
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
    const float goodness = row_sum(params, 0, parts, m);
    layer.goodness[m] = goodness;
    if (drops_output(params, index)) {
      const Vector& to = params.layer[index + 1].x_sqnorm;
      const_cast<float*>(to.data)[m * to.stride] = row_sum(params, parts, parts, m);
    }
    if (!layer.loss) continue;
    const bool positive = positive_row(params, layer, m);
    const RowLoss own = row_loss(layer, goodness, positive ? 1.f : -1.f, params.rows);
    loss += own.loss;
    const float q = row_sqnorm(params, index, m, b);
    largest = fmaxf(largest, leave_row_terms(params, index, m, positive, own.coef, q));
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

// Columns of one tile, once all their rows are there: d = lambda (m - mean(m)) of peer normalisation, and the new m.
__device__ inline void finish_columns(const Params& params, int index, int col_tile, float* scratch) {
  const Layer& layer = params.layer[index];
  const PeerColumns columns = peer_columns(params, index);
  const int rows = params.rows / candidates_of(params, index), row_tiles = tiles(rows);
  float sum = 0.f, count = 0.f;
  for (int n = threadIdx.x; n < layer.cols; n += kThreads) sum += layer.peer_mean[n];
  const float mean = block_sum(sum, scratch) / static_cast<float>(layer.cols);
  for (int m = threadIdx.x; m < rows; m += kThreads) count += positive_row(params, layer, m) ? 1.f : 0.f;
  count = block_sum(count, scratch);
  const int n = col_tile * kTile + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kTile || n >= layer.cols) return;
  sum = 0.f;
  for (int i = 0; i < row_tiles; ++i) sum += columns.sums[static_cast<int64_t>(i) * layer.cols + n];
  const float own = layer.peer_mean[n];
  columns.term[n] = layer.peer * (own - mean);
  columns.mean[n] = count > 0.f ? 0.9f * own + 0.1f * (sum / count) : own;
}

// Rows of one tile where the coefficients are given.
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
    largest = leave_row_terms(params, index, m, false, at(layer.coef, m), row_sqnorm(params, index, m, m));
  }
  if constexpr (math == Math::fp16) leave_range(params, index, largest);
}

}  // namespace ffkernels::cuda
