// A layer's forward pass: products of a strip of rows, and all that follows while they are in cache. Included by
// layer.h.
#pragma once

namespace ffkernels::cpu::FFK_NAMESPACE {

template <typename Core, typename T>
template <typename Act, bool with_p>
float Layer<Core, T>::finish_row(const float* product, float scale, const float* bias, const float* label, int64_t cols,
                                 T* y, float* p_floats, T* p) const {
  Vector total{};
  int64_t n = 0;
  const auto value = [&](Vector z, const Vector& shift, const Vector* shift2, Vector* slope) {
    if (shift2) z += *shift2;
    return Act::value(scale * z + shift, slope);
  };
  for (; n + kLanes <= cols; n += kLanes) {
    Vector slope, extra = label ? load(label + n) : Vector{};
    const Vector v = value(load(product + n), load(bias + n), label ? &extra : nullptr, with_p ? &slope : nullptr);
    store(y + n, v);
    total += v * v;
    if (with_p) {
      if (p_floats) store(p_floats + n, v * slope);
      if (p) store(p + n, v * slope);
    }
  }
  if (const int64_t rest = cols - n; rest > 0) {
    Vector slope, extra = label ? load_part(label + n, rest) : Vector{};
    const Vector v = value(load_part(product + n, rest), load_part(bias + n, rest), label ? &extra : nullptr,
                           with_p ? &slope : nullptr);
    store_part(y + n, v, rest);
    if (with_p) {
      if (p_floats) store_part(p_floats + n, v * slope, rest);
      if (p) store_part(p + n, v * slope, rest);
    }
    const Vector kept = part_of(v, rest);  // of the others nobody knows: the scale may be infinite
    total += kept * kept;
  }
  return sum(total);
}

template <typename Core, typename T>
template <typename Act, bool with_p>
void Layer<Core, T>::finish_strip(int64_t row, int64_t count, int64_t index, const WeightPart& part,
                                  const float* product) {
  const int64_t first = index * col_block_, cols = smaller(col_block_, job_.cols - first);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < labels_.candidates; ++c) {
      const int64_t to = result_row(row0_ + row + i, c) * job_.cols + first, kept = block_row(row + i, c);
      const float* label = labels_.num_classes > 0 ? part.labels + label_of(row0_ + row + i, c) * col_block_ : nullptr;
      for (int64_t n = 0; n < cols; n += kPart) {
        parts_[kept * col_parts_ + (first + n) / kPart] = finish_row<Act, with_p>(
            product + i * col_block_ + n, scale_[row + i], part.bias + n, label ? label + n : nullptr,
            smaller(kPart, cols - n), static_cast<T*>(job_.y) + to + n,
            curved_ ? p_ + kept * job_.cols + first + n : nullptr, job_.p ? static_cast<T*>(job_.p) + to + n : nullptr);
      }
    }
  }
}

template <typename Core, typename T>
template <typename Act>
void Layer<Core, T>::finish_strip(int64_t row, int64_t count, int64_t index, const WeightPart& part,
                                  const float* product) {
  if (curved_ || job_.p) {
    finish_strip<Act, true>(row, count, index, part, product);
  } else {
    finish_strip<Act, false>(row, count, index, part, product);
  }
}

// A strip of rows by a block of columns.
template <typename Core, typename T>
void Layer<Core, T>::forward_strip(int64_t row, int64_t index, const WeightPart& part, float* product,
                                   bool fetch_next) {
  const int64_t count = smaller(kStrip, rows_ - row);
  const int64_t cols = smaller(col_block_, job_.cols - index * col_block_);
  const int64_t times = ceil_div(cols, Core::kCols) * ceil_div(count, Core::kRows) * ceil_div(depth_, kFetchDepth);
  constexpr int64_t width = sizeof(T);
  Ahead ahead(times * Core::kFetches);
  ahead.add(packed_x_ + (row + kStrip) * depth_ * kUnit, kStrip * depth_ * Core::kBytes);  // the next strip
  for (int64_t c = 0; c < labels_.candidates && labels_.candidates <= 2; ++c) {            // where y will be written
    const int64_t to = result_row(row0_ + row, c), next = result_row(row0_ + row + 1, c);
    ahead.add(static_cast<const T*>(job_.y) + to * job_.cols + index * col_block_, cols * width, count,
              (next - to) * job_.cols * width);
  }
  if (split_rows_ && index == 0 && job_.x.col_stride == 1) {
    // x of the next strip, which will be packed
    ahead.add(static_cast<const T*>(job_.x.data) + (row0_ + row + kStrip) * job_.x.row_stride, job_.depth * width,
              smaller(kStrip, rows_ - row - kStrip), job_.x.row_stride * width);
  }
  if (fetch_next) {
    // the strip's part of the next block of W
    const int64_t rows = smaller(col_block_, job_.cols - (index + 1) * col_block_);
    const int64_t each = ceil_div(rows, ceil_div(rows_, kStrip)), begin = row / kStrip * each;
    const int64_t stride = job_.weight.row_stride;
    ahead.add(static_cast<const T*>(job_.weight.data) + ((index + 1) * col_block_ + begin) * stride, job_.depth * width,
              smaller(each, rows - begin), stride * width);
  }
  for (int64_t k = 0; k < depth_; k += Core::kChunk) {
    const int64_t chunk = smaller(Core::kChunk, job_.depth - k);
    for (int64_t n = 0; n < cols; n += Core::kCols) {
      for (int64_t i = 0; i < count; i += Core::kRows) {
        Core::multiply({chunk, count - i, cols - n}, packed_x_ + strip_at(row + i, k), part.packed + weight_at(n, k),
                       product + i * col_block_ + n, col_block_, k > 0, &ahead);
      }
    }
  }
  switch (job_.activation) {
    case Activation::relu:
      return finish_strip<ReluAct>(row, count, index, part, product);
    case Activation::leaky_relu:
      return finish_strip<LeakyReluAct>(row, count, index, part, product);
    case Activation::gelu:
      return finish_strip<GeluAct>(row, count, index, part, product);
    case Activation::silu:
      return finish_strip<SiluAct>(row, count, index, part, product);
    case Activation::tanh:
      return finish_strip<TanhAct>(row, count, index, part, product);
  }
}

template <typename Core, typename T>
void Layer<Core, T>::columns_task(int64_t thread) {
  const Own& own = own_[thread];
  for_items(shares_, threads_, thread, [&](int64_t owner, int64_t item) {
    const Range blocks = share(owner, col_blocks_);
    const int64_t index = blocks.begin + item;
    for (int64_t panel = 0; panel < col_block_ / Core::kCols; ++panel) {
      pack_panel(index, panel, own.weight, own.rows);
    }
    const bool fetch_next = index + 1 < blocks.end && job_.weight.col_stride == 1;
    for (int64_t row = 0; row < rows_; row += kStrip) {
      forward_strip(row, index, own.weight, own.product, fetch_next);
    }
  });
}

}  // namespace ffkernels::cpu::FFK_NAMESPACE
