// A tile of a layer's forward pass: y = act(r x W^T + b) for (64, 64) of (M, N), and its share of the goodness.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/rows.cuh"

namespace ffkernels::cuda {

// Writes the columns of the labels into a slab of x: 0, or (with `hot`) `strength` at the row's label. A warp writes so
// many columns of so many rows that each bank has one of them.
template <int chunks, int tile_rows, typename T>
__device__ inline void overlay(unsigned char* tile, int tile_cols, int first_row, int first_col, int rows,
                               const Labels& labels, int minibatch, bool hot) {
  constexpr int kColumns = chunks == 16 ? 8 : 16 / sizeof(T);
  const int width = min(tile_cols, labels.num_classes - first_col), base = rows / labels.candidates;
  for (int i = threadIdx.x; i / (tile_rows * kColumns) * kColumns < width; i += kThreads) {
    const int row = i / kColumns % tile_rows, m = first_row + row;
    const int col = i / (tile_rows * kColumns) * kColumns + i % kColumns;
    if (col >= width) continue;
    float value = 0.f;
    if (hot && m < rows) {
      const int label = label_of(labels, minibatch, m % base, m / base);
      if (first_col + col == label) value = labels.strength;
    }
    const uint32_t byte = col * sizeof(T);
    *reinterpret_cast<T*>(tile + place<chunks>(row, byte / 16) + byte % 16) = from_float<T>(value);
  }
  __syncthreads();
}

template <Math math>
__device__ inline void forward_tile(const Params& params, int index, int minibatch, int item, unsigned char* shared,
                                    uint32_t* flag) {
  using T = Element<math>;
  const Layer& layer = params.layer[index];
  const int col_tiles = tiles(layer.cols), row_tile = item / col_tiles, col_tile = item % col_tiles;
  const int first_row = row_tile * kTile, first_col = col_tile * kTile;
  const int candidates = candidates_of(params, index), rows = params.rows / candidates, row_tiles = tiles(rows);
  const bool with_labels = labelled(params, index);
  const bool sums_squares = layer.normalize != Normalize::none && !layer.x_sqnorm.data;

  float sums[kSums] = {}, squares = 0.f;
  {
    const Operand<T> x = operand<T>(input_of<T>(layer, minibatch), rows, layer.depth);
    const Operand<T> w = operand<T>(layer.weight, layer.cols, layer.depth);
    const uint32_t slabs = shared_address(shared);
    pipeline((layer.depth + kSlab<math> - 1) / kSlab<math>,
             [&](int slot, int step) {
               load_tile<kAlongChunks>(slabs + slot * 2 * kTileBytes, x, first_row, step * kSlab<math>);
               load_tile<kAlongChunks>(slabs + (slot * 2 + 1) * kTileBytes, w, first_col, step * kSlab<math>);
             },
             [&](int slot, int step) {
               const uint32_t tile = slabs + slot * 2 * kTileBytes;
               if (with_labels && step * kSlab<math> < params.labels.num_classes) {
                 overlay<kAlongChunks, kTile, T>(shared + slot * 2 * kTileBytes, kSlab<math>, first_row,
                                                 step * kSlab<math>, rows, params.labels, minibatch, false);
               }
               if (sums_squares) squares += half_row_squares<T>(tile);
               forward_slab<math>(sums, tile, tile + kTileBytes);
             });
  }

  float* stage = reinterpret_cast<float*>(shared);
  float* norm = reinterpret_cast<float*>(shared + kStageBytes);  // r of the tile's rows
  float* scratch = norm + kTile;
  stage_sums<math, false>(stage, sums);
  if (sums_squares) {
    const float q = lanes_sum<2>(squares);
    const int row = threadIdx.x / 2;
    if (threadIdx.x % 2 == 0) {
      norm[row] = q;
      if (col_tile == 0 && first_row + row < rows) computed_sqnorm(params)[first_row + row] = q;
    }
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    const int b = first_row + static_cast<int>(threadIdx.x);
    float q = 0.f;
    if (sums_squares) {
      q = norm[threadIdx.x];
      if (with_labels) q += params.labels.strength * params.labels.strength;
    } else if (b < rows) {
      q = row_sqnorm(params, index, minibatch, b, b);
    }
    norm[threadIdx.x] = row_scale(layer, q);
  }
  __syncthreads();

  const int four = threadIdx.x % 16, col = first_col + 4 * four, count = min(max(layer.cols - col, 0), 4);
  const int64_t other_y = minibatch % kInTurn * layer.y_minibatch;
  const bool whole = count == 4 && aligned_for_four(layer.y, layer.y_stride, sizeof(T)) &&
                     aligned_for_four(layer.p, layer.y_stride, sizeof(T));
  float bias[4] = {};
  if (layer.bias) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) bias[j] = to_float(static_cast<const T*>(layer.bias)[(col + j) * layer.bias_stride]);
    }
  }
  const bool drops = drops_output(params, index);
  const Dropout dropout = drops ? begin_dropout(params, params.layer[index + 1], minibatch) : Dropout{};
  float column_sums[4] = {};  // of positive rows, for peer normalisation
