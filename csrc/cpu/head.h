// A softmax head's step on few classes: logits, cross entropy, gradient and optimizer. Included by each instruction
// set.
//
// The products are too narrow for the panels of a layer (layer.h): y is read where it lies, in float32. Threads split
// the columns of y, for the logits as for the gradient, since that is how a layer with few rows has written y: each
// thread's part is in its own cache. Sums over columns are made of parts of a fixed width, added in order, so that the
// results do not depend on the number of threads.
#pragma once

#include "cpu/elementwise.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

constexpr int64_t kHeadPart = 512;   // columns whose share of the logits is summed at once
constexpr int64_t kHeadRows = 4;     // rows, or vectors of columns, at once
constexpr int64_t kHeadClasses = 5;  // classes at once: 20 sums in registers
constexpr int64_t kHeadChunk = 128;  // rows whose share of the gradient is summed at once
constexpr double kHeadThreadWork = 2e5 * kLanes;

class Head {
 public:
  Head(const HeadJob& job, int64_t threads) : job_(job) {
    double work = 0;
    for (int64_t l = 0; l < job.layer_count; ++l) {
      work += 4.0 * static_cast<double>(job.rows) * job.classes * job.layers[l].cols;
      parts_ += ceil_div(job.layers[l].cols, kHeadPart);
    }
    threads_ = larger<int64_t>(1, smaller<int64_t>(threads, static_cast<int64_t>(work / kHeadThreadWork)));
    // float arrays one after the other: shares of the logits, errors of each layer, losses, the threads' gradients
    const int64_t cells = job.rows * job.classes;
    const int64_t sizes[] = {parts_ * cells, job.layer_count * cells, job.rows, threads_ * job.classes * kTile};
    float** const arrays[] = {&shares_, &errors_, &losses_, &gradients_};
    int64_t total = 0;
    for (const int64_t size : sizes) total += round_up(size, 16);
    auto* at = reinterpret_cast<float*>(workspace(Scratch::head, total * static_cast<int64_t>(sizeof(float))));
    for (int64_t i = 0; i < 4; at += round_up(sizes[i], 16), ++i) *arrays[i] = at;
  }

  void run() {
    in_parallel(&Head::logits_task);
    in_parallel(&Head::rows_task);
    double total = 0;
    for (int64_t m = 0; m < job_.rows; ++m) total += losses_[m];
    *job_.loss = static_cast<float>(total / static_cast<double>(job_.rows));
    in_parallel(&Head::gradient_task);
  }

 private:
  static constexpr int64_t kTile = kHeadRows * kLanes;  // columns of the gradient at once

  void in_parallel(void (Head::*method)(int64_t)) {
    method_ = method;
    run_threads(
        threads_,
        [](int64_t thread, const void* self) {
          auto& head = *static_cast<Head*>(const_cast<void*>(self));
          (head.*head.method_)(thread);
        },
        this);
  }
  template <typename F>
  void for_share(int64_t thread, int64_t count, F&& function) const {
    const int64_t each = ceil_div(count, threads_), end = smaller(count, (thread + 1) * each);
    for (int64_t i = smaller(count, thread * each); i < end; ++i) function(i);
  }

  // -- logits

