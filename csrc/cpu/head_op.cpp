// The softmax head's ops on CPU tensors. ff_head_step_: arguments are checked and become a HeadJob; whatever can fail
// happens before the first in-place write.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"
#include "cpu/tensor.h"
#include "kernels.h"

namespace ffkernels::cpu {

Two ff_head_step_(const HeadArguments& a) {
  const size_t count = a.ys.size();
  STD_TORCH_CHECK(count > 0 && a.sqnorms.size() == count && a.weights.size() == count, "ys: one for each weight");
  STD_TORCH_CHECK(a.states.size() % count == 0, "states: as many tensors for each weight");
  const size_t each = a.states.size() / count;
  check_hyper(a.hyper, 1);
  check_number(a.eps, "eps", 0);
  Spans spans;
  HeadJob job;
  std::vector<HeadLayer> layers(count);
  std::vector<float*> steps;
  std::vector<std::vector<float>> copies;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &y = a.ys[i], &weight = a.weights[i];
    HeadLayer& layer = layers[i];
    layer.y = static_cast<const float*>(checked_data(y, "y", 2, ScalarType::Float));
    checked_data(weight, "weight", 2, ScalarType::Float);
    if (i == 0) job.rows = y.size(0), job.classes = weight.size(0);
    layer.row_stride = y.stride(0);
    layer.cols = y.size(1);
    STD_TORCH_CHECK(job.rows > 0 && job.classes > 0 && layer.cols > 0, "ys: must not be empty");
    check_size(y, "y", 0, job.rows);
    check_size(weight, "weight", 0, job.classes);
    check_size(weight, "weight", 1, layer.cols);
    layer.sqnorm = floats_argument(a.sqnorms[i], "sqnorm", job.rows);
    spans.input(y);
    spans.input(a.sqnorms[i]);
    const FlatOptimizer flat(a.optimizer, a.states.data() + i * each, static_cast<int64_t>(each),
                             a.lr ? &*a.lr : nullptr, a.hyper.data());
    const OptimizerArguments given = optimizer_arguments(spans, weight, {}, ScalarType::Float, flat);
    layer.weight = static_cast<float*>(given.weight);
    layer.optimizer = optimizer_step(given);
    steps.push_back(given.step);
    if (y.stride(1) != 1) {
      std::vector<float>& copy = copies.emplace_back();
      for (int64_t m = 0; m < job.rows; ++m) {
        for (int64_t n = 0; n < layer.cols; ++n) copy.push_back(layer.y[m * layer.row_stride + n * y.stride(1)]);
      }
      layer.y = copy.data();
      layer.row_stride = layer.cols;
    }
  }
  check_size(a.labels, "labels", 0, job.rows);
  job.labels = labels_argument(a.labels, "labels", 1, job.classes);
  job.label_stride = a.labels.stride(0);
  spans.input(a.labels);
  spans.check();
  job.eps = static_cast<float>(a.eps);
  job.layers = layers.data();
  job.layer_count = static_cast<int64_t>(count);
  Tensor logits = new_tensor<2>({job.rows, job.classes}, ScalarType::Float);
  Tensor loss = new_tensor<0>({}, ScalarType::Float);
  job.logits = static_cast<float*>(logits.mutable_data_ptr());
  job.loss = static_cast<float*>(loss.mutable_data_ptr());
  kernels().head(job, torch::stable::get_num_threads());
  for (float* step : steps) *step += 1.f;
  return {logits, loss};
}

namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// What the head said of each row, and the row's label.
struct Rows {
  const float* logits;
  int64_t row_stride, col_stride, rows, classes;
  const int64_t* label;
  int64_t label_stride;

  Rows(const Tensor& t, const Tensor& labels)
      : logits(static_cast<const float*>(checked_data(t, "logits", 2, ScalarType::Float))),
        row_stride(t.stride(0)),
        col_stride(t.stride(1)),
        rows(t.size(0)),
        classes(t.size(1)) {
    STD_TORCH_CHECK(classes >= 2, "logits: must have 2 classes or more");
    check_size(labels, "labels", 0, rows);
    label = labels_argument(labels, "labels", 1, classes);
    label_stride = labels.stride(0);
  }
  int64_t label_of(int64_t row) const { return label[row * label_stride]; }
  // exp(logits - the largest of them) of a row, and their sum; without a class, if one is left out.
  double exponentials(int64_t row, int64_t left_out, std::vector<double>& p) const {
    double largest = kNothing, total = 0;
    for (int64_t c = 0; c < classes; ++c) {
      p[c] = c == left_out ? kNothing : logits[row * row_stride + c * col_stride];
      largest = std::max(largest, p[c]);
    }
    for (double& each : p) total += each = std::exp(each - largest);
    return total;
  }
};

void check_draw(double draw) { STD_TORCH_CHECK(draw >= 0 && draw < 1, "draws: must be in [0, 1)"); }

}  // namespace

Tensor draw_other_labels(const Tensor& logits, const Tensor& labels, const Tensor& draws) {
  const Rows given(logits, labels);
  const Floats draw = floats_argument(draws, "draws", given.rows);
  Tensor result = new_tensor<1>({given.rows}, ScalarType::Long);
  auto* drawn = static_cast<int64_t*>(result.mutable_data_ptr());
  std::vector<double> p(given.classes);
  for (int64_t m = 0; m < given.rows; ++m) {
    check_draw(draw[m]);
    const double total = given.exponentials(m, given.label_of(m), p);
    double cumulated = 0;
    for (double& each : p) each = cumulated += each / total;
    const double limit = draw[m] * cumulated;
    drawn[m] = std::count_if(p.begin(), p.end(), [limit](double each) { return each <= limit; });
  }
  return result;
}

Tensor draw_hard_inputs(const Tensor& logits, const Tensor& labels, const Tensor& draws, double floor, int64_t count) {
  const Rows given(logits, labels);
  const auto* draw = static_cast<const double*>(checked_data(draws, "draws", 1, ScalarType::Double));
  check_size(draws, "draws", 0, given.rows);
  check_number(floor, "floor", 0, true);
  STD_TORCH_CHECK(count >= 0 && count <= given.rows, "count: must be in [0, ", given.rows, "]");
  std::vector<double> p(given.classes);
  std::vector<std::pair<double, int64_t>> keys;  // the smallest win: the row counts where two are the same
  for (int64_t m = 0; m < given.rows; ++m) {
    const double own = draw[m * draws.stride(0)], total = given.exponentials(m, -1, p);
    check_draw(own);
    const double key = std::log(own) / (p[given.label_of(m)] / total - 1 - floor);
    keys.emplace_back(std::isnan(key) ? kNothing : key, m);
  }
  std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  Tensor result = new_tensor<1>({count}, ScalarType::Long);
  auto* drawn = static_cast<int64_t*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) drawn[i] = keys[i].second;
  std::sort(drawn, drawn + count);
  return result;
}

}  // namespace ffkernels::cpu
