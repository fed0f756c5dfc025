// A layer's forward pass, loss, gradient and update over blocks of rows. Included by kernels.inc.
//
// Rows are worked off in blocks of at most kBlockRows. For each block:
//   pack      x into A panels (forward) and B panels (gradient), the row scales r
//   forward   x W^T tile by tile; scale, bias, activation and the row's share of the goodness follow while the tile is
//   in
//             cache; shares of columns are added in order
//   loss      the coefficients, for rows whose goodness is complete
//   gradient  dz^T x for a block of columns, its bias, and the optimizer on it while it is in cache
// Many rows: threads split the rows of pack, forward and loss, and W is packed once. Few rows: they split the columns,
// and each packs its own part of W just before it is used. The gradient is always split by columns. No thread adds to
// what another one writes, so results do not depend on timing.
#pragma once

#include "cpu/dropout.h"
#include "cpu/elementwise.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

constexpr int64_t kBlockRows = 2048;       // rows of x at once: the depth of the gradient's products
constexpr int64_t kRowSplit = 512;         // from so many rows a thread on, threads split rows
constexpr int64_t kWeightBytes = 1 << 20;  // of packed W at once: half of a large L2 cache
constexpr int64_t kGradientCols = 256;     // columns of dz in a gradient block
constexpr int64_t kGradientDepth = 256;    // columns of x in a gradient block
constexpr int64_t kFinishRows = 64;        // of dW at once: the optimizer follows while they are in cache
constexpr int64_t kStripRows = 32;         // rows that are converted, packed and scaled at once
constexpr int64_t kRowsAhead = 3;          // of y, fetched before they are scaled
constexpr int64_t kPartCols = 128;  // columns whose share of the goodness is summed at once, for any thread count

template <typename Core, typename T>
class Layer {
 public:
  Layer(const Job& job, int64_t threads) : job_(job), labels_(job.labels), all_rows_(job.rows * job.labels.candidates) {
    // a given gradient: the optimizer alone, which moves memory for as long as products of some rows take
    const double work = 2.0 * static_cast<double>(job.given_weight ? kStripRows : all_rows_) * job.cols * job.depth;
    threads_ = larger<int64_t>(1, smaller<int64_t>(threads, static_cast<int64_t>(work / Core::kThreadWork)));
    depth_ = round_up(job.depth, Core::kDepthUnit);
    block_rows_ = round_up(larger<int64_t>(1, smaller(kBlockRows, job.rows)), kStrip);
    blocks_ = larger<int64_t>(1, ceil_div(job.rows, block_rows_));  // no rows: an update with no gradient
    split_rows_ = blocks_ > 1 || job.rows >= kRowSplit * threads_;

    const int64_t fitting = larger<int64_t>(1, kWeightBytes / (depth_ * Core::kBytes * kPart)) * kPart;
    split(split_rows_ ? 1 : threads_, split_rows_ ? fitting : kPart, kPart, &col_blocks_, &col_block_);
    col_parts_ = ceil_div(job.cols, kPart);
    split(threads_, kGradientCols, std::lcm(kStrip, kLanes), &grad_blocks_, &grad_block_);
    grad_depth_ = round_up(smaller(kGradientDepth, job.depth), Core::kCols);
    curved_ = job.forward && job.gradient && job.activation != Activation::relu;

    Arena measure{nullptr, 0};
    lay_out(measure);
    Arena arena{workspace(Scratch::layer, measure.used), 0};
    lay_out(arena);
  }

  void run() {
    if (job_.forward && split_rows_) in_parallel(&Layer::pack_shared_weight);
    for (int64_t block = 0; block < blocks_; ++block) {
      row0_ = block * block_rows_;
      rows_ = smaller(block_rows_, job_.rows - row0_);
      first_block_ = block == 0;
      last_block_ = block == blocks_ - 1;
      if (split_rows_) {
        in_parallel(&Layer::rows_task);
      } else {
        in_parallel(&Layer::pack_task);
        if (job_.forward) in_parallel(&Layer::columns_task);
        finish_rows(0, rows_);
      }
      if (job_.gradient) in_parallel(&Layer::gradient_task);
    }
    if (job_.loss) {
      double total = 0;
      for (int64_t m = 0; m < all_rows_; ++m) total += losses_[m];
      *job_.loss = static_cast<float>(job_.temperature * total / static_cast<double>(all_rows_));
    }
  }

