// A layer's forward pass, loss, gradient and update over blocks of rows. Included by each instruction set.
//
// Here is the order of the work, its shape and its memory; pack.h, forward.h and gradient.h are the work itself.
//
// Rows are worked off in blocks of at most kBlockRows. For each block:
//   pack      x into A panels (forward) and B panels (gradient), the row scales r
//   forward   x W^T tile by tile; scale, bias, activation and the row's share of the goodness while it is in cache;
//             shares of columns are added in order
//   loss      the coefficients, for rows whose goodness is complete
//   gradient  dz^T x for a block of columns, its bias, and the optimizer on it while it is in cache
// Many rows: threads split the rows of pack, forward and loss, and W is packed once. Few rows: they split the columns,
// and each packs its own part of W just before it is used. The gradient is always split by columns. A thread that has
// finished its share takes over from another's (items.h). No thread adds to what another one writes, so results do not
// depend on timing.
#pragma once

#include "cpu/dropout.h"
#include "cpu/elementwise.h"
#include "cpu/items.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

constexpr int64_t kBlockRows = 2048;       // rows of x at once: the depth of the gradient's products
constexpr int64_t kRowSplit = 512;         // from so many rows a thread on, threads split rows
constexpr int64_t kWeightBytes = 1 << 20;  // of packed W at once: half of a large L2 cache
constexpr int64_t kGradientDepth = 256;    // columns of x in a gradient block
constexpr int64_t kFinishRows = 64;        // of dW at once: the optimizer follows while they are in cache
constexpr int64_t kStripRows = 32;         // rows that are converted, packed and scaled at once
constexpr int64_t kRowsAhead = 3;          // of y, fetched before they are scaled
constexpr int64_t kPartCols = 128;  // columns whose share of the goodness is summed at once, for any thread count

