// The softmax head's ops on CPU tensors. ff_head_step_: arguments are checked and become a HeadJob; whatever can fail
// happens before the first in-place write.
#include <algorithm>
#include <cmath>
#include <limits>

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

Tensor draw_other_labels(const Tensor& logits, const Tensor& labels, const Tensor& draws) {
  const auto* from = static_cast<const float*>(checked_data(logits, "logits", 2, ScalarType::Float));
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_size(labels, "labels", 0, rows);
  const int64_t* label = labels_argument(labels, "labels", 1, classes);
  const Floats draw = floats_argument(draws, "draws", rows);
  Tensor result = new_tensor<1>({rows}, ScalarType::Long);
  auto* drawn = static_cast<int64_t*>(result.mutable_data_ptr());
  std::vector<double> p(classes);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t own = label[m * labels.stride(0)];
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t c = 0; c < classes; ++c) {
      p[c] = c == own ? -std::numeric_limits<double>::infinity() : from[m * logits.stride(0) + c * logits.stride(1)];
      largest = std::max(largest, p[c]);
    }
    for (double& each : p) total += each = std::exp(each - largest);
    double cumulated = 0;
    for (double& each : p) each = cumulated += each / total;
    const double limit = draw[m] * cumulated;
    drawn[m] = std::count_if(p.begin(), p.end(), [limit](double each) { return each <= limit; });
  }
  return result;
}

}  // namespace ffkernels::cpu