 private:
  using Element = typename Core::Element;
  static constexpr int64_t kUnit =
      Core::kBytes / static_cast<int64_t>(sizeof(Element));  // Elements a packed value takes
  static constexpr int64_t kStrip = round_up(kStripRows, Core::kRows);
  static constexpr int64_t kPart = round_up(kPartCols, Core::kCols);
  static constexpr int64_t kGradientRows = round_up(kFinishRows, Core::kRows);
  static constexpr int64_t kGradientChunk = Core::kChunk / kStrip * kStrip;  // no strip lies in two

  // -- shape of the work

  // Cuts N columns into blocks of at most `most` columns, a multiple of `parts` of them where N allows it.
  void split(int64_t parts, int64_t most, int64_t unit, int64_t* count, int64_t* size) const {
    *count = parts * ceil_div(job_.cols, parts * most);
    *size = round_up(ceil_div(job_.cols, *count), unit);
    *count = ceil_div(job_.cols, *size);
  }

  struct Range {
    int64_t begin, end;
  };
  // A thread's share of `count` things, in units.
  Range share(int64_t thread, int64_t count, int64_t unit = 1) const {
    const int64_t each = round_up(ceil_div(count, threads_), unit);
    return {smaller(count, thread * each), smaller(count, (thread + 1) * each)};
  }

  void in_parallel(void (Layer::*method)(int64_t)) {
    method_ = method;
    run_threads(
        threads_,
        [](int64_t thread, const void* self) {
          auto& layer = *static_cast<Layer*>(const_cast<void*>(self));
          Core::enter();
          (layer.*layer.method_)(thread);
          Core::leave();
        },
        this);
  }

  // -- memory

  struct Arena {
    char* base;
    int64_t used;
    template <typename V>
    V* take(int64_t count) {
      V* pointer = base ? reinterpret_cast<V*>(base + used) : nullptr;
      used += round_up(count * static_cast<int64_t>(sizeof(V)), 64) + 64;  // neighbours share no cache line
      return pointer;
    }
  };

  // The forward pass's view of W: packed columns and what goes with them.
  struct WeightPart {
    Element* packed;  // (col_block, depth)
    float* bias;      // (col_block,)
    float* labels;    // (num_classes, col_block): strength * W's label columns
  };
  struct Own {  // a thread's own memory
    WeightPart weight;
    float* product;     // (strip, col_block)
    float* rows;        // (strip, depth): rows in float32
    Element* gradient;  // (grad_block, block_rows): packed dz^T
    float* scaled;      // (strip, grad_block)
    float* bias_sum;    // (grad_block,): of a strip, so that long sums round little
    float* grad;        // (grad_block, grad_depth)
  };

  WeightPart take_weight(Arena& arena, bool wanted) const {
    const int64_t cols = wanted ? col_block_ : 0;
    WeightPart part;
    part.packed = arena.template take<Element>(cols * depth_ * kUnit);
    part.bias = arena.template take<float>(cols);
    part.labels = arena.template take<float>(labels_.num_classes * cols);
    return part;
  }