  // to[i, j] = y of row + i times the weight of class c + j, over columns [begin, end)
  template <int64_t rows, int64_t classes>
  void products(const HeadLayer& layer, int64_t row, int64_t c, int64_t begin, int64_t end, float* to) const {
    const float *y = layer.y + row * layer.row_stride, *w = layer.weight + c * layer.cols;
    Vector total[rows][classes] = {};
    const auto add = [&](auto load_from, int64_t n) {
      Vector columns[classes];
#pragma GCC unroll 8
      for (int64_t j = 0; j < classes; ++j) columns[j] = load_from(w + j * layer.cols + n);
#pragma GCC unroll 8
      for (int64_t i = 0; i < rows; ++i) {
        const Vector own = load_from(y + i * layer.row_stride + n);
#pragma GCC unroll 8
        for (int64_t j = 0; j < classes; ++j) total[i][j] += own * columns[j];
      }
    };
    int64_t n = begin;
    for (; n + kLanes <= end; n += kLanes) add([](const auto* p) { return load(p); }, n);
    if (n < end) add([rest = end - n](const auto* p) { return load_part(p, rest); }, n);
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < classes; ++j) to[(row + i) * job_.classes + c + j] = folded(total[i][j]);
    }
  }

  template <int64_t rows>
  void logits_of_rows(const HeadLayer& layer, int64_t row, int64_t begin, int64_t end, float* to) const {
    int64_t c = 0;
    for (; c + kHeadClasses <= job_.classes; c += kHeadClasses) {
      products<rows, kHeadClasses>(layer, row, c, begin, end, to);
    }
    for (; c < job_.classes; ++c) products<rows, 1>(layer, row, c, begin, end, to);
  }

  void logits_task(int64_t thread) {
    const int64_t groups = ceil_div(job_.rows, kHeadRows);
    float* shares = shares_;
    for (int64_t l = 0; l < job_.layer_count; ++l) {
      const HeadLayer& layer = job_.layers[l];
      const int64_t parts = ceil_div(layer.cols, kHeadPart);
      for_share(thread, parts * groups, [&](int64_t i) {
        const int64_t part = i / groups, begin = part * kHeadPart, end = smaller(layer.cols, begin + kHeadPart);
        float* to = shares + part * job_.rows * job_.classes;
        int64_t row = i % groups * kHeadRows;
        if (row + kHeadRows <= job_.rows) return logits_of_rows<kHeadRows>(layer, row, begin, end, to);
        for (; row < job_.rows; ++row) logits_of_rows<1>(layer, row, begin, end, to);
      });
      shares += parts * job_.rows * job_.classes;
    }
  }

  // -- softmax

  void rows_task(int64_t thread) {
    for_share(thread, job_.rows, [this](int64_t row) { finish_row(row); });
  }

  // The row's logits, its loss, and its error times the row scale of each layer.
  void finish_row(int64_t row) {
    const int64_t classes = job_.classes, cells = job_.rows * classes, label = job_.labels[row * job_.label_stride];
    float *logits = job_.logits + row * classes, *p = errors_ + row * classes;
    for (int64_t c = 0; c < classes; ++c) logits[c] = 0.f;
    const float* share = shares_ + row * classes;
    for (int64_t l = 0; l < job_.layer_count; ++l) {
      const float r = row_scale(job_.layers[l], row);
      for (int64_t c = 0; c < classes; ++c) p[c] = 0.f;
      for (int64_t n = 0; n < job_.layers[l].cols; n += kHeadPart, share += cells) {
        for (int64_t c = 0; c < classes; ++c) p[c] += share[c];
      }
      for (int64_t c = 0; c < classes; ++c) logits[c] += r * p[c];
    }
    float largest = logits[0], sum = 0.f;
    for (int64_t c = 1; c < classes; ++c) largest = larger(largest, logits[c]);
    for (int64_t c = 0; c < classes; c += kLanes) {
      const int64_t used = smaller(kLanes, classes - c);
      store_part(p + c, exponential(load_part(logits + c, used) - largest), used);
    }
    for (int64_t c = 0; c < classes; ++c) sum += p[c];
    losses_[row] = std::log(sum) + largest - logits[label];
    for (int64_t c = 0; c < classes; ++c) {
      const float error = (p[c] / sum - (c == label ? 1.f : 0.f)) / static_cast<float>(job_.rows);
      for (int64_t l = 0; l < job_.layer_count; ++l) {
        errors_[l * cells + row * classes + c] = error * row_scale(job_.layers[l], row);
      }
    }
  }

  float row_scale(const HeadLayer& layer, int64_t row) const {
    return 1.f / (__builtin_sqrtf(layer.sqnorm[row] / static_cast<float>(layer.cols)) + job_.eps);
  }

  // -- gradient and optimizer

  // to[j, n] = or += sum over rows [begin, end) of the error of class c + j times y of the columns from `first` on;
  // `used` of the last vector's lanes
  template <int64_t vectors, int64_t classes>
  void gradient(const HeadLayer& layer, const float* errors, int64_t begin, int64_t end, int64_t c, int64_t first,
                int64_t used, float* to) const {
    Vector total[classes][vectors] = {};
    for (int64_t row = begin; row < end; ++row) {
      const float *y = layer.y + row * layer.row_stride + first, *error = errors + row * job_.classes + c;
      Vector own[vectors];
#pragma GCC unroll 8
      for (int64_t i = 0; i < vectors; ++i) {
        own[i] = vectors > 1 || used == kLanes ? load(y + i * kLanes) : load_part(y, used);
      }
#pragma GCC unroll 8
      for (int64_t j = 0; j < classes; ++j) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < vectors; ++i) total[j][i] += error[j] * own[i];
      }
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < classes; ++j) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < vectors; ++i) {
        float* sum = to + (c + j) * kTile + i * kLanes;
        store(sum, begin > 0 ? load(sum) + total[j][i] : total[j][i]);
      }
    }
  }

  template <int64_t vectors>
  void gradient_of_columns(const HeadLayer& layer, const float* errors, int64_t first, int64_t used, float* to) const {
    for (int64_t begin = 0; begin < job_.rows; begin += kHeadChunk) {
      const int64_t end = smaller(job_.rows, begin + kHeadChunk);
      int64_t c = 0;
      for (; c + kHeadClasses <= job_.classes; c += kHeadClasses) {
        gradient<vectors, kHeadClasses>(layer, errors, begin, end, c, first, used, to);
      }
      for (; c < job_.classes; ++c) gradient<vectors, 1>(layer, errors, begin, end, c, first, used, to);
    }
  }

  void gradient_task(int64_t thread) {
    float* grad = gradients_ + thread * job_.classes * kTile;
    for (int64_t l = 0; l < job_.layer_count; ++l) {
      const HeadLayer& layer = job_.layers[l];
      const float* errors = errors_ + l * job_.rows * job_.classes;
      for_share(thread, ceil_div(layer.cols, kTile), [&](int64_t tile) {
        const int64_t first = tile * kTile, cols = smaller(kTile, layer.cols - first);
        if (cols == kTile) {
          gradient_of_columns<kHeadRows>(layer, errors, first, kLanes, grad);
        } else {
          for (int64_t n = 0; n < cols; n += kLanes) {
            gradient_of_columns<1>(layer, errors, first + n, smaller(kLanes, cols - n), grad + n);
          }
        }
        update(layer, first, cols, grad);
      });
    }
  }

  void update(const HeadLayer& layer, int64_t first, int64_t cols, const float* grad) const {
    const OptimizerStep& o = layer.optimizer;
    with_optimizer(o.kind, [&](auto kind) {
      for (int64_t c = 0; c < job_.classes; ++c) {
        const int64_t at = c * layer.cols + first;
        optimize<kind>(o, grad + c * kTile, layer.weight + at, o.slot[0] ? o.slot[0] + at : nullptr,
                       o.slot[1] ? o.slot[1] + at : nullptr, cols, 0);
      }
    });
  }

  const HeadJob& job_;
  int64_t threads_, parts_ = 0;  // parts: of all layers' columns
  void (Head::*method_)(int64_t) = nullptr;
  float* shares_ = nullptr;     // (parts, rows, classes): products of a part of the columns
  float* errors_ = nullptr;     // (layers, rows, classes): r d loss / d logits
  float* losses_ = nullptr;     // (rows,)
  float* gradients_ = nullptr;  // (threads, classes, tile)
};

inline void run_head(const HeadJob& job, int64_t threads) { Head(job, threads).run(); }

}  // namespace ffkernels::cpu::FFK_NAMESPACE
