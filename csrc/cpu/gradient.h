// A layer's gradient: dz, its product with x, and the optimizer on what is finished. Included by layer.h.
#pragma once

namespace ffkernels::cpu::FFK_NAMESPACE {

// scaled = sum over candidates of r dz, for a strip of rows and a block of columns; bias and label sums on the way.
template <typename Core, typename T>
void Layer<Core, T>::scale_strip(int64_t row, int64_t count, int64_t first, int64_t cols, const Own& own) {
  float *scaled = own.scaled, *bias = own.bias_sum;
  for (int64_t i = 0; i < count; ++i) {
    float* to = scaled + i * grad_block_;
    for (int64_t c = 0; c < labels_.candidates; ++c) {
      const int64_t kept = block_row(row + i, c), result = result_row(row0_ + row + i, c);
      const float* p;
      if (curved_) {
        p = p_ + kept * job_.cols + first;
      } else {
        Matrix from = job_.forward ? Matrix{job_.y, job_.cols, 1} : job_.gradient_y;
        from.data = static_cast<const T*>(from.data) + first * from.col_stride;
        int64_t stride;
        p = as_floats(from, result, 1, cols, own.rows, &stride);
      }
      const float twice = 2.f * coef_[kept], r = scale_[row + i];
      const float term = job_.row_term ? job_.row_term[result] : 0.f;
      const bool peers = static_cast<bool>(job_.row_term);
      float* label =
          labels_.num_classes > 0 ? grad_labels_ + label_of(row0_ + row + i, c) * grad_cols_ + first : nullptr;
      const bool begin_bias = i == 0 && c == 0, begin_row = c == 0;
      // The block's padding is scratch: it may be added up, but p, label and col_term end with the columns.
      for (int64_t n = 0; n < cols; n += kLanes) {
        const int64_t used = smaller(kLanes, cols - n);
        __builtin_prefetch(p + n + kRowsAhead * job_.cols, 0, 3);  // too short a piece for the hardware to foresee
        Vector dz = twice * (used == kLanes ? load(p + n) : load_part(p + n, used));
        if (peers) {
          const Floats& d = job_.col_term;
          if (used == kLanes && d.stride == 1) {
            dz += term * load(d.data + first + n);
          } else {
            for (int64_t j = 0; j < used; ++j) dz[j] += term * d[first + n + j];
          }
        }
        store(bias + n, begin_bias ? dz : load(bias + n) + dz);
        dz *= r;
        if (label) store(label + n, load(label + n) + strength_ * dz);
        store(to + n, begin_row ? dz : load(to + n) + dz);
      }
    }
  }
  for (int64_t n = 0; n < cols; ++n) grad_bias_[first + n] += bias[n];
}

// Adds y of the positive rows of a strip to their columns' sums.
template <typename Core, typename T>
void Layer<Core, T>::add_positive(int64_t row, int64_t count, int64_t first, int64_t cols, const Own& own) const {
  float* sum = own.bias_sum;  // free again; a strip's sum for itself, so that long sums round little
  for (int64_t n = 0; n < cols; ++n) sum[n] = 0.f;
  for (int64_t i = 0; i < count; ++i) {
    // of a row's candidates the first one is positive
    if (labels_.num_classes == 0 && job_.sign[row0_ + row + i] < 0.f) continue;
    const T* y = static_cast<const T*>(job_.y) + result_row(row0_ + row + i, 0) * job_.cols + first;
    for (int64_t n = 0; n < cols; ++n) sum[n] += get(y[n]);
  }
  for (int64_t n = 0; n < cols; ++n) job_.positive_sum[first + n] += sum[n];
}

template <typename Core, typename T>
template <Optimizer kind>
void Layer<Core, T>::optimize_rows(int64_t first, int64_t count, int64_t k0, int64_t depth, const float* grad) const {
  const OptimizerStep& o = job_.optimizer;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t at = (first + n) * job_.depth + k0;
    optimize<kind>(o, grad + n * grad_depth_, static_cast<T*>(job_.new_weight) + at,
                   o.slot[0] ? o.slot[0] + at : nullptr, o.slot[1] ? o.slot[1] + at : nullptr, depth, job_.depth);
  }
}

template <typename Core, typename T>
template <Optimizer kind>
void Layer<Core, T>::optimize_bias(int64_t first, int64_t count) const {
  OptimizerStep o = job_.optimizer;
  if (kind == Optimizer::hinton_sgd) o.weight_decay = 0.f;
  optimize<kind>(o, grad_bias_ + first, static_cast<T*>(job_.new_bias) + first,
                 o.bias_slot[0] ? o.bias_slot[0] + first : nullptr, o.bias_slot[1] ? o.bias_slot[1] + first : nullptr,
                 count, 0);
}

template <typename Core, typename T>
void Layer<Core, T>::gradient_task(int64_t thread) {
  const Own& own = own_[thread];
  for_items(shares_, threads_, thread, [&](int64_t owner, int64_t item) {
    const Range cols = share(owner, job_.cols, kLanes);
    const int64_t first = cols.begin + item * grad_block_;
    gradient_block(first, smaller(grad_block_, cols.end - first), own);
  });
}