  void lay_out(Arena& arena) {
    const bool forward = job_.forward, gradient = job_.gradient;
    const int64_t block_all = block_rows_ * labels_.candidates, classes = labels_.num_classes;
    const int64_t grad_cols = gradient ? grad_blocks_ * grad_block_ : 0;
    grad_rows_ = round_up(block_rows_, Core::kDepthUnit);
    own_ = arena.template take<Own>(threads_);
    shared_ = arena.template take<WeightPart>(col_blocks_);
    scale_ = arena.template take<float>(block_rows_);
    coef_ = arena.template take<float>(gradient ? block_all : 0);
    losses_ = arena.template take<float>(job_.loss ? all_rows_ : 0);
    parts_ = arena.template take<float>(forward ? block_all * col_parts_ : 0);
    p_ = arena.template take<float>(curved_ ? block_all * job_.cols : 0);
    packed_x_ = arena.template take<Element>(forward ? block_rows_ * depth_ * kUnit : 0);
    packed_xt_ = arena.template take<Element>(gradient ? grad_rows_ * round_up(job_.depth, Core::kCols) * kUnit : 0);
    grad_bias_ = arena.template take<float>(grad_cols);
    grad_labels_ = arena.template take<float>(classes * grad_cols);
    grad_total_ = arena.template take<float>(gradient && blocks_ > 1 ? job_.cols * job_.depth : 0);
    for (int64_t i = 0; i < col_blocks_; ++i) {
      const WeightPart part = take_weight(arena, forward && split_rows_);
      if (shared_) shared_[i] = part;
    }
    for (int64_t t = 0; t < threads_; ++t) {
      Own own;
      own.weight = take_weight(arena, forward && !split_rows_);
      own.product = arena.template take<float>(forward ? kStrip * col_block_ : 0);
      // rows of x and W, and in the gradient a row of y, which is the longer where depth is small
      own.rows =
          arena.template take<float>(larger(larger(kStrip, Core::kCols) * job_.depth, gradient ? grad_block_ : 0));
      own.gradient = arena.template take<Element>(gradient ? grad_block_ * grad_rows_ * kUnit : 0);
      own.scaled = arena.template take<float>(gradient ? kStrip * grad_block_ : 0);
      own.bias_sum = arena.template take<float>(gradient ? grad_block_ : 0);
      own.grad = arena.template take<float>(gradient ? grad_block_ * grad_depth_ : 0);
      if (own_) own_[t] = own;
    }
  }

  // -- rows in float32

  // Rows [row, row + count) of a matrix as float32: where they are, or converted into `space`.
  const float* as_floats(const Matrix& matrix, int64_t row, int64_t count, int64_t cols, float* space, int64_t* stride,
                         bool copy = false) const {
    const T* from = static_cast<const T*>(matrix.data) + row * matrix.row_stride;
    *stride = matrix.row_stride;
    if constexpr (sizeof(T) == 4) {
      if (matrix.col_stride == 1 && !copy) return from;
    }
    *stride = cols;
    for (int64_t i = 0; i < count; ++i, from += matrix.row_stride) {
      float* to = space + i * cols;
      if (matrix.col_stride == 1) {
        for (int64_t k = 0; k < cols; ++k) to[k] = get(from[k]);
      } else {
        for (int64_t k = 0; k < cols; ++k) to[k] = get(from[k * matrix.col_stride]);
      }
    }
    return space;
  }

  // -- pack

  // Packed operands lie chunk of depth by chunk of depth, and within a chunk panel by panel: what a core works on at a
  // time is one piece of memory. Panels of the whole depth would lie at multiples of some power of two and compete for
  // the same few sets of the cache. Offset of depth k in the panel that begins at `first` of `width` rows or columns:
  static int64_t packed_at(int64_t first, int64_t k, int64_t width, int64_t tile, int64_t chunk, int64_t depth) {
    const int64_t begin = k / chunk * chunk;
    return (begin * width + first * smaller(chunk, depth - begin) + (k - begin) * tile) * kUnit;
  }
  // x of a strip of rows, and W's columns: the forward pass's operands
  int64_t strip_at(int64_t row, int64_t k) const {
    const int64_t strip = row / kStrip * kStrip;
    return strip * depth_ * kUnit + packed_at(row - strip, k, kStrip, Core::kRows, Core::kChunk, depth_);
  }
  int64_t weight_at(int64_t col, int64_t k) const {
    return packed_at(col, k, col_block_, Core::kCols, Core::kChunk, depth_);
  }
  // dz of a block of columns, and x's columns: the gradient's operands, along the rows
  int64_t dz_at(int64_t col, int64_t row) const {
    return packed_at(col, row, grad_block_, Core::kRows, kGradientChunk, grad_rows_);
  }
  int64_t x_at(int64_t k, int64_t row) const {
    return packed_at(k, row, round_up(job_.depth, Core::kCols), Core::kCols, kGradientChunk, grad_rows_);
  }

  static float rounded(float value) {  // to T
    T narrow;
    set(&narrow, value);
    return get(narrow);
  }

