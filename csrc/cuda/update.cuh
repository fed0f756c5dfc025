// A tile of a layer's update: dW = dz^T (r x) for (64, 64) of (N, K), over all rows or a part of them, and the
// optimizer.
#pragma once

#include "cuda/forward.cuh"

namespace ffkernels::cuda {

// Stores the gradient, or takes the optimizer's step, for four neighbours of the weight.
template <typename T>
__device__ inline void optimize_four(const Layer& layer, const OptimizerStep& step, int64_t at,
                                     const float (&gradient)[4], int count, bool whole) {
  const Optimizer& o = layer.optimizer;
  if (o.kind == OptimizerKind::store) {
    store_four(static_cast<T*>(layer.grad_weight) + at, gradient, count, whole);
    return;
  }
  T* weight = static_cast<T*>(const_cast<void*>(layer.weight.data)) + at;
  float w[4], slot0[4] = {}, slot1[4] = {};
  load_four(w, weight, count, whole);
  if (o.slot[0]) load_four(slot0, o.slot[0] + at, count, whole);
  if (o.slot[1]) load_four(slot1, o.slot[1] + at, count, whole);
  optimize(o, step, w, gradient, slot0, slot1);
  store_four(weight, w, count, whole);
  if (o.slot[0]) store_four(o.slot[0] + at, slot0, count, whole);
  if (o.slot[1]) store_four(o.slot[1] + at, slot1, count, whole);
}

// Whether all that optimize_four reads and writes at columns 4 i .. 4 i + 3 of any row may be accessed as one.
template <typename T>
__device__ inline bool fours_aligned(const Layer& layer) {
  const Optimizer& o = layer.optimizer;
  const void* target = o.kind == OptimizerKind::store ? layer.grad_weight : layer.weight.data;
  return layer.depth % 4 == 0 && aligned_for_four(target, 0, sizeof(T)) && aligned_for_four(o.slot[0], 0, 4) &&
         aligned_for_four(o.slot[1], 0, 4);
}

template <typename T>
__device__ inline void optimize_bias(const Layer& layer, const OptimizerStep& step, int n, float gradient) {
  Optimizer o = layer.optimizer;
  if (o.kind == OptimizerKind::store) {
    static_cast<T*>(layer.grad_bias)[n] = from_float<T>(gradient);
    return;
  }
  if (o.kind == OptimizerKind::hinton_sgd) o.weight_decay = 0.f;
  T* bias = static_cast<T*>(const_cast<void*>(layer.bias)) + n;
  float w[1] = {to_float(*bias)}, slot0[1] = {}, slot1[1] = {};
  if (o.bias_slot[0]) slot0[0] = o.bias_slot[0][n];
  if (o.bias_slot[1]) slot1[0] = o.bias_slot[1][n];
  optimize(o, step, w, {gradient}, slot0, slot1);
  *bias = from_float<T>(w[0]);
  if (o.bias_slot[0]) o.bias_slot[0][n] = slot0[0];
  if (o.bias_slot[1]) o.bias_slot[1][n] = slot1[0];
}

template <Math math>
__device__ inline void update_tile(const Params& params, int index, int minibatch, int item, unsigned char* shared,
                                   uint32_t* flag) {
  using T = Element<math>;
  constexpr int kChunks = kAcrossChunks<math>;
  const Layer& layer = params.layer[index];
  const int splits = layer.splits, tile = item / splits, split = item % splits;
  const int col_tiles = tiles(layer.depth), n0 = tile / col_tiles * kTile, k0 = tile % col_tiles * kTile;
  const bool with_labels = labelled(params, index) && k0 < params.labels.num_classes;
  // Behind the labels' columns the positive and the negative row of an input share x: their y are added before the
  // product, which then has half as many rows.
  const int base = params.rows / candidates_of(params, index);
  const bool paired = labelled(params, index) && !with_labels;
  const int rows = paired ? base : params.rows, slab = paired ? kSlab<math> / 2 : kSlab<math>;
  const int part = (tiles(rows) + splits - 1) / splits * kTile;
  const int begin = min(split * part, rows), end = min(begin + part, rows);
  const bool with_bias =
      k0 == 0 && (layer.optimizer.kind == OptimizerKind::store ? layer.grad_bias : layer.bias) != nullptr;
  const float range = math == Math::fp16 ? range_factor(params, index, minibatch) : 1.f;
  const bool has_term = has_row_term(layer);
  const float* vectors = row_vector(params, index, kScale);

  float sums[kSums] = {};
  float2 bias = {}, term = {};  // sum_m 2 c_m y[m, n] and sum_m a_m r_m x[m, k]
  {
    const int64_t y_minibatch = layer.gradient_y.data == layer.p ? 0 : layer.y_minibatch;  // p has one buffer
    const Matrix y_of = of_minibatch<T>(layer.gradient_y, y_minibatch, minibatch % kInTurn);
    Operand<T> y = operand<T>(y_of, end, layer.cols);
    Operand<T> x = operand<T>(input_of<T>(layer, minibatch), end, layer.depth);
    if (paired) {
      y.paired = x.paired = true;
      y.apart = base;
    } else if (with_labels) {
      x.wrap = base;
    }
    const uint32_t slabs = shared_address(shared), vectors_at = slabs + kPipeline * 2 * kTileBytes;
    constexpr int kVectors = math == Math::fp16 ? 2 : 1;
    pipeline((end - begin + slab - 1) / slab,
             [&](int slot, int step) {
               const int m = begin + step * slab;
               load_tile<kChunks>(slabs + slot * 2 * kTileBytes, y, m, n0);
               load_tile<kChunks>(slabs + (slot * 2 + 1) * kTileBytes, x, m, k0);
               const int i = threadIdx.x % kTile, own = m + i % slab;
               if (i < kSlab<math> && static_cast<int>(threadIdx.x) < kTile * kVectors) {
                 const RowVector first = math == Math::fp16 ? kCoef : kScale;
                 const float* from =
                     vectors + (threadIdx.x < kTile ? first : kNorm) * static_cast<int64_t>(params.rows);
                 copy<4>(vectors_at + (slot * kVectors + threadIdx.x / kTile) * kVectorBytes + 4 * i,
                         from + own + i / slab * base, own >= end);
               }
             },
             [&](int slot, int step) {
               const int m = begin + step * slab;
               const uint32_t tile_y = slabs + slot * 2 * kTileBytes;
               if (with_labels) {
                 overlay<kChunks, kSlab<math>, T>(shared + (slot * 2 + 1) * kTileBytes, kTile, m, k0, params.rows,
                                                  params.labels, minibatch, true);
               }
               const int left = end - m;
               const int64_t pitch = params.rows;
               const float* own = vectors + m;
               if (with_bias) {
                 add_columns<math>(bias, tile_y, [&](int i) { return i < left ? own[kCoef * pitch + i] : 0.f; });
               }
               if (has_term) {
                 const auto weight = [&](int i) { return own[kTerm * pitch + i] * own[kNorm * pitch + i]; };
                 add_columns<math>(term, tile_y + kTileBytes, [&](int i) {
                   return i >= left || i >= slab ? 0.f : paired ? weight(i) + weight(i + base) : weight(i);
                 });
               }
               const RowScales scales = {vectors_at + slot * kVectors * kVectorBytes, range, paired};
               update_slab<math>(sums, tile_y, tile_y + kTileBytes, scales);
             });
  }

  const Vector term_columns = layer.peer_mean ? Vector{peer_columns(params, index).term, 1} : layer.col_term;
  float* stage = reinterpret_cast<float*>(shared);
  float* bias_sums = reinterpret_cast<float*>(shared + kStageBytes);  // (warps, kTile)
  float* term_sums = bias_sums + kThreads / 32 * kTile;
  float* scratch = term_sums + kThreads / 32 * kTile;
  stage_sums<math, true>(stage, sums);
  leave_columns(bias_sums, bias);
  leave_columns(term_sums, term);
  float a_sum = 0.f;
  if (with_bias && has_term) {
    for (int m = begin + static_cast<int>(threadIdx.x); m < end; m += kThreads) {
      a_sum += vectors[static_cast<int64_t>(kTerm) * params.rows + m];
    }
    a_sum = block_sum(a_sum, scratch);
  }
  __syncthreads();
  const int n = n0 + static_cast<int>(threadIdx.x);  // of the thread's bias
  const bool owns_bias = with_bias && threadIdx.x < kTile && n < layer.cols;
  float bias_gradient = 0.f;
  if (owns_bias) {
    bias_gradient = column_sum(bias_sums, threadIdx.x);
    if (has_term) bias_gradient = fmaf(at(term_columns, n), a_sum, bias_gradient);
  }

  const int four = threadIdx.x % 16, col = k0 + 4 * four, count = min(max(layer.depth - col, 0), 4);
  float* layer_split = params.workspace.split + layer.split_offset;
  float* own_split = layer_split + static_cast<int64_t>(item) * kSplitFloats;
  const float* first_split = layer_split + static_cast<int64_t>(item - split) * kSplitFloats;
  const float inverse_range = 1.f / range;
  const auto staged_gradient = [&](float (&gradient)[4], int row) {
    spread(gradient, staged_four(stage, row, four));
#pragma unroll
    for (float& g : gradient) g *= inverse_range;
    if (has_term && n0 + row < layer.cols) {  // dz has a_m d_n, so dW has d_n sum_m a_m r_m x[m, k]
      const float d = at(term_columns, n0 + row);
#pragma unroll
      for (int j = 0; j < 4; ++j) gradient[j] = fmaf(d, column_sum(term_sums, 4 * four + j), gradient[j]);
    }
  };
  if (splits > 1) {
#pragma unroll 1
    for (int row = threadIdx.x / 16; row < kTile; row += kEpilogueRows) {
      float gradient[4];
      staged_gradient(gradient, row);
      store_four(own_split + row * kTile + 4 * four, gradient, 4, true);
    }
    if (owns_bias) own_split[kTile * kTile + threadIdx.x] = bias_gradient;
    if (!last_to_arrive(weight_counters(params, index) + tile, splits, flag)) return;
    if (owns_bias) {
      bias_gradient = 0.f;
      for (int s = 0; s < splits; ++s) bias_gradient += first_split[s * kSplitFloats + kTile * kTile + threadIdx.x];
    }
  }
  const OptimizerStep step = begin_step(layer.optimizer, minibatch - params.minibatches.begin);
  const bool whole = count == 4 && fours_aligned<T>(layer);
#pragma unroll 1
  for (int row = threadIdx.x / 16; row < kTile; row += kEpilogueRows) {
    float gradient[4];
    if (splits > 1) {
      spread(gradient, {});
      for (int s = 0; s < splits; ++s) {
        float part[4];
        load_four(part, first_split + s * kSplitFloats + row * kTile + 4 * four, 4, true);
#pragma unroll
        for (int j = 0; j < 4; ++j) gradient[j] += part[j];
      }
    } else {
      staged_gradient(gradient, row);
    }
    if (n0 + row < layer.cols && count > 0) {
      optimize_four<T>(layer, step, static_cast<int64_t>(n0 + row) * layer.depth + col, gradient, count, whole);
    }
  }
  if (owns_bias) optimize_bias<T>(layer, step, n, bias_gradient);
  if (layer.peer_mean && k0 == 0 && threadIdx.x < kTile && n < layer.cols) {
    layer.peer_mean[n] = peer_columns(params, index).mean[n];
  }
}

}  // namespace ffkernels::cuda