template <typename Core, typename T>
void Layer<Core, T>::gradient_block(int64_t first, int64_t cols, const Own& own) {
  if (first_block_) {
    for (int64_t n = 0; n < cols; ++n) grad_bias_[first + n] = job_.given_bias ? job_.given_bias[first + n] : 0.f;
    for (int64_t c = 0; c < labels_.num_classes; ++c) {
      for (int64_t n = 0; n < cols; ++n) grad_labels_[c * grad_cols_ + first + n] = 0.f;
    }
  }
  for (int64_t row = 0; row < rows_; row += kStrip) {
    const int64_t count = smaller(kStrip, rows_ - row);
    scale_strip(row, count, first, cols, own);
    if (job_.positive_sum) add_positive(row, count, first, cols, own);
    for (int64_t n = 0; n < cols; n += Core::kRows) {
      Core::pack_a_cols(own.scaled + n, grad_block_, smaller(Core::kRows, cols - n), count,
                        own.gradient + dz_at(n, row));
    }
  }
  for (int64_t k0 = 0; k0 < job_.depth; k0 += grad_depth_) {
    const int64_t depth = smaller(grad_depth_, job_.depth - k0);
    if (rows_ == 0) {
      start_gradient(first, cols, k0, depth, own.grad);
      finish_gradient(first, cols, k0, depth, own.grad);
    }
    for (int64_t m = 0; m < rows_; m += kGradientChunk) {
      const int64_t chunk = smaller(kGradientChunk, rows_ - m);
      const bool last = m + chunk == rows_;
      for (int64_t n = 0; n < cols; n += kGradientRows) {
        const int64_t count = smaller(kGradientRows, cols - n);
        float* grad = own.grad + n * grad_depth_;
        const int64_t times =
            ceil_div(depth, Core::kCols) * ceil_div(count, Core::kRows) * ceil_div(chunk, kFetchDepth);
        Ahead ahead(times * Core::kFetches);
        if (n == 0) fetch_panels(k0, depth, m, chunk, &ahead);
        if (last && last_block_) fetch_weights(first + n, count, k0, depth, &ahead);
        for (int64_t k = 0; k < depth; k += Core::kCols) {
          for (int64_t i = 0; i < count; i += Core::kRows) {
            Core::multiply({chunk, count - i, depth - k}, own.gradient + dz_at(n + i, m), packed_xt_ + x_at(k0 + k, m),
                           grad + i * grad_depth_ + k, grad_depth_, m > 0, &ahead);
          }
        }
        if (last) finish_gradient(first + n, count, k0, depth, grad);
      }
    }
  }
  if (last_block_ && job_.bias) {
    if (job_.new_weight) {
      with_optimizer(job_.optimizer.kind, [&](auto kind) { optimize_bias<kind>(first, cols); });
    } else {
      for (int64_t n = 0; n < cols; ++n) set(static_cast<T*>(job_.grad_bias) + first + n, grad_bias_[first + n]);
    }
  }
}

// The panels of x after the first one.
template <typename Core, typename T>
void Layer<Core, T>::fetch_panels(int64_t k0, int64_t depth, int64_t m, int64_t chunk, Ahead* ahead) const {
  const int64_t panel = Core::kCols * chunk * Core::kBytes;
  ahead->add(packed_xt_ + x_at(k0 + Core::kCols, m), (ceil_div(depth, Core::kCols) - 1) * panel);
}

// What the optimizer will read.
template <typename Core, typename T>
void Layer<Core, T>::fetch_weights(int64_t first, int64_t count, int64_t k0, int64_t depth, Ahead* ahead) const {
  if (!job_.new_weight) return;
  const int64_t at = first * job_.depth + k0, values = sizeof(float);
  ahead->add(static_cast<T*>(job_.new_weight) + at, depth * sizeof(T), count, job_.depth * sizeof(T));
  for (const float* slot : job_.optimizer.slot) {
    if (slot) ahead->add(slot + at, depth * values, count, job_.depth * values);
  }
}

// dW where no row gives any: the one that was given, or none.
template <typename Core, typename T>
void Layer<Core, T>::start_gradient(int64_t first, int64_t cols, int64_t k0, int64_t depth, float* grad) const {
  for (int64_t n = 0; n < cols; ++n) {
    const float* from = job_.given_weight ? job_.given_weight + (first + n) * job_.depth + k0 : nullptr;
    for (int64_t k = 0; k < depth; ++k) grad[n * grad_depth_ + k] = from ? from[k] : 0.f;
  }
}

// A finished block of dW of this block of rows: added to those of the blocks before; after the last one, used.
template <typename Core, typename T>
void Layer<Core, T>::finish_gradient(int64_t first, int64_t cols, int64_t k0, int64_t depth, float* grad) const {
  for (int64_t n = 0; n < cols; ++n) {
    float* row = grad + n * grad_depth_;
    for (int64_t k = k0; last_block_ && k < smaller(labels_.num_classes, k0 + depth); ++k) {
      row[k - k0] += grad_labels_[k * grad_cols_ + first + n];
    }
    if (blocks_ > 1) {
      float* total = grad_total_ + (first + n) * job_.depth + k0;
      for (int64_t k = 0; k < depth && !first_block_; ++k) row[k] += total[k];
      for (int64_t k = 0; k < depth && !last_block_; ++k) total[k] = row[k];
    }
    if (last_block_ && !job_.new_weight) {
      T* to = static_cast<T*>(job_.grad_weight) + (first + n) * job_.depth + k0;
      for (int64_t k = 0; k < depth; ++k) set(to + k, row[k]);
    }
  }
  if (last_block_ && job_.new_weight) {
    with_optimizer(job_.optimizer.kind, [&](auto kind) { optimize_rows<kind>(first, cols, k0, depth, grad); });
  }
}

}  // namespace ffkernels::cpu::FFK_NAMESPACE