#pragma unroll 1
  for (int row = threadIdx.x / 16; row < kTile; row += kEpilogueRows) {
    const int b = first_row + row;
    const float4 four_sums = staged_four(stage, row, four);
    const float r = norm[row];
#pragma unroll 1
    for (int candidate = 0; candidate < candidates; ++candidate) {
      const int m = candidates > 1 ? result_row(params.labels, rows, b, candidate) : b;
      float y[4], p[4], share = 0.f, dropped_share = 0.f;
      spread(y, four_sums);
      if (with_labels && b < rows) {
        const T* column = static_cast<const T*>(layer.weight.data) +
                          label_of(params.labels, minibatch, b, candidate) * layer.weight.col_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j < count) {
            y[j] = fmaf(params.labels.strength, to_float(column[(col + j) * layer.weight.row_stride]), y[j]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Activated act = activate(layer.activation, fmaf(r, y[j], bias[j]));
        y[j] = act.y;
        p[j] = act.y * act.slope;
        if (j < count) share = fmaf(act.y, act.y, share);
      }
      if (b < rows) {
        const int64_t to = m * layer.y_stride + col;
        store_four(static_cast<T*>(layer.y) + other_y + to, y, count, whole);
        if (layer.p) store_four(static_cast<T*>(layer.p) + to, p, count, whole);
        if (layer.peer_mean && positive_row(params, layer, minibatch, m)) {
#pragma unroll
          for (int j = 0; j < 4; ++j) column_sums[j] += y[j];
        }
        if (drops)
          dropped_share = drop_four<T>(dropout, input_of<T>(params.layer[index + 1], minibatch), m, col, y, count);
      }
      share = lanes_sum<16>(share);
      if (drops) dropped_share = lanes_sum<16>(dropped_share);
      if (four == 0 && b < rows) {
        float* to = shares_of(params, index) + static_cast<int64_t>(col_tile) * params.rows + m;
        *to = share;
        if (drops) to[static_cast<int64_t>(col_tiles) * params.rows] = dropped_share;
      }
    }
  }
  if (layer.peer_mean) {
    float* groups = scratch + kThreads / 32;  // (kEpilogueRows, kTile)
#pragma unroll
    for (int j = 0; j < 4; ++j) groups[threadIdx.x / 16 * kTile + 4 * four + j] = column_sums[j];
    __syncthreads();
    const int n = first_col + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kTile && n < layer.cols) {
      float sum = 0.f;
      for (int i = 0; i < kEpilogueRows; ++i) sum += groups[i * kTile + threadIdx.x];
      peer_columns(params, index).sums[static_cast<int64_t>(row_tile) * layer.cols + n] = sum;
    }
    if (last_to_arrive(column_counters(params, index) + col_tile, row_tiles, flag)) {
      finish_columns(params, index, minibatch, col_tile, scratch);
    }
  }
  if (last_to_arrive(row_counters(params, index) + row_tile, col_tiles, flag)) {
    finish_rows<math>(params, index, minibatch, row_tile, scratch, flag);
  }
}

}  // namespace ffkernels::cuda
