// The ops on CPU tensors: arguments are checked and become a Job, outputs are allocated, the instruction set's kernel
// runs. Whatever can fail happens before the first in-place write.
#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/optimizer_step.h"
#include "cpu/tensor.h"
#include "kernels.h"

namespace ffkernels::cpu {
namespace {

void set_input(Job& job, Spans& spans, const Tensor& x) {
  job.type = type_of(x);
  job.x = matrix_argument(x, "x", job.type);
  job.rows = x.size(0);
  job.depth = x.size(1);
  spans.input(x);
}

// The input of the layer above: y, which is set when its memory is there.
void set_input_of(Job& job, const Job& below) {
  job.type = below.type;
  job.rows = below.rows;
  job.depth = below.cols;
  job.x = {nullptr, job.depth, 1};
}

// What a layer is, once its input is known.
void set_weight(Job& job, const Tensor& weight, const OptionalTensor& bias, const std::string& normalize, double eps,
                const std::string& activation) {
  job.weight = matrix_argument(weight, "weight", job.type);
  job.cols = weight.size(0);
  if (bias) {
    job.bias = checked_data(*bias, "bias", 1, dtype_of(job.type));
    job.bias_stride = bias->stride(0);
  }
  check_layer_sizes(weight, bias, job.depth);
  job.normalize = parse_normalize<Normalize>(normalize);
  check_number(eps, "eps", 0);
  job.eps = static_cast<float>(eps);
  job.activation = parse_activation<Activation>(activation);
}

void set_sqnorm(Job& job, Spans& spans, const OptionalTensor& x_sqnorm) {
  job.x_sqnorm = floats_argument(x_sqnorm, "x_sqnorm", job.rows);
  spans.input(x_sqnorm);
}

void set_layer(Job& job, Spans& spans, const LayerArguments& a) {
  set_input(job, spans, a.x);
  set_weight(job, a.weight, a.bias, a.normalize, a.eps, a.activation);
  set_sqnorm(job, spans, a.x_sqnorm);
}

void set_peers(Job& job, Spans& spans, const LayerArguments& a) {
  check_peers(a);
  job.row_term = floats_argument(a.row_term, "row_term", job.rows * job.labels.candidates);
  job.col_term = floats_argument(a.col_term, "col_term", job.cols);
  spans.input(a.row_term);
  spans.input(a.col_term);
}

void set_loss(Job& job, const LossArguments& loss) {
  STD_TORCH_CHECK(job.rows > 0, "x: must have at least one row");
  check_number(loss.threshold, "threshold", 0);
  check_number(loss.temperature, "temperature", 0, true);
  job.threshold = static_cast<float>(loss.threshold);
  job.temperature = static_cast<float>(loss.temperature);
  job.divisor = loss.divisor(job.cols);
  job.gradient = true;
}

void set_sign(Job& job, Spans& spans, const Tensor& sign) {
  job.sign = floats_argument(sign, "sign", job.rows);
  for (int64_t m = 0; m < job.rows; ++m) {
    STD_TORCH_CHECK(job.sign[m] == 1.f || job.sign[m] == -1.f, "sign: must hold +1 and -1 only");
  }
  spans.input(sign);
}

void set_label_pair(Job& job, Spans& spans, const LabelPair& pair) {
  check_num_classes(pair.num_classes, job.depth);
  check_strength(pair.strength, dtype_of(job.type));
  Labels& labels = job.labels;
  labels.candidates = 2;
  labels.num_classes = pair.num_classes;
  labels.strength = static_cast<float>(pair.strength);
  labels.separate = true;
  for (int c = 0; c < 2; ++c) {
    const Tensor& t = c == 0 ? pair.positive : pair.negative;
    const char* name = c == 0 ? "labels_pos" : "labels_neg";
    check_size(t, name, 0, job.rows);
    labels.label[c] = labels_argument(t, name, 1, pair.num_classes);
    labels.row_stride[c] = t.stride(0);
    spans.input(t);
  }
}

Dropout dropout_of(double p, const int64_t* seed, size_t layer) {
  Dropout dropout;
  if (p == 0.0) return dropout;
  dropout.on = true;
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  dropout.below = static_cast<uint32_t>(p * 4294967296.0);
  dropout.layer = static_cast<uint32_t>(layer);
  dropout.seed = static_cast<uint64_t>(*seed);
  return dropout;
}

// A layer's peer normalisation (ffkernels/peer.py): its terms, and what becomes of the running mean after the step.
class Peers {
 public:
  Peers(Job& job, Spans& spans, double strength, const Tensor& mean, int64_t rows)
      : mean_(static_cast<float*>(spans.target(mean, "peer_mean", {job.cols}, ScalarType::Float))),
        row_term_(rows),
        col_term_(job.cols),
        positive_sum_(job.cols) {
    const bool labelled = job.labels.num_classes > 0;
    const float a = 2.f / (job.divisor * static_cast<float>(rows));
    for (int64_t m = 0; m < rows; ++m) {
      const bool positive = labelled ? m < rows / 2 : job.sign[m] > 0.f;
      row_term_[m] = positive ? a : 0.f;
      positives_ += positive;
    }
    double total = 0;
    for (int64_t n = 0; n < job.cols; ++n) total += mean_[n];
    const auto average = static_cast<float>(total / static_cast<double>(job.cols));
    for (int64_t n = 0; n < job.cols; ++n) col_term_[n] = static_cast<float>(strength) * (mean_[n] - average);
    job.row_term = {row_term_.data(), 1};
    job.col_term = {col_term_.data(), 1};
    job.positive_sum = positive_sum_.data();
  }
  void update() const {
    if (positives_ == 0) return;
    const float each = 0.1f / static_cast<float>(positives_);
    for (size_t n = 0; n < positive_sum_.size(); ++n) mean_[n] = 0.9f * mean_[n] + each * positive_sum_[n];
  }

