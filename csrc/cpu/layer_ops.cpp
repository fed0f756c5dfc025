// The ops on CPU tensors: arguments are checked and become a Job, outputs are allocated, the instruction set's kernel
// runs. Whatever can fail happens before the first in-place write.
#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/tensor.h"

namespace ffkernels::cpu {
namespace {

Precision parse_precision(const std::string& name) {
  return parse<Precision, 3>(name, "precision", {"highest", "high", "medium"});
}

void set_input(Job& job, Spans& spans, const Tensor& x) {
  job.type = type_of(x);
  job.x = matrix_argument(x, "x", job.type);
  job.rows = x.size(0);
  job.depth = x.size(1);
  spans.input(x);
}

// What a layer is, once its input is known.
void set_weight(Job& job, const Tensor& weight, const OptionalTensor& bias, const std::string& normalize, double eps,
                const std::string& activation) {
  job.weight = matrix_argument(weight, "weight", job.type);
  job.cols = weight.size(0);
  STD_TORCH_CHECK(job.depth > 0 && job.cols > 0, "weight: must not be empty");
  check_size(weight, "weight", 1, job.depth);
  if (bias) {
    job.bias = checked_data(*bias, "bias", 1, dtype_of(job.type));
    job.bias_stride = bias->stride(0);
    check_size(*bias, "bias", 0, job.cols);
  }
  job.normalize = parse<Normalize, 3>(normalize, "normalize", {"none", "l2", "rms"});
  job.eps = static_cast<float>(eps);
  job.activation = parse<Activation, 5>(activation, "activation", {"relu", "leaky_relu", "gelu", "silu", "tanh"});
}

void set_layer(Job& job, Spans& spans, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const std::string& normalize, double eps, const std::string& activation) {
  set_input(job, spans, x);
  set_weight(job, weight, bias, normalize, eps, activation);
}

void set_sqnorm(Job& job, Spans& spans, const OptionalTensor& x_sqnorm) {
  job.x_sqnorm = floats_argument(x_sqnorm, "x_sqnorm", job.rows);
  spans.input(x_sqnorm);
}

void set_peers(Job& job, Spans& spans, const OptionalTensor& row_term, const OptionalTensor& col_term) {
  STD_TORCH_CHECK(row_term.has_value() == col_term.has_value(), "row_term and col_term must be given together");
  job.row_term = floats_argument(row_term, "row_term", job.rows * job.labels.candidates);
  job.col_term = floats_argument(col_term, "col_term", job.cols);
  spans.input(row_term);
  spans.input(col_term);
}

void set_loss(Job& job, double threshold, double temperature, const std::string& goodness) {
  STD_TORCH_CHECK(job.rows > 0, "x: must have at least one row");
  STD_TORCH_CHECK(goodness == "mean" || goodness == "sum", "goodness: unknown value ", goodness);
  job.threshold = static_cast<float>(threshold);
  job.temperature = static_cast<float>(temperature);
  job.divisor = goodness == "mean" ? static_cast<float>(job.cols) : 1.f;
  job.gradient = true;
}

void set_sign(Job& job, Spans& spans, const Tensor& sign) {
  job.sign = floats_argument(sign, "sign", job.rows);
  for (int64_t m = 0; m < job.rows; ++m) {
    STD_TORCH_CHECK(job.sign[m] == 1.f || job.sign[m] == -1.f, "sign: must hold +1 and -1 only");
  }
  spans.input(sign);
}

const int64_t* labels_argument(const Tensor& t, const char* name, int64_t dim, int64_t num_classes) {
  const auto* data = static_cast<const int64_t*>(checked_data(t, name, dim, ScalarType::Long));
  const int64_t cols = dim == 2 ? t.size(1) : 1;
  for (int64_t i = 0; i < t.size(0); ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t label = data[i * t.stride(0) + (dim == 2 ? j * t.stride(1) : 0)];
      STD_TORCH_CHECK(label >= 0 && label < num_classes, name, ": must be in [0, ", num_classes, ")");
    }
  }
  return data;
}

void set_label_pair(Job& job, Spans& spans, const Tensor& labels_pos, const Tensor& labels_neg, int64_t num_classes,
                    double strength) {
  STD_TORCH_CHECK(num_classes > 0 && num_classes <= job.depth, "num_classes: must be in [1, ", job.depth, "]");
  check_size(labels_pos, "labels_pos", 0, job.rows);
  check_size(labels_neg, "labels_neg", 0, job.rows);
  Labels& labels = job.labels;
  labels.candidates = 2;
  labels.num_classes = num_classes;
  labels.strength = static_cast<float>(strength);
  labels.separate = true;
  labels.label[0] = labels_argument(labels_pos, "labels_pos", 1, num_classes);
  labels.label[1] = labels_argument(labels_neg, "labels_neg", 1, num_classes);
  labels.row_stride[0] = labels_pos.stride(0);
  labels.row_stride[1] = labels_neg.stride(0);
  spans.input(labels_pos);
  spans.input(labels_neg);
}

Dropout parse_dropout(double p, const OptionalTensor& seed, size_t layer) {
  Dropout dropout;
  if (p == 0.0) return dropout;
  STD_TORCH_CHECK(p > 0.0 && p < 1.0 && layer > 0, "dropout: must be in [0, 1), and 0 in the first layer");
  STD_TORCH_CHECK(seed, "dropout_seed: must be given");
  const auto* data = static_cast<const int64_t*>(checked_data(*seed, "dropout_seed", 1, ScalarType::Long));
  check_size(*seed, "dropout_seed", 0, 1);
  dropout.on = true;
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  dropout.below = static_cast<uint32_t>(p * 4294967296.0);
  dropout.layer = static_cast<uint32_t>(layer);
  dropout.seed = static_cast<uint64_t>(*data);
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

// Adam's bias correction 1 - beta^t, in double: it cancels for small t.
double bias_correction(double beta, double step) { return 1.0 - std::pow(beta, step); }

// The in-place targets. Returns where the step count stands, to be raised when the kernel has run.
float* set_optimizer(Job& job, Spans& spans, const Tensor& weight, const OptionalTensor& bias, const Tensor* state,
                     int64_t state_size, const std::string& kind, const Tensor* lr, const double* hyper) {
  OptimizerStep& o = job.optimizer;
  o.kind = parse<Optimizer, 4>(kind, "optimizer", {"sgd", "adam", "adamw", "hinton_sgd"});
  const int64_t params = bias ? 2 : 1;
  const bool adam = o.kind == Optimizer::adam || o.kind == Optimizer::adamw;
  const int64_t slots = adam ? 2 : o.kind == Optimizer::sgd && state_size == 1 ? 0 : 1;
  STD_TORCH_CHECK(state_size == 1 + slots * params, "state: has ", state_size, " tensors");
  job.new_weight = spans.target(weight, "weight", {job.cols, job.depth}, dtype_of(job.type));
  if (bias) job.new_bias = spans.target(*bias, "bias", {job.cols}, dtype_of(job.type));
  auto* step = static_cast<float*>(spans.target(state[0], "step", {}, ScalarType::Float));
  for (int64_t i = 0; i < slots; ++i) {
    o.slot[i] = static_cast<float*>(spans.target(state[1 + i], "state", {job.cols, job.depth}, ScalarType::Float));
    if (bias) {
      o.bias_slot[i] = static_cast<float*>(spans.target(state[1 + slots + i], "state", {job.cols}, ScalarType::Float));
    }
  }
  double rate = hyper[0];
  if (lr != nullptr) {
    rate = *static_cast<const float*>(checked_data(*lr, "lr", 0, ScalarType::Float));
    spans.input(*lr);
  }
  o.lr = static_cast<float>(rate);
  if (o.kind == Optimizer::sgd) {
    o.first = *step == 0.f;
    o.momentum = static_cast<float>(hyper[1]);
    o.dampening = static_cast<float>(hyper[2]);
    o.weight_decay = static_cast<float>(hyper[3]);
    o.nesterov = hyper[4] != 0.0;
  } else if (o.kind == Optimizer::hinton_sgd) {
    o.momentum = static_cast<float>(hyper[1]);
    o.rest1 = static_cast<float>(1.0 - hyper[1]);
    o.weight_decay = static_cast<float>(hyper[2]);
  } else {
    const double next = static_cast<double>(*step) + 1.0;
    o.beta1 = static_cast<float>(hyper[1]);
    o.beta2 = static_cast<float>(hyper[2]);
    o.rest1 = static_cast<float>(1.0 - hyper[1]);
    o.rest2 = static_cast<float>(1.0 - hyper[2]);
    o.eps = static_cast<float>(hyper[3]);
    o.weight_decay = static_cast<float>(hyper[4]);
    o.step_size = static_cast<float>(rate / bias_correction(hyper[1], next));
    o.inverse_root_correction2 = static_cast<float>(1.0 / std::sqrt(bias_correction(hyper[2], next)));
  }
  return step;
}

void run(const Job& job, const std::string& precision, bool reserve_only = false) {
  const Precision parsed = parse_precision(precision);
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

const Tensor* pointer_to(const OptionalTensor& t) { return t ? &*t : nullptr; }

// y (or p) and coef, for the ops that take them.
void set_gradient(Job& job, Spans& spans, const Tensor& y, const Tensor& coef) {
  job.gradient = true;
  job.gradient_y = matrix_argument(y, "y", job.type);
  check_size(y, "y", 0, job.rows);
  check_size(y, "y", 1, job.cols);
  job.coef = floats_argument(coef, "coef", job.rows);
  spans.input(y);
  spans.input(coef);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ff_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& x_sqnorm, const std::string& normalize, double eps,
                                              const std::string& activation, const std::string& precision,
                                              bool return_p) {
  Job job;
  Spans spans;
  set_layer(job, spans, x, weight, bias, normalize, eps, activation);
  set_sqnorm(job, spans, x_sqnorm);
  Outputs out = set_outputs(job, return_p);
  run(job, precision);
  return {out.y, out.goodness, out.p};
}

std::tuple<Tensor, Tensor> ff_grad(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& x_sqnorm,
                                   const std::string& normalize, double eps, const std::string& activation,
                                   const OptionalTensor& row_term, const OptionalTensor& col_term,
                                   const std::string& precision) {
  Job job;
  Spans spans;
  set_layer(job, spans, x, weight, bias, normalize, eps, activation);
  set_sqnorm(job, spans, x_sqnorm);
  set_gradient(job, spans, y, coef);
  set_peers(job, spans, row_term, col_term);
  Tensor grad_weight = new_tensor<2>({job.cols, job.depth}, dtype_of(job.type));
  Tensor grad_bias = new_tensor<1>({bias ? job.cols : 0}, dtype_of(job.type));
  job.grad_weight = grad_weight.mutable_data_ptr();
  job.grad_bias = grad_bias.mutable_data_ptr();
  run(job, precision);
  return {grad_weight, grad_bias};
}

void ff_update_(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight, const OptionalTensor& bias,
                const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
                const std::vector<double>& hyper, const OptionalTensor& x_sqnorm, const std::string& normalize,
                double eps, const std::string& activation, const OptionalTensor& row_term,
                const OptionalTensor& col_term, const std::string& precision) {
  Job job;
  Spans spans;
  set_layer(job, spans, x, weight, bias, normalize, eps, activation);
  set_sqnorm(job, spans, x_sqnorm);
  set_gradient(job, spans, y, coef);
  set_peers(job, spans, row_term, col_term);
  check_hyper(hyper, 1);
  float* step = set_optimizer(job, spans, weight, bias, state.data(), static_cast<int64_t>(state.size()), optimizer,
                              pointer_to(lr), hyper.data());
  spans.check();
  run(job, precision);
  *step += 1.f;
}

void apply_gradient_(const Tensor& weight, const OptionalTensor& bias, const Tensors& state,
                     const std::string& optimizer, const OptionalTensor& lr, const std::vector<double>& hyper,
                     const Tensor& grad_weight, const OptionalTensor& grad_bias) {
  Job job;
  Spans spans;
  job.type = type_of(weight);
  job.weight = matrix_argument(weight, "weight", job.type);
  job.cols = weight.size(0);
  job.depth = weight.size(1);
  STD_TORCH_CHECK(job.depth > 0 && job.cols > 0, "weight: must not be empty");
  STD_TORCH_CHECK(bias.has_value() == grad_bias.has_value(), "grad_bias: must be given with a bias and only then");
  job.gradient = true;
  job.given_weight = static_cast<const float*>(checked_data(grad_weight, "grad_weight", 2, ScalarType::Float));
  check_size(grad_weight, "grad_weight", 0, job.cols);
  check_size(grad_weight, "grad_weight", 1, job.depth);
  STD_TORCH_CHECK(grad_weight.is_contiguous(), "grad_weight: must be contiguous");
  spans.input(grad_weight);
  if (bias) {
    const Floats given = floats_argument(grad_bias, "grad_bias", job.cols);
    STD_TORCH_CHECK(grad_bias->is_contiguous(), "grad_bias: must be contiguous");
    job.bias = checked_data(*bias, "bias", 1, dtype_of(job.type));
    job.given_bias = given.data;
    spans.input(*grad_bias);
  }
  check_hyper(hyper, 1);
  float* step = set_optimizer(job, spans, weight, bias, state.data(), static_cast<int64_t>(state.size()), optimizer,
                              pointer_to(lr), hyper.data());
  spans.check();
  run(job, "highest");
  *step += 1.f;
}

std::tuple<Tensor, Tensor, Tensor> ff_step_(const Tensor& x, const Tensor& sign, const Tensor& weight,
                                            const OptionalTensor& bias, const Tensors& state,
                                            const std::string& optimizer, const OptionalTensor& lr,
                                            const std::vector<double>& hyper, double threshold, double temperature,
                                            const std::string& goodness, const OptionalTensor& x_sqnorm,
                                            const std::string& normalize, double eps, const std::string& activation,
                                            const OptionalTensor& row_term, const OptionalTensor& col_term,
                                            const std::string& precision) {
  Job job;
  Spans spans;
  set_layer(job, spans, x, weight, bias, normalize, eps, activation);
  set_sqnorm(job, spans, x_sqnorm);
  set_loss(job, threshold, temperature, goodness);
  set_sign(job, spans, sign);
  set_peers(job, spans, row_term, col_term);
  check_hyper(hyper, 1);
  float* step = set_optimizer(job, spans, weight, bias, state.data(), static_cast<int64_t>(state.size()), optimizer,
                              pointer_to(lr), hyper.data());
  spans.check();
  Outputs out = set_outputs(job, false);
  Tensor loss = new_tensor<0>({}, ScalarType::Float);
  job.loss = static_cast<float*>(loss.mutable_data_ptr());
  run(job, precision);
  *step += 1.f;
  return {out.y, out.goodness, loss};
}

std::tuple<Tensor, Tensor> ff_network_step_(
    const Tensor& x, const OptionalTensor& sign, const OptionalTensor& x_sqnorm, const OptionalTensor& labels_pos,
    const OptionalTensor& labels_neg, int64_t num_classes, double strength, const Tensors& weights,
    const Tensors& biases, const Tensors& states, const std::vector<bool>& has_bias,
    const std::vector<int64_t>& state_sizes, const std::vector<std::string>& optimizers, const Tensors& lrs,
    const std::vector<double>& hypers, const std::vector<double>& thresholds, const std::vector<double>& temperatures,
    const std::vector<std::string>& goodness, const std::vector<std::string>& normalize, const std::vector<double>& eps,
    const std::vector<std::string>& activations, const std::vector<std::string>& precisions,
    const std::vector<double>& peers, const Tensors& peer_means, const std::vector<double>& dropouts,
    const OptionalTensor& dropout_seed) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && has_bias.size() == count && state_sizes.size() == count && optimizers.size() == count &&
                      thresholds.size() == count && temperatures.size() == count && goodness.size() == count &&
                      normalize.size() == count && eps.size() == count && activations.size() == count &&
                      precisions.size() == count && peers.size() == count && dropouts.size() == count &&
                      (lrs.empty() || lrs.size() == count),
                  "layers: every list must have an entry a layer");
  check_hyper(hypers, count);
  STD_TORCH_CHECK(labels_pos.has_value() == labels_neg.has_value() && labels_pos.has_value() != sign.has_value(),
                  "either sign or both labels must be given");
  const int64_t rows = x.size(0) * (labels_pos ? 2 : 1);
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
  int64_t widest = 0;
  size_t bias_at = 0, state_at = 0;
  for (size_t i = 0; i < count; ++i) {
    Job& job = jobs[i];
    STD_TORCH_CHECK(!has_bias[i] || bias_at < biases.size(), "biases: too few");
    STD_TORCH_CHECK(state_sizes[i] > 0 && state_at + state_sizes[i] <= states.size(), "states: too few");
    const OptionalTensor bias = has_bias[i] ? OptionalTensor(biases[bias_at++]) : std::nullopt;
    if (i == 0) {
      set_input(job, spans, x);
    } else {  // x.data follows below, when the memory between the layers is there
      job.type = jobs[0].type;
      job.rows = rows;
      job.depth = jobs[i - 1].cols;
      job.x = {nullptr, job.depth, 1};
      job.x_sqnorm = {total + (i - 1) * rows, 1};  // the goodness of the layer below
    }
    set_weight(job, weights[i], bias, normalize[i], eps[i], activations[i]);
    set_loss(job, thresholds[i], temperatures[i], goodness[i]);
    if (i == 0) {
      set_sqnorm(job, spans, x_sqnorm);
      if (labels_pos) {
        set_label_pair(job, spans, *labels_pos, *labels_neg, num_classes, strength);
      } else {
        set_sign(job, spans, *sign);
      }
    } else {
      job.sign = labels_pos ? Floats{signs.data(), 1} : jobs[0].sign;
    }
    steps[i] = set_optimizer(job, spans, weights[i], bias, &states[state_at], state_sizes[i], optimizers[i],
                             lrs.empty() ? nullptr : &lrs[i], &hypers[5 * i]);
    state_at += state_sizes[i];
    job.dropout = parse_dropout(dropouts[i], dropout_seed, i);
    if (job.dropout.on) job.x_sqnorm = {};  // of other values than the layer below gave
    if (peers[i] != 0.0) {
      STD_TORCH_CHECK(own_peers.size() < peer_means.size(), "peer_means: too few");
      own_peers.emplace_back(job, spans, peers[i], peer_means[own_peers.size()], rows);
    }
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
    run(jobs[i], precisions[i], true);
  }
  for (size_t i = 0; i < count; ++i) run(jobs[i], precisions[i]);
  for (float* step : steps) *step += 1.f;
  for (const Peers& own : own_peers) own.update();
  return {totals, losses};
}

std::tuple<Tensor, Tensor, Tensor> ff_label_forward(const Tensor& x, const Tensor& labels, const Tensor& weight,
                                                    const OptionalTensor& bias, int64_t num_classes, double strength,
                                                    const std::string& normalize, double eps,
                                                    const std::string& activation, const std::string& precision,
                                                    bool return_p) {
  Job job;
  Spans spans;
  set_layer(job, spans, x, weight, bias, normalize, eps, activation);
  STD_TORCH_CHECK(num_classes > 0 && num_classes <= job.depth, "num_classes: must be in [1, ", job.depth, "]");
  Labels& own = job.labels;
  own.label[0] = labels_argument(labels, "labels", 2, num_classes);
  check_size(labels, "labels", 0, job.rows);
  own.candidates = labels.size(1);
  own.num_classes = num_classes;
  own.strength = static_cast<float>(strength);
  own.row_stride[0] = labels.stride(0);
  own.candidate_stride = labels.stride(1);
  Outputs out = set_outputs(job, return_p);
  if (own.candidates > 0) run(job, precision);
  return {out.y, out.goodness, out.p};
}

std::tuple<Tensor, Tensor, Tensor> ff_label_step_(
    const Tensor& x, const Tensor& labels_pos, const Tensor& labels_neg, const Tensor& weight,
    const OptionalTensor& bias, const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
    const std::vector<double>& hyper, int64_t num_classes, double strength, double threshold, double temperature,
    const std::string& goodness, const std::string& normalize, double eps, const std::string& activation,
    const OptionalTensor& row_term, const OptionalTensor& col_term, const std::string& precision) {
  Job job;
  Spans spans;
  set_layer(job, spans, x, weight, bias, normalize, eps, activation);
  set_loss(job, threshold, temperature, goodness);
  set_label_pair(job, spans, labels_pos, labels_neg, num_classes, strength);
  set_peers(job, spans, row_term, col_term);
  check_hyper(hyper, 1);
  float* step = set_optimizer(job, spans, weight, bias, state.data(), static_cast<int64_t>(state.size()), optimizer,
                              pointer_to(lr), hyper.data());
  spans.check();
  Outputs out = set_outputs(job, false);
  Tensor loss = new_tensor<0>({}, ScalarType::Float);
  job.loss = static_cast<float*>(loss.mutable_data_ptr());
  run(job, precision);
  *step += 1.f;
  return {out.y, out.goodness, loss};
}

}  // namespace ffkernels::cpu