  static float squared_norm(const float* row, int64_t n) {
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
  void pack_strip(int64_t row, float* space) {
    const int64_t count = smaller(kStrip, rows_ - row), depth = job_.depth;
    int64_t stride;
    const float* x =
        as_floats(job_.x, row0_ + row, count, depth, space, &stride, labels_.num_classes > 0 || job_.dropout.on);
    for (int64_t i = 0; i < count && job_.dropout.on; ++i) {
      drop_row(job_.dropout, row0_ + row + i, space + i * stride, depth);
      for (int64_t k = 0; sizeof(T) == 2 && k < depth; ++k) space[i * stride + k] = rounded(space[i * stride + k]);
    }
    for (int64_t i = 0; i < count && labels_.num_classes > 0; ++i) {
      for (int64_t k = 0; k < labels_.num_classes; ++k) space[i * stride + k] = 0.f;
    }
    for (int64_t i = 0; i < count; ++i) {
      float q = 0.f;
      if (job_.x_sqnorm) {
        q = job_.x_sqnorm[row0_ + row + i];
      } else if (job_.normalize != Normalize::none) {
        q = squared_norm(x + i * stride, depth) + labels_.strength * labels_.strength;
      }
      const float divisor = job_.normalize == Normalize::rms ? static_cast<float>(depth) : 1.f;
      scale_[row + i] = job_.normalize == Normalize::none ? 1.f : 1.f / (__builtin_sqrtf(q / divisor) + job_.eps);
    }
    if (job_.forward) {
      for (int64_t k = 0; k < depth; k += Core::kChunk) {
        for (int64_t i = 0; i < count; i += Core::kRows) {
          Core::pack_a_rows(x + i * stride + k, stride, smaller(Core::kRows, count - i),
                            smaller(Core::kChunk, depth - k), packed_x_ + strip_at(row + i, k));
        }
      }
    }
    if (job_.gradient) {
      for (int64_t k = 0; k < depth; k += Core::kCols) {
        Core::pack_b_cols(x + k, stride, smaller(Core::kCols, depth - k), count, packed_xt_ + x_at(k, row));
      }
    }
  }

  void pack_task(int64_t thread) {
    const Range rows = share(thread, rows_, kStrip);
    for (int64_t row = rows.begin; row < rows.end; row += kStrip) pack_strip(row, own_[thread].rows);
  }

  // Panel `panel` of block `index` of W's rows (columns of z): packed, with its bias and label columns.
  void pack_panel(int64_t index, int64_t panel, const WeightPart& part, float* space) const {
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
        part.labels[c * col_block_ + at + n] = labels_.strength * get(value);
      }
    }
  }

  void pack_shared_weight(int64_t thread) {
    const int64_t per_block = col_block_ / Core::kCols;
    const Range panels = share(thread, col_blocks_ * per_block);
    for (int64_t i = panels.begin; i < panels.end; ++i) {
      pack_panel(i / per_block, i % per_block, shared_[i / per_block], own_[thread].rows);
    }
  }

  // -- forward

  // The place of candidate c of the row among the results.
  int64_t result_row(int64_t row, int64_t c) const {
    return labels_.separate ? c * job_.rows + row : row * labels_.candidates + c;
  }
  int64_t label_of(int64_t row, int64_t c) const {
    return labels_.separate ? labels_.label[c][row * labels_.row_stride[c]]
                            : labels_.label[0][row * labels_.row_stride[0] + c * labels_.candidate_stride];
  }
  // The same within the block, for what is kept of it.
  int64_t block_row(int64_t row, int64_t c) const { return row * labels_.candidates + c; }

  template <typename Act, bool with_p>
  float finish_row(const float* product, float scale, const float* bias, const float* label, int64_t cols, T* y,
                   float* p_floats, T* p) const {
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
      for (int64_t i = 0; i < rest; ++i) total[i] += v[i] * v[i];
    }
    return sum(total);
  }

  template <typename Act, bool with_p>
  void finish_strip(int64_t row, int64_t count, int64_t index, const WeightPart& part, const float* product) {
    const int64_t first = index * col_block_, cols = smaller(col_block_, job_.cols - first);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < labels_.candidates; ++c) {
        const int64_t to = result_row(row0_ + row + i, c) * job_.cols + first, kept = block_row(row + i, c);
        const float* label =
            labels_.num_classes > 0 ? part.labels + label_of(row0_ + row + i, c) * col_block_ : nullptr;
        for (int64_t n = 0; n < cols; n += kPart) {
          parts_[kept * col_parts_ + (first + n) / kPart] = finish_row<Act, with_p>(
              product + i * col_block_ + n, scale_[row + i], part.bias + n, label ? label + n : nullptr,
              smaller(kPart, cols - n), static_cast<T*>(job_.y) + to + n,
              curved_ ? p_ + kept * job_.cols + first + n : nullptr,
              job_.p ? static_cast<T*>(job_.p) + to + n : nullptr);
        }
      }
    }
  }

  template <typename Act>
  void finish_strip(int64_t row, int64_t count, int64_t index, const WeightPart& part, const float* product) {
    if (curved_ || job_.p) {
      finish_strip<Act, true>(row, count, index, part, product);
    } else {
      finish_strip<Act, false>(row, count, index, part, product);
    }
  }

  // A strip of rows by a block of columns.
  void forward_strip(int64_t row, int64_t index, const WeightPart& part, float* product, bool fetch_next = false) {
    const int64_t count = smaller(kStrip, rows_ - row);
    const int64_t cols = smaller(col_block_, job_.cols - index * col_block_);
    const int64_t strip = kStrip * depth_ * Core::kBytes;
    const int64_t times = ceil_div(cols, Core::kCols) * ceil_div(count, Core::kRows) * ceil_div(depth_, kFetchDepth);
    Ahead ahead(times);
    ahead.add(packed_x_ + (row + kStrip) * depth_ * kUnit, strip);  // the next strip
    if (fetch_next) {
      // the strip's part of the next block of W
      const int64_t rows = smaller(col_block_, job_.cols - (index + 1) * col_block_);
      const int64_t each = ceil_div(rows, ceil_div(rows_, kStrip)), begin = row / kStrip * each;
      const int64_t stride = job_.weight.row_stride * static_cast<int64_t>(sizeof(T));
      ahead.add(static_cast<const char*>(job_.weight.data) + ((index + 1) * col_block_ + begin) * stride,
                job_.depth * static_cast<int64_t>(sizeof(T)), smaller(each, rows - begin), stride);
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

  void columns_task(int64_t thread) {
    const Own& own = own_[thread];
    const Range blocks = share(thread, col_blocks_);
    for (int64_t index = blocks.begin; index < blocks.end; ++index) {
      for (int64_t panel = 0; panel < col_block_ / Core::kCols; ++panel) {
        pack_panel(index, panel, own.weight, own.rows);
      }
      const bool fetch_next = index + 1 < blocks.end && job_.weight.col_stride == 1;
      for (int64_t row = 0; row < rows_; row += kStrip) {
        forward_strip(row, index, own.weight, own.product, fetch_next);
      }
    }
  }

  // -- goodness and loss

  // What needs a row's whole goodness, for rows of the block.
  void finish_rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t c = 0; c < labels_.candidates; ++c) {
        const int64_t kept = block_row(row, c), result = result_row(row0_ + row, c);
        if (job_.forward) {
          float total = 0.f;
          for (int64_t i = 0; i < col_parts_; ++i) total += parts_[kept * col_parts_ + i];
          job_.goodness[result] = total;
        }
        if (job_.loss) {
          const float sign = labels_.num_classes > 0 ? (c == 0 ? 1.f : -1.f) : job_.sign[row0_ + row];
          const float u = -sign * (job_.goodness[result] / job_.divisor - job_.threshold) / job_.temperature;
          // softplus(u) and sigmoid(u) without overflow
          const float small = std::exp(u > 0.f ? -u : u);
          losses_[result] = (u > 0.f ? u : 0.f) + std::log1p(small);
          const float sigmoid = u > 0.f ? 1.f / (1.f + small) : small / (1.f + small);
          coef_[kept] = -sign * sigmoid / (job_.divisor * static_cast<float>(all_rows_));
        } else if (job_.gradient) {
          coef_[kept] = job_.coef[row0_ + row];
        }
      }
    }
  }

  void rows_task(int64_t thread) {
    const Own& own = own_[thread];
    const Range rows = share(thread, rows_, kStrip);
    if (!job_.forward || col_blocks_ > 1) {
      for (int64_t row = rows.begin; row < rows.end; row += kStrip) pack_strip(row, own.rows);
    }
    for (int64_t index = 0; job_.forward && index < col_blocks_; ++index) {
      for (int64_t row = rows.begin; row < rows.end; row += kStrip) {
        if (col_blocks_ == 1) pack_strip(row, own.rows);  // while x is still in cache
        forward_strip(row, index, shared_[index], own.product);
      }
    }
    finish_rows(rows.begin, rows.end);
  }

  // -- gradient

  // scaled = sum over candidates of r dz, for a strip of rows and a block of columns; bias and label sums on the way.
  void scale_strip(int64_t row, int64_t count, int64_t first, int64_t cols, const Own& own) {
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
        float* label = labels_.num_classes > 0
                           ? grad_labels_ + label_of(row0_ + row + i, c) * grad_blocks_ * grad_block_ + first
                           : nullptr;
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
          if (label) store(label + n, load(label + n) + labels_.strength * dz);
          store(to + n, begin_row ? dz : load(to + n) + dz);
        }
      }
    }
    for (int64_t n = 0; n < cols; ++n) grad_bias_[first + n] += bias[n];
  }

  // Adds y of the positive rows of a strip to their columns' sums.
  void add_positive(int64_t row, int64_t count, int64_t first, int64_t cols, const Own& own) const {
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

  template <Optimizer kind>
  void optimize_rows(int64_t first, int64_t count, int64_t k0, int64_t depth, const float* grad) const {
    const OptimizerStep& o = job_.optimizer;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t at = (first + n) * job_.depth + k0;
      optimize<kind>(o, grad + n * grad_depth_, static_cast<T*>(job_.new_weight) + at,
                     o.slot[0] ? o.slot[0] + at : nullptr, o.slot[1] ? o.slot[1] + at : nullptr, depth, job_.depth);
    }
  }

  template <Optimizer kind>
  void optimize_bias(int64_t first, int64_t count) const {
    OptimizerStep o = job_.optimizer;
    if (kind == Optimizer::hinton_sgd) o.weight_decay = 0.f;
    optimize<kind>(o, grad_bias_ + first, static_cast<T*>(job_.new_bias) + first,
                   o.bias_slot[0] ? o.bias_slot[0] + first : nullptr, o.bias_slot[1] ? o.bias_slot[1] + first : nullptr,
                   count, 0);
  }

  template <typename F>
  void with_optimizer(F&& function) const {
    switch (job_.optimizer.kind) {
      case Optimizer::sgd:
        return function(std::integral_constant<Optimizer, Optimizer::sgd>{});
      case Optimizer::adam:
        return function(std::integral_constant<Optimizer, Optimizer::adam>{});
      case Optimizer::adamw:
        return function(std::integral_constant<Optimizer, Optimizer::adamw>{});
      case Optimizer::hinton_sgd:
        return function(std::integral_constant<Optimizer, Optimizer::hinton_sgd>{});
    }
  }

  void gradient_task(int64_t thread) {
    const Own& own = own_[thread];
    const Range blocks = share(thread, grad_blocks_);
    for (int64_t index = blocks.begin; index < blocks.end; ++index) gradient_block(index, own);
  }

  void gradient_block(int64_t index, const Own& own) {
    const int64_t first = index * grad_block_, cols = smaller(grad_block_, job_.cols - first);
    const int64_t stride = grad_blocks_ * grad_block_;
    if (first_block_) {
      for (int64_t n = 0; n < cols; ++n) grad_bias_[first + n] = job_.given_bias ? job_.given_bias[first + n] : 0.f;
      for (int64_t n = 0; job_.positive_sum && n < cols; ++n) job_.positive_sum[first + n] = 0.f;
      for (int64_t c = 0; c < labels_.num_classes; ++c) {
        for (int64_t n = 0; n < cols; ++n) grad_labels_[c * stride + first + n] = 0.f;
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
          Ahead ahead(ceil_div(depth, Core::kCols) * ceil_div(count, Core::kRows) * ceil_div(chunk, kFetchDepth));
          if (n == 0) fetch_panels(k0, depth, m, chunk, &ahead);
          if (last && last_block_) fetch_weights(first + n, count, k0, depth, &ahead);
          for (int64_t k = 0; k < depth; k += Core::kCols) {
            for (int64_t i = 0; i < count; i += Core::kRows) {
              Core::multiply({chunk, count - i, depth - k}, own.gradient + dz_at(n + i, m),
                             packed_xt_ + x_at(k0 + k, m), grad + i * grad_depth_ + k, grad_depth_, m > 0, &ahead);
            }
          }
          if (last) finish_gradient(first + n, count, k0, depth, grad);
        }
      }
    }
    if (last_block_ && job_.bias) {
      if (job_.new_weight) {
        with_optimizer([&](auto kind) { optimize_bias<kind>(first, cols); });
      } else {
        for (int64_t n = 0; n < cols; ++n) set(static_cast<T*>(job_.grad_bias) + first + n, grad_bias_[first + n]);
      }
    }
  }

  // The panels of x after the first one.
  void fetch_panels(int64_t k0, int64_t depth, int64_t m, int64_t chunk, Ahead* ahead) const {
    const int64_t panel = Core::kCols * chunk * Core::kBytes;
    ahead->add(packed_xt_ + x_at(k0 + Core::kCols, m), (ceil_div(depth, Core::kCols) - 1) * panel);
  }

  // What the optimizer will read.
  void fetch_weights(int64_t first, int64_t count, int64_t k0, int64_t depth, Ahead* ahead) const {
    if (!job_.new_weight) return;
    const int64_t at = first * job_.depth + k0, values = sizeof(float);
    ahead->add(static_cast<T*>(job_.new_weight) + at, depth * sizeof(T), count, job_.depth * sizeof(T));
    for (const float* slot : job_.optimizer.slot) {
      if (slot) ahead->add(slot + at, depth * values, count, job_.depth * values);
    }
  }

  // dW where no row gives any: the one that was given, or none.
  void start_gradient(int64_t first, int64_t cols, int64_t k0, int64_t depth, float* grad) const {
    for (int64_t n = 0; n < cols; ++n) {
      const float* from = job_.given_weight ? job_.given_weight + (first + n) * job_.depth + k0 : nullptr;
      for (int64_t k = 0; k < depth; ++k) grad[n * grad_depth_ + k] = from ? from[k] : 0.f;
    }
  }

  // A finished block of dW of this block of rows: added to those of the blocks before; after the last one, used.
  void finish_gradient(int64_t first, int64_t cols, int64_t k0, int64_t depth, float* grad) const {
    for (int64_t n = 0; n < cols; ++n) {
      float* row = grad + n * grad_depth_;
      for (int64_t k = k0; last_block_ && k < smaller(labels_.num_classes, k0 + depth); ++k) {
        row[k - k0] += grad_labels_[k * grad_blocks_ * grad_block_ + first + n];
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
      with_optimizer([&](auto kind) { optimize_rows<kind>(first, cols, k0, depth, grad); });
    }
  }

  const Job& job_;
  const Labels& labels_;
  int64_t all_rows_, threads_, depth_, block_rows_, blocks_, grad_rows_ = 0;
  int64_t col_blocks_ = 0, col_block_ = 0, col_parts_ = 0, grad_blocks_ = 0, grad_block_ = 0, grad_depth_ = 0;
  bool split_rows_, curved_;
  void (Layer::*method_)(int64_t) = nullptr;

  // the present block of rows
  int64_t row0_ = 0, rows_ = 0;
  bool first_block_ = false, last_block_ = false;

  Own* own_ = nullptr;            // (threads,)
  WeightPart* shared_ = nullptr;  // (col_blocks,)
  float* scale_ = nullptr;        // (block_rows,): r
  float* coef_ = nullptr;         // (block_rows * candidates,)
  float* losses_ = nullptr;       // (rows * candidates,)
  float* parts_ = nullptr;        // (block_rows * candidates, col_parts): shares of the goodness
  float* p_ = nullptr;            // (block_rows * candidates, cols): y act'(z)
  Element* packed_x_ = nullptr;   // (block_rows, depth): A panels, see strip_at
  Element* packed_xt_ = nullptr;  // (depth, grad_rows): B panels, see x_at
  float* grad_bias_ = nullptr;    // (grad_blocks * grad_block,)
  float* grad_labels_ = nullptr;  // (num_classes, grad_blocks * grad_block)
  float* grad_total_ = nullptr;   // (cols, depth): dW of the blocks of rows before
};

template <typename Core>
void run(const Job& job, int64_t threads, bool reserve_only) {
  if (job.type == Type::float32) {
    Layer<Core, float> layer(job, threads);
    if (!reserve_only) layer.run();
  } else {
    Layer<Core, uint16_t> layer(job, threads);
    if (!reserve_only) layer.run();
  }
}

}  // namespace ffkernels::cpu::FFK_NAMESPACE