template <typename Core, typename T>
class Layer {
 public:
  Layer(const Job& job, int64_t threads)
      : job_(job),
        labels_(job.labels),
        strength_(rounded(job.labels.strength)),
        all_rows_(job.rows * job.labels.candidates) {
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
    const int64_t grad_share = share(0, job.cols, kLanes).end;
    grad_block_ = round_up(ceil_div(grad_share, ceil_div(grad_share, Core::kGradientCols)), std::lcm(kStrip, kLanes));
    grad_cols_ = round_up(job.cols, kLanes);
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
        for (int64_t strip = 0; strip * kStrip < rows_; ++strip) done_[strip].store(0, std::memory_order_relaxed);
        hand_out(ceil_div(rows_, kStrip), 1, [this](int64_t strips) { return strips * row_items(); });
        in_parallel(&Layer::rows_task);
      } else {
        in_parallel(&Layer::pack_task);
        hand_out(col_blocks_, 1, [](int64_t blocks) { return blocks; });
        if (job_.forward) in_parallel(&Layer::columns_task);
        finish_rows(0, rows_);
      }
      hand_out(job_.cols, kLanes, [this](int64_t cols) { return ceil_div(cols, grad_block_); });
      if (job_.gradient) in_parallel(&Layer::gradient_task);
    }
    if (job_.loss) {
      double total = 0;
      for (int64_t m = 0; m < all_rows_; ++m) total += losses_[m];
      *job_.loss = static_cast<float>(total / static_cast<double>(all_rows_));
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

  // Shares of `count` things, in units, as items: items(n) of n things, counted from the share's first.
  template <typename F>
  void hand_out(int64_t count, int64_t unit, F&& items) {
    for (int64_t t = 0; t < threads_; ++t) {
      const Range range = share(t, count, unit);
      shares_[t].next.store(0, std::memory_order_relaxed);
      shares_[t].end = items(range.end - range.begin);
    }
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
    const int64_t grad_cols = gradient ? grad_cols_ : 0;
    grad_rows_ = round_up(block_rows_, Core::kDepthUnit);
    own_ = arena.template take<Own>(threads_);
    shares_ = arena.template take<Share>(threads_);
    done_ = arena.template take<std::atomic<int64_t>>(block_rows_ / kStrip);
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

  static float rounded(float value);
  static float squared_norm(const float* row, int64_t n);
  void pack_strip(int64_t row, float* space);
  void pack_task(int64_t thread);
  void pack_panel(int64_t index, int64_t panel, const WeightPart& part, float* space) const;
  void pack_shared_weight(int64_t thread);

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
                   float* p_floats, T* p) const;
  template <typename Act, bool with_p>
  void finish_strip(int64_t row, int64_t count, int64_t index, const WeightPart& part, const float* product);
  template <typename Act>
  void finish_strip(int64_t row, int64_t count, int64_t index, const WeightPart& part, const float* product);
  void forward_strip(int64_t row, int64_t index, const WeightPart& part, float* product, bool fetch_next = false);
  void columns_task(int64_t thread);

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
          const float v = -sign * (job_.goodness[result] / job_.divisor - job_.threshold), u = v / job_.temperature;
          // T softplus(u) and sigmoid(u) without overflow; v may be finite where u is not
          const float small = std::exp(u > 0.f ? -u : u);
          losses_[result] = (v > 0.f ? v : 0.f) + job_.temperature * std::log1p(small);
          const float sigmoid = u > 0.f ? 1.f / (1.f + small) : small / (1.f + small);
          coef_[kept] = -sign * sigmoid / (job_.divisor * static_cast<float>(all_rows_));
        } else if (job_.gradient) {
          coef_[kept] = job_.coef[row0_ + row];
        }
      }
    }
  }

  // A strip of rows is packed with the first block of columns, while x is in cache. Then its other blocks can follow.
  int64_t row_items() const { return job_.forward ? col_blocks_ : 1; }
  void rows_task(int64_t thread) {
    const Own& own = own_[thread];
    for_items(shares_, threads_, thread, [&](int64_t owner, int64_t item) {
      const Range strips = share(owner, ceil_div(rows_, kStrip));
      const int64_t count = strips.end - strips.begin, index = item / count, strip = strips.begin + item % count;
      const int64_t row = strip * kStrip;
      if (index == 0) {
        pack_strip(row, own.rows);
      } else {
        // begun by another thread a share ago: hardly ever is there anything to wait for
        while (done_[strip].load(std::memory_order_acquire) == 0) std::this_thread::yield();
      }
      if (job_.forward) forward_strip(row, index, shared_[index], own.product);
      if (done_[strip].fetch_add(1, std::memory_order_acq_rel) + 1 == row_items()) {
        finish_rows(row, smaller(rows_, row + kStrip));
      }
    });
  }

  // -- gradient

  void scale_strip(int64_t row, int64_t count, int64_t first, int64_t cols, const Own& own);
  void add_positive(int64_t row, int64_t count, int64_t first, int64_t cols, const Own& own) const;
  template <Optimizer kind>
  void optimize_rows(int64_t first, int64_t count, int64_t k0, int64_t depth, const float* grad) const;
  template <Optimizer kind>
  void optimize_bias(int64_t first, int64_t count) const;
  void gradient_task(int64_t thread);
  void gradient_block(int64_t first, int64_t cols, const Own& own);
  void fetch_panels(int64_t k0, int64_t depth, int64_t m, int64_t chunk, Ahead* ahead) const;
  void fetch_weights(int64_t first, int64_t count, int64_t k0, int64_t depth, Ahead* ahead) const;
  void start_gradient(int64_t first, int64_t cols, int64_t k0, int64_t depth, float* grad) const;
  void finish_gradient(int64_t first, int64_t cols, int64_t k0, int64_t depth, float* grad) const;

  // -- what it holds

  const Job& job_;
  const Labels& labels_;
  const float strength_;  // as a number of x's type
  int64_t all_rows_, threads_, depth_, block_rows_, blocks_, grad_rows_ = 0;
  int64_t col_blocks_ = 0, col_block_ = 0, col_parts_ = 0;
  int64_t grad_block_ = 0, grad_cols_ = 0, grad_depth_ = 0;  // columns of a block, all of them; depth
  bool split_rows_, curved_;
  void (Layer::*method_)(int64_t) = nullptr;

  // the present block of rows
  int64_t row0_ = 0, rows_ = 0;
  bool first_block_ = false, last_block_ = false;

  Own* own_ = nullptr;                    // (threads,)
  Share* shares_ = nullptr;               // (threads,)
  std::atomic<int64_t>* done_ = nullptr;  // (block_rows / strip,): of each strip so many items
  WeightPart* shared_ = nullptr;          // (col_blocks,)
  float* scale_ = nullptr;                // (block_rows,): r
  float* coef_ = nullptr;                 // (block_rows * candidates,)
  float* losses_ = nullptr;               // (rows * candidates,)
  float* parts_ = nullptr;                // (block_rows * candidates, col_parts): shares of the goodness
  float* p_ = nullptr;                    // (block_rows * candidates, cols): y act'(z)
  Element* packed_x_ = nullptr;           // (block_rows, depth): A panels, see strip_at
  Element* packed_xt_ = nullptr;          // (depth, grad_rows): B panels, see x_at
  float* grad_bias_ = nullptr;            // (grad_cols,)
  float* grad_labels_ = nullptr;          // (num_classes, grad_cols)
  float* grad_total_ = nullptr;           // (cols, depth): dW of the blocks of rows before
};

}  // namespace ffkernels::cpu::FFK_NAMESPACE

#include "cpu/forward.h"
#include "cpu/gradient.h"
#include "cpu/pack.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

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
