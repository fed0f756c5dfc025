// A layer's operands: rows of x and W from where they are into panels, the row scales. Included by layer.h.
#pragma once

namespace ffkernels::cpu::FFK_NAMESPACE {

template <typename Core, typename T>
float Layer<Core, T>::rounded(float value) {
  // to T
  T narrow;
  set(&narrow, value);
  return get(narrow);
}

template <typename Core, typename T>
float Layer<Core, T>::squared_norm(const float* row, int64_t n) {
  Vector total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const Vector v = load(row + i + j * kLanes);
      total[j] += v * v;
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    const Vector v = load(row + i);
    total[0] += v * v;
  }
  const Vector v = load_part(row + i, n - i);
  total[1] += v * v;
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// A strip of x: row scales, A panels, B panels. `row` counts from the block's first.
template <typename Core, typename T>
void Layer<Core, T>::pack_strip(int64_t row, float* space) {
  const int64_t count = smaller(kStrip, rows_ - row), depth = job_.depth;
  int64_t stride;
  const float* x = as_floats(job_.x, row0_ + row, count, depth, space, &stride,
                             labels_.num_classes > 0 || job_.dropout.on || job_.neutral_cols > 0);
  for (int64_t i = 0; i < count && job_.dropout.on; ++i) {
    drop_row(job_.dropout, row0_ + row + i, space + i * stride, depth);
    for (int64_t k = 0; sizeof(T) == 2 && k < depth; ++k) space[i * stride + k] = rounded(space[i * stride + k]);
  }
  for (int64_t i = 0; i < count && labels_.num_classes > 0; ++i) {
    for (int64_t k = 0; k < labels_.num_classes; ++k) space[i * stride + k] = 0.f;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < job_.neutral_cols; ++k) space[i * stride + k] = rounded(job_.neutral);
  }
  for (int64_t i = 0; i < count; ++i) {
    float q = 0.f;
    if (job_.x_sqnorm) {
      q = job_.x_sqnorm[row0_ + row + i];
    } else if (job_.normalize != Normalize::none) {
      q = squared_norm(x + i * stride, depth) + strength_ * strength_;
    }
    const float divisor = job_.normalize == Normalize::rms ? static_cast<float>(depth) : 1.f;
    scale_[row + i] = job_.normalize == Normalize::none ? 1.f : 1.f / (__builtin_sqrtf(q / divisor) + job_.eps);
  }
  if (job_.forward) {
    for (int64_t k = 0; k < depth; k += Core::kChunk) {
      for (int64_t i = 0; i < count; i += Core::kRows) {
        Core::pack_a_rows(x + i * stride + k, stride, smaller(Core::kRows, count - i), smaller(Core::kChunk, depth - k),
                          packed_x_ + strip_at(row + i, k));
      }
    }
  }
  if (job_.gradient) {
    for (int64_t k = 0; k < depth; k += Core::kCols) {
      Core::pack_b_cols(x + k, stride, smaller(Core::kCols, depth - k), count, packed_xt_ + x_at(k, row));
    }
  }
}

template <typename Core, typename T>
void Layer<Core, T>::pack_task(int64_t thread) {
  const Range rows = share(thread, rows_, kStrip);
  for (int64_t row = rows.begin; row < rows.end; row += kStrip) pack_strip(row, own_[thread].rows);
}

// Panel `panel` of block `index` of W's rows (columns of z): packed, with its bias and label columns.
template <typename Core, typename T>
void Layer<Core, T>::pack_panel(int64_t index, int64_t panel, const WeightPart& part, float* space) const {
  const int64_t at = panel * Core::kCols, first = index * col_block_ + at;
  const int64_t used = smaller(Core::kCols, job_.cols - first);
  if (used <= 0) return;
  int64_t stride;
  const float* rows = as_floats(job_.weight, first, used, job_.depth, space, &stride);
  for (int64_t k = 0; k < job_.depth; k += Core::kChunk) {
    Core::pack_b_rows(rows + k, stride, used, smaller(Core::kChunk, job_.depth - k), part.packed + weight_at(at, k));
  }
  const T* bias = static_cast<const T*>(job_.bias);
  for (int64_t n = 0; n < used; ++n) part.bias[at + n] = bias ? get(bias[(first + n) * job_.bias_stride]) : 0.f;
  const T* weight = static_cast<const T*>(job_.weight.data) + first * job_.weight.row_stride;
  for (int64_t c = 0; c < labels_.num_classes; ++c) {
    for (int64_t n = 0; n < used; ++n) {
      const T value = weight[n * job_.weight.row_stride + c * job_.weight.col_stride];
      part.labels[c * col_block_ + at + n] = strength_ * get(value);
    }
  }
}

template <typename Core, typename T>
void Layer<Core, T>::pack_shared_weight(int64_t thread) {
  const int64_t per_block = col_block_ / Core::kCols;
  const Range panels = share(thread, col_blocks_ * per_block);
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    pack_panel(i / per_block, i % per_block, shared_[i / per_block], own_[thread].rows);
  }
}

}  // namespace ffkernels::cpu::FFK_NAMESPACE