 private:
  float* mean_;
  int64_t positives_ = 0;
  std::vector<float> row_term_, col_term_, positive_sum_;
};

// The optimizer's step on in-place targets. Returns where the step count stands, to be raised when the kernel has run.
float* set_optimizer(Job& job, Spans& spans, const Tensor& weight, const OptionalTensor& bias,
                     const FlatOptimizer& flat) {
  const OptimizerArguments given = optimizer_arguments(spans, weight, bias, dtype_of(job.type), flat);
  job.new_weight = given.weight;
  job.new_bias = given.bias;
  job.optimizer = optimizer_step(given);
  return given.step;
}

void run(const Job& job, const std::string& precision, bool reserve_only = false) {
  const Precision parsed = parse_precision<Precision>(precision);
  // A product of two bf16 is exact in float32: bf16 tensors lose nothing on the kernel of "medium".
  const Precision used = job.type == Type::bfloat16 ? Precision::medium : parsed;
  if (job.rows == 0 && !job.gradient) return;
  kernels().by_precision[static_cast<int>(used)](job, torch::stable::get_num_threads(), reserve_only);
}

struct Outputs {
  Tensor y, goodness, p;
};

Outputs set_outputs(Job& job, bool return_p) {
  const int64_t rows = job.rows * job.labels.candidates;
  const ScalarType dtype = dtype_of(job.type);
  Outputs out = {new_tensor<2>({rows, job.cols}, dtype), new_tensor<1>({rows}, ScalarType::Float),
                 return_p ? new_tensor<2>({rows, job.cols}, dtype) : new_tensor<1>({0}, dtype)};
  job.forward = true;
  job.y = out.y.mutable_data_ptr();
  job.goodness = static_cast<float*>(out.goodness.mutable_data_ptr());
  job.p = return_p ? out.p.mutable_data_ptr() : nullptr;
  return out;
}

void set_gradient(Job& job, Spans& spans, const GradientArguments& gradient) {
  const auto& [y, coef] = gradient;
  job.gradient = true;
  job.gradient_y = matrix_argument(y, "y", job.type);
  check_size(y, "y", 0, job.rows);
  check_size(y, "y", 1, job.cols);
  job.coef = floats_argument(coef, "coef", job.rows);
  spans.input(y);
  spans.input(coef);
}

// A layer's step, once its arguments are there.
Three run_step(Job& job, Spans& spans, const LayerArguments& a, const LossArguments& loss,
               const FlatOptimizer& optimizer) {
  set_loss(job, loss);
  set_peers(job, spans, a);
  float* step = set_optimizer(job, spans, a.weight, a.bias, optimizer);
  spans.check();
  Outputs out = set_outputs(job, false);
  Tensor mean = new_tensor<0>({}, ScalarType::Float);
  job.loss = static_cast<float*>(mean.mutable_data_ptr());
  run(job, a.precision);
  *step += 1.f;
  return {out.y, out.goodness, mean};
}

}  // namespace

Three ff_forward(const LayerArguments& a, bool return_p) {
  Job job;
  Spans spans;
  set_layer(job, spans, a);
  Outputs out = set_outputs(job, return_p);
  run(job, a.precision);
  return {out.y, out.goodness, out.p};
}

Two ff_grad(const LayerArguments& a, const GradientArguments& gradient) {
  Job job;
  Spans spans;
  set_layer(job, spans, a);
  set_gradient(job, spans, gradient);
  set_peers(job, spans, a);
  Tensor grad_weight = new_tensor<2>({job.cols, job.depth}, dtype_of(job.type));
  Tensor grad_bias = new_tensor<1>({a.bias ? job.cols : 0}, dtype_of(job.type));
  job.grad_weight = grad_weight.mutable_data_ptr();
  job.grad_bias = grad_bias.mutable_data_ptr();
  run(job, a.precision);
  return {grad_weight, grad_bias};
}

void ff_update_(const LayerArguments& a, const GradientArguments& gradient, const FlatOptimizer& optimizer) {
  Job job;
  Spans spans;
  set_layer(job, spans, a);
  set_gradient(job, spans, gradient);
  set_peers(job, spans, a);
  float* step = set_optimizer(job, spans, a.weight, a.bias, optimizer);
  spans.check();
  run(job, a.precision);
  *step += 1.f;
}

void apply_gradient_(const Tensor& weight, const OptionalTensor& bias, const FlatOptimizer& optimizer,
                     const Tensor& grad_weight, const OptionalTensor& grad_bias) {
  Job job;
  Spans spans;
  job.type = type_of(weight);
  job.weight = matrix_argument(weight, "weight", job.type);
  job.cols = weight.size(0);
  job.depth = weight.size(1);
  if (bias) job.bias = checked_data(*bias, "bias", 1, dtype_of(job.type));
  check_layer_sizes(weight, bias, job.depth);
  const GivenGradient given = given_gradient(spans, weight, bias, grad_weight, grad_bias);
  job.gradient = true;
  job.given_weight = given.weight;
  job.given_bias = given.bias;
  float* step = set_optimizer(job, spans, weight, bias, optimizer);
  spans.check();
  run(job, "highest");
  *step += 1.f;
}

Three ff_step_(const LayerArguments& a, const Tensor& sign, const LossArguments& loss, const FlatOptimizer& optimizer) {
  Job job;
  Spans spans;
  set_layer(job, spans, a);
  set_sign(job, spans, sign);
  return run_step(job, spans, a, loss, optimizer);
}

Two ff_network_step_(const NetworkArguments& network) {
  const std::vector<NetworkLayer> layers = layers_of(network);
  const size_t count = layers.size();
  const int64_t rows = network.rows();
  const bool labelled = network.labels_pos.has_value();
  Tensor totals = new_tensor<2>({static_cast<int64_t>(count), rows}, ScalarType::Float);
  Tensor losses = new_tensor<1>({static_cast<int64_t>(count)}, ScalarType::Float);
  auto* total = static_cast<float*>(totals.mutable_data_ptr());
  auto* loss = static_cast<float*>(losses.mutable_data_ptr());

  std::vector<Job> jobs(count);
  std::vector<float*> steps(count);
  std::vector<Peers> own_peers;
  own_peers.reserve(count);
  Spans spans;
  std::vector<float> signs(rows, 1.f);  // of the rows above a labelled first layer
  std::fill(signs.begin() + rows / 2, signs.end(), -1.f);
  const int64_t* seed = dropout_seed_of(network, spans);
  int64_t widest = 0;
  for (size_t i = 0; i < count; ++i) {
    const NetworkLayer& layer = layers[i];
    Job& job = jobs[i];
    check_number(layer.peer, "peer", 0);
    if (i == 0) {
      set_input(job, spans, network.x);
    } else {
      set_input_of(job, jobs[i - 1]);
      job.rows = rows;
      job.x_sqnorm = {total + (i - 1) * rows, 1};  // the goodness of the layer below
    }
    set_weight(job, layer.weight, layer.bias, layer.normalize, layer.eps, layer.activation);
    set_loss(job, {layer.threshold, layer.temperature, layer.goodness});
    if (i == 0) {
      set_sqnorm(job, spans, network.x_sqnorm);
      if (labelled) {
        set_label_pair(job, spans, network.label_pair());
      } else {
        set_sign(job, spans, *network.sign);
      }
    } else {
      job.sign = labelled ? Floats{signs.data(), 1} : jobs[0].sign;
    }
    steps[i] = set_optimizer(job, spans, layer.weight, layer.bias, layer.optimizer);
    job.dropout = dropout_of(layer.dropout, seed, i);
    if (job.dropout.on) job.x_sqnorm = {};  // of other values than the layer below gave
    if (layer.peer_mean) own_peers.emplace_back(job, spans, layer.peer, *layer.peer_mean, rows);
    job.forward = true;
    job.goodness = total + i * rows;
    job.loss = loss + i;
    widest = std::max(widest, job.cols);
  }
  spans.check();
  // y of a layer lives until the layer above it is done
  const int64_t width = jobs[0].type == Type::float32 ? 4 : 2, bytes = rows * widest * width;
  char* between = workspace(Scratch::network, 2 * bytes);
  for (size_t i = 0; i < count; ++i) {
    jobs[i].y = between + (i % 2) * bytes;
    if (i > 0) jobs[i].x.data = jobs[i - 1].y;
    run(jobs[i], layers[i].precision, true);
  }
  for (size_t i = 0; i < count; ++i) run(jobs[i], layers[i].precision);
  for (float* step : steps) *step += 1.f;
  for (const Peers& own : own_peers) own.update();
  return {totals, losses};
}

std::tuple<std::vector<Tensor>, Tensor> ff_network_forward(const NetworkForwardArguments& a) {
  const size_t count = a.weights.size();
  STD_TORCH_CHECK(count > 0, "layers: there must be at least one");
  for (const size_t size :
       {a.has_bias.size(), a.normalize.size(), a.eps.size(), a.activations.size(), a.precisions.size()}) {
    STD_TORCH_CHECK(size == count, "layers: every list must have an entry a layer");
  }
  std::vector<Job> jobs(count);
  Spans spans;
  size_t bias_at = 0;
  for (size_t i = 0; i < count; ++i) {
    Job& job = jobs[i];
    if (i == 0) {
      set_input(job, spans, a.x);
      set_sqnorm(job, spans, a.x_sqnorm);
    } else {
      set_input_of(job, jobs[i - 1]);
    }
    STD_TORCH_CHECK(!a.has_bias[i] || bias_at < a.biases.size(), "biases: too few");
    const OptionalTensor bias = a.has_bias[i] ? OptionalTensor(a.biases[bias_at++]) : std::nullopt;
    set_weight(job, a.weights[i], bias, a.normalize[i], a.eps[i], a.activations[i]);
    parse_precision<Precision>(a.precisions[i]);
  }
  if (a.num_classes != 0) {
    check_num_classes(a.num_classes, jobs[0].depth);
    check_strength(a.strength, dtype_of(jobs[0].type));
    jobs[0].neutral_cols = a.num_classes;
    jobs[0].neutral = static_cast<float>(a.strength / static_cast<double>(a.num_classes));
  }
  const int64_t rows = jobs[0].rows;
  Tensor totals = new_tensor<2>({static_cast<int64_t>(count), rows}, ScalarType::Float);
  auto* total = static_cast<float*>(totals.mutable_data_ptr());
  std::vector<Tensor> ys;
  for (size_t i = 0; i < count; ++i) {
    Job& job = jobs[i];
    ys.push_back(new_tensor<2>({rows, job.cols}, dtype_of(job.type)));
    job.forward = true;
    job.y = ys[i].mutable_data_ptr();
    job.goodness = total + i * rows;
    if (i > 0) {
      job.x.data = jobs[i - 1].y;
      job.x_sqnorm = {total + (i - 1) * rows, 1};
    }
    run(job, a.precisions[i]);
  }
  return {ys, totals};
}

Three ff_label_forward(const LayerArguments& a, const Tensor& labels, int64_t num_classes, double strength,
                       bool return_p) {
  Job job;
  Spans spans;
  set_layer(job, spans, a);
  check_num_classes(num_classes, job.depth);
  check_strength(strength, dtype_of(job.type));
  Labels& own = job.labels;
  own.label[0] = labels_argument(labels, "labels", 2, num_classes);
  check_size(labels, "labels", 0, job.rows);
  own.candidates = labels.size(1);
  own.num_classes = num_classes;
  own.strength = static_cast<float>(strength);
  own.row_stride[0] = labels.stride(0);
  own.candidate_stride = labels.stride(1);
  Outputs out = set_outputs(job, return_p);
  if (own.candidates > 0) run(job, a.precision);
  return {out.y, out.goodness, out.p};
}

Three ff_label_step_(const LayerArguments& a, const LabelPair& labels, const LossArguments& loss,
                     const FlatOptimizer& optimizer) {
  Job job;
  Spans spans;
  set_layer(job, spans, a);
  set_label_pair(job, spans, labels);
  return run_step(job, spans, a, loss, optimizer);
}

}  // namespace ffkernels::cpu
