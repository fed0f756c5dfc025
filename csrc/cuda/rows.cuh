// What belongs to a row of a layer: its squared norm, its goodness and loss, and what the update multiplies it by.
#pragma once

#include "cuda/block.cuh"
#include "cuda/sums.cuh"

namespace ffkernels::cuda {

// Counters of the blocks that are done with a tile of the layer.
__device__ inline uint32_t* row_counters(const Params& params, int index) {
  const Workspace& own = params.workspace;
  return own.words + kRowWords + index * counter_count(own.row_tiles, own.weight_tiles);
}
__device__ inline uint32_t* weight_counters(const Params& params, int index) {
  return row_counters(params, index) + params.workspace.row_tiles;
}
__device__ inline uint32_t* column_counters(const Params& params, int index) {
  return weight_counters(params, index) + params.workspace.weight_tiles;
}

// Vectors of M floats that a layer's rows leave for its update: u = 2 c r, 2 c, r, a.
enum RowVector { kScale, kCoef, kNorm, kTerm };

__device__ inline float* row_vector(const Params& params, int index, RowVector which) {
  return params.workspace.rows + static_cast<int64_t>(index * kRowVectors + which) * params.rows;
}
// The squared norms of the first layer's x where they are computed.
__device__ inline float* computed_sqnorm(const Params& params) {
  return params.workspace.rows + static_cast<int64_t>(params.layers * kRowVectors) * params.rows;
}

// What peer normalisation leaves for a layer's update, (N,) each: d and the new mean; and the sums by row tile.
struct PeerColumns {
  float *term, *mean, *sums;
};
__device__ inline PeerColumns peer_columns(const Params& params, int index) {
  const Workspace& own = params.workspace;
  float* columns = own.columns + index * column_count(own.row_tiles, own.widest);
  return {columns, columns + own.widest, columns + 2 * own.widest};
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
__device__ inline int label_of(const Labels& labels, int minibatch, int b, int c) {
  const int array = labels.separate ? c : 0;
  const int64_t at = minibatch * labels.minibatch_stride[array] + b * labels.row_stride[array] +
                     (labels.separate ? 0 : c * labels.candidate_stride);
  const int64_t label = labels.label[array][at];
  return static_cast<int>(label < 0 ? 0 : label < labels.num_classes ? label : labels.num_classes - 1);
}

// x (or y) of a minibatch: of the network's own x there are as many as minibatches, of what layers hand on kInTurn.
template <typename T>
__device__ inline Matrix of_minibatch(Matrix m, int64_t stride, int turn) {
  m.data = static_cast<const T*>(m.data) + turn * stride;
  return m;
}
template <typename T>
__device__ inline Matrix input_of(const Layer& layer, int minibatch) {
  return of_minibatch<T>(layer.x, layer.x_minibatch, layer.layer_index == 0 ? minibatch : minibatch % kInTurn);
}

__device__ inline float row_sqnorm(const Params& params, int index, int minibatch, int m, int base_row) {
  const Layer& layer = params.layer[index];
  if (layer.normalize == Normalize::none) return 0.f;
  if (layer.x_sqnorm.data) return at(layer.x_sqnorm, m, minibatch * layer.x_sqnorm_minibatch);
  const float q = computed_sqnorm(params)[base_row];
  return labelled(params, index) ? q + params.labels.strength * params.labels.strength : q;
}

__device__ inline bool positive_row(const Params& params, const Layer& layer, int minibatch, int m) {
  return layer.sign.data ? at(layer.sign, m, minibatch * params.minibatches.sign) > 0.f : m < params.positive_rows;
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

// fp16 has a short range: the update multiplies all coefficients by a power of two that brings the largest below 1. The
// next minibatch has another word: when it writes there, this one's has been read.
__device__ inline uint32_t* range_word(const Params& params, int index, int minibatch) {
  return params.workspace.words + kRangeWords + kInTurn * index + minibatch % kInTurn;
}
__device__ inline void leave_range(const Params& params, int index, int minibatch, float largest) {
  const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(largest));
  if (threadIdx.x % 32 == 0) atomicMax(range_word(params, index, minibatch), bits);
}
__device__ inline float range_factor(const Params& params, int index, int minibatch) {
  const uint32_t bits = *range_word(params, index, minibatch);
  if (bits == 0 || bits >= 0x7f800000u) return 1.f;
  const int exponent = min(max(static_cast<int>(bits >> 23) - 126, -125), 126);
  return __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
}

// Whether the next layer has dropout: then the forward pass makes that layer's input beside its own y.
__device__ inline bool drops_output(const Params& params, int index) {
  return index + 1 < kMaxLayers && params.layer[index + 1].dropout > 0.0;
}

// The shares of a layer's rows in the goodness, (column tiles, M); behind them those of its dropped outputs.
__device__ inline float* shares_of(const Params& params, int index) {
  return params.workspace.partial + index * partial_count(params.rows, params.workspace.widest);
}
// The sum of a row's shares in the column tiles.
__device__ inline float row_sum(const Params& params, int index, int first, int count, int m) {
  const float* share = shares_of(params, index) + static_cast<int64_t>(first) * params.rows + m;
  float sum = 0.f;
  for (int i = 0; i < count; ++i) sum += share[static_cast<int64_t>(i) * params.rows];
  return sum;
}

// Rows of one tile, once all their columns are there: goodness, loss, and the terms for the update.
template <Math math>
__device__ inline void finish_rows(const Params& params, int index, int minibatch, int row_tile, float* scratch,
                                   uint32_t* flag) {
  const Layer& layer = params.layer[index];
  const int candidates = candidates_of(params, index), rows = params.rows / candidates, parts = tiles(layer.cols);
  float loss = 0.f, largest = 0.f;
  for (int i = threadIdx.x; i < kTile * candidates; i += kThreads) {
    const int b = row_tile * kTile + i % kTile, candidate = i / kTile;
    if (b >= rows) continue;
    const int m = candidates > 1 ? result_row(params.labels, rows, b, candidate) : b;
    const float goodness = row_sum(params, index, 0, parts, m);
    layer.goodness[minibatch * params.minibatches.goodness + m] = goodness;
    if (drops_output(params, index)) {  // which has one vector for all minibatches
      const Vector& to = params.layer[index + 1].x_sqnorm;
      const_cast<float*>(to.data)[m * to.stride] = row_sum(params, index, parts, parts, m);
    }
    if (!layer.loss) continue;
    const bool positive = positive_row(params, layer, minibatch, m);
    const RowLoss own = row_loss(layer, goodness, positive ? 1.f : -1.f, params.rows);
    loss += own.loss;
    const float q = row_sqnorm(params, index, minibatch, m, b);
    largest = fmaxf(largest, leave_row_terms(params, index, m, positive, own.coef, q));
  }
  if (!layer.loss) return;
  if constexpr (math == Math::fp16) leave_range(params, index, minibatch, largest);
  const int row_tiles = tiles(rows);
  loss = block_sum(loss, scratch);
  float* partial = params.workspace.loss_partial + index * params.workspace.row_tiles;
  if (threadIdx.x == 0) partial[row_tile] = loss;
  if (!last_to_arrive(params.workspace.words + kDoneWords + index, row_tiles, flag)) return;
  if (math == Math::fp16 && threadIdx.x == 0) *range_word(params, index, minibatch + 1) = 0;
  loss = 0.f;
  for (int i = threadIdx.x; i < row_tiles; i += kThreads) loss += partial[i];
  loss = block_sum(loss, scratch);
  if (threadIdx.x == 0) {
    layer.loss[minibatch * params.minibatches.loss] = loss / static_cast<float>(params.rows);
  }
}

// Columns of one tile, once all their rows are there: d = lambda (m - mean(m)) of peer normalisation, and the new m.
__device__ inline void finish_columns(const Params& params, int index, int minibatch, int col_tile, float* scratch) {
  const Layer& layer = params.layer[index];
  const PeerColumns columns = peer_columns(params, index);
  const int rows = params.rows / candidates_of(params, index), row_tiles = tiles(rows);
  float sum = 0.f, count = 0.f;
  for (int n = threadIdx.x; n < layer.cols; n += kThreads) sum += layer.peer_mean[n];
  const float mean = block_sum(sum, scratch) / static_cast<float>(layer.cols);
  for (int m = threadIdx.x; m < rows; m += kThreads) count += positive_row(params, layer, minibatch, m) ? 1.f : 0.f;
  count = block_sum(count, scratch);
  const int n = col_tile * kTile + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kTile || n >= layer.cols) return;
  sum = 0.f;
  for (int i = 0; i < row_tiles; ++i) sum += columns.sums[static_cast<int64_t>(i) * layer.cols + n];
  const float own = layer.peer_mean[n];
  columns.term[n] = layer.peer * (own - mean);
  columns.mean[n] = count > 0.f ? 0.9f * own + 0.1f * (sum / count) : own;
}

// Rows of one tile where the coefficients are given: of the one minibatch there is.
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
    largest = leave_row_terms(params, index, m, false, at(layer.coef, m), row_sqnorm(params, index, 0, m, m));
  }
  if constexpr (math == Math::fp16) leave_range(params, index, 0, largest);
}

}  // namespace ffkernels::cuda
