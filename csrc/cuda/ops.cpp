// The ops on CUDA tensors: arguments are checked and become a Problem, results and scratch memory are allocated, the
// plan is launched. Whatever can fail happens before the first launch.
#include "cuda/ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <limits>

#include "arguments.h"
#include "cuda/launch.h"
#include "cuda/record.h"

namespace ffkernels::cuda {
namespace {

// A call on its way: what becomes its Problem, and the checks that all of its arguments share.
class Call {
 public:
  Call(const char* op, const Tensor& x) : place(place_of(x)), dtype(x.scalar_type()), spans(place) {
    STD_TORCH_CHECK(!place.on_cpu() || recording(), "x: must be on a CUDA device");
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "x: must be float32, bfloat16 or float16");
    problem.op = op;
    problem.labels.candidates = 1;
    if (!place.on_cpu()) guard_.emplace(place.index);
  }

  void add(const Layer& layer, const std::string& precision) {
    problem.layers.push_back(layer);
    problem.maths.push_back(math_of(precision));
  }

  // float32 of the given precision; bf16 and fp16 multiply in their own type.
  Math math_of(const std::string& precision) const {
    const auto parsed = parse<int, 3>(precision, "precision", {"highest", "high", "medium"});
    if (dtype != ScalarType::Float) return dtype == ScalarType::BFloat16 ? Math::bf16 : Math::fp16;
    return parsed == 0 ? Math::f32 : parsed == 1 ? Math::tf32 : Math::f32_bf16;
  }

  const void* data(const Tensor& t, const char* name, int64_t dim, ScalarType type) const {
    return checked_data(t, name, dim, type, place);
  }

  Matrix matrix(const Tensor& t, const char* name) const { return {data(t, name, 2, dtype), t.stride(0), t.stride(1)}; }

  Vector vector(const std::optional<Tensor>& t, const char* name, int64_t size) {
    if (!t) return {};
    const void* data = this->data(*t, name, 1, ScalarType::Float);
    check_size(*t, name, 0, size);
    spans.input(t);
    return {static_cast<const float*>(data), t->stride(0)};
  }

  template <size_t dim>
  Tensor new_tensor(const std::array<int64_t, dim>& sizes, ScalarType type) const {
    static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                         float16 = aoti_torch_dtype_float16(), uint8 = aoti_torch_dtype_uint8();
    std::array<int64_t, dim> strides;
    int64_t stride = 1;
    for (size_t d = dim; d-- > 0; stride *= sizes[d]) strides[d] = stride;
    AtenTensorHandle handle = nullptr;
    const int32_t code = type == ScalarType::BFloat16 ? bfloat16
                         : type == ScalarType::Half   ? float16
                         : type == ScalarType::Byte   ? uint8
                                                      : float32;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes.data(), strides.data(), code, place.type, place.index, &handle));
    return Tensor(handle);
  }

  // strength as a number of x's type
  float rounded(double value) const {
    const auto number = static_cast<float>(value);
    if (dtype == ScalarType::BFloat16) return static_cast<float>(torch::headeronly::BFloat16(number));
    return dtype == ScalarType::Half ? static_cast<float>(torch::headeronly::Half(number)) : number;
  }

  Place place;
  ScalarType dtype;
  Spans spans;
  Problem problem;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// One allocation for all the memory that a call needs beside its results. Parts are asked for first and placed later.
class Scratch {
 public:
  int64_t add(const char* name, int64_t bytes) {
    const int64_t offset = bytes_;
    if (bytes > 0) parts_.push_back({name, offset, bytes});
    bytes_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  void allocate(const Call& call) {
    tensor_ = call.new_tensor<1>({bytes_}, ScalarType::Byte);
    data_ = static_cast<char*>(tensor_->mutable_data_ptr());
  }
  char* at(int64_t offset) const { return data_ + offset; }
  const Tensor& tensor() const { return *tensor_; }
  const std::vector<Part>& parts() const { return parts_; }

 private:
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::optional<Tensor> tensor_;
  char* data_ = nullptr;
};

int32_t checked_int(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), name, ": is too large for the CUDA kernels");
  return static_cast<int32_t>(size);
}

// A layer on its input of `depth` columns.
Layer layer_of(Call& call, int64_t depth, const Tensor& weight, const OptionalTensor& bias,
               const std::string& normalize, double eps, const std::string& activation) {
  Layer layer{};
  layer.weight = call.matrix(weight, "weight");
  layer.depth = checked_int(depth, "x");
  layer.cols = checked_int(weight.size(0), "weight");
  STD_TORCH_CHECK(layer.depth > 0 && layer.cols > 0, "weight: must not be empty");
  check_size(weight, "weight", 1, depth);
  if (bias) {
    layer.bias = call.data(*bias, "bias", 1, call.dtype);
    layer.bias_stride = bias->stride(0);
    check_size(*bias, "bias", 0, layer.cols);
  }
  layer.normalize = parse<Normalize, 3>(normalize, "normalize", {"none", "l2", "rms"});
  layer.activation = parse<Activation, 5>(activation, "activation", {"relu", "leaky_relu", "gelu", "silu", "tanh"});
  layer.eps = static_cast<float>(eps);
  return layer;
}

void set_input(Call& call, Layer& layer, const Tensor& x) {
  layer.x = call.matrix(x, "x");
  call.problem.rows = checked_int(x.size(0) * call.problem.labels.candidates, "x");
  call.spans.input(x);
}

void set_peers(Call& call, Layer& layer, const OptionalTensor& row_term, const OptionalTensor& col_term) {
  STD_TORCH_CHECK(row_term.has_value() == col_term.has_value(), "row_term and col_term must be given together");
  layer.row_term = call.vector(row_term, "row_term", call.problem.rows);
  layer.col_term = call.vector(col_term, "col_term", layer.cols);
}

void set_loss(Layer& layer, double threshold, double temperature, const std::string& goodness) {
  STD_TORCH_CHECK(goodness == "mean" || goodness == "sum", "goodness: unknown value ", goodness);
  layer.threshold = static_cast<float>(threshold);
  layer.temperature = static_cast<float>(temperature);
  layer.divisor = goodness == "mean" ? static_cast<float>(layer.cols) : 1.f;
}

void set_labels(Call& call, const Tensor& x, int64_t num_classes, double strength) {
  STD_TORCH_CHECK(x.dim() == 2 && num_classes > 0 && num_classes <= x.size(1), "num_classes: must be in [1, K]");
  call.problem.labels.num_classes = static_cast<int32_t>(num_classes);
  call.problem.labels.strength = call.rounded(strength);
}

void set_label_pair(Call& call, const Tensor& x, const Tensor& labels_pos, const Tensor& labels_neg,
                    int64_t num_classes, double strength) {
  set_labels(call, x, num_classes, strength);
  Labels& labels = call.problem.labels;
  labels.candidates = 2;
  labels.separate = 1;
  call.problem.positive_rows = checked_int(x.size(0), "x");
  for (int c = 0; c < 2; ++c) {
    const Tensor& t = c == 0 ? labels_pos : labels_neg;
    const char* name = c == 0 ? "labels_pos" : "labels_neg";
    labels.label[c] = static_cast<const int64_t*>(call.data(t, name, 1, ScalarType::Long));
    labels.row_stride[c] = t.stride(0);
    check_size(t, name, 0, x.size(0));
    call.spans.input(t);
  }
}

// The in-place targets, and the step of an optimizer on them.
void set_optimizer(Call& call, Layer& layer, const Tensor& weight, const OptionalTensor& bias, const Tensor* state,
                   int64_t state_size, const std::string& kind, const Tensor* lr, const double* hyper) {
  Optimizer& o = layer.optimizer;
  const auto parsed = parse<int, 4>(kind, "optimizer", {"sgd", "adam", "adamw", "hinton_sgd"});
  o.kind = static_cast<OptimizerKind>(parsed + 1);  // 0 is store
  const bool adam = o.kind == OptimizerKind::adam || o.kind == OptimizerKind::adamw;
  const int64_t params = bias ? 2 : 1;
  const int64_t slots = adam ? 2 : o.kind == OptimizerKind::hinton_sgd || state_size > 1 ? 1 : 0;
  STD_TORCH_CHECK(state_size == 1 + slots * params, "state: has ", state_size, " tensors");
  call.spans.target(weight, "weight", {layer.cols, layer.depth}, call.dtype);
  if (bias) call.spans.target(*bias, "bias", {layer.cols}, call.dtype);
  const auto floats = [&](const Tensor& t, const char* name, std::vector<int64_t> sizes) {
    return static_cast<float*>(call.spans.target(t, name, std::move(sizes), ScalarType::Float));
  };
  o.step = floats(state[0], "step", {});
  for (int64_t i = 0; i < slots; ++i) {
    o.slot[i] = floats(state[1 + i], "state", {layer.cols, layer.depth});
    if (bias) o.bias_slot[i] = floats(state[1 + slots + i], "state", {layer.cols});
  }
  o.lr = static_cast<float>(hyper[0]);
  if (lr != nullptr) {
    o.lr_tensor = static_cast<const float*>(call.data(*lr, "lr", 0, ScalarType::Float));
    call.spans.input(*lr);
  }
  if (adam) {
    o.beta1 = static_cast<float>(hyper[1]);
    o.beta2 = static_cast<float>(hyper[2]);
    o.rest1 = static_cast<float>(1.0 - hyper[1]);
    o.rest2 = static_cast<float>(1.0 - hyper[2]);
    o.log_beta1 = static_cast<float>(std::log(hyper[1]));
    o.log_beta2 = static_cast<float>(std::log(hyper[2]));
    o.eps = static_cast<float>(hyper[3]);
    o.weight_decay = static_cast<float>(hyper[4]);
  } else if (o.kind == OptimizerKind::sgd) {
    o.momentum = static_cast<float>(hyper[1]);
    o.dampening = static_cast<float>(hyper[2]);
    o.weight_decay = static_cast<float>(hyper[3]);
    o.nesterov = hyper[4] != 0.0;
  } else {
    o.momentum = static_cast<float>(hyper[1]);
    o.weight_decay = static_cast<float>(hyper[2]);
  }
  layer.update = 1;
}

const Tensor* pointer_to(const OptionalTensor& t) { return t ? &*t : nullptr; }

void set_step(Call& call, Layer& layer, const Tensor& weight, const OptionalTensor& bias, const Tensors& state,
              const std::string& optimizer, const OptionalTensor& lr, const std::vector<double>& hyper) {
  check_hyper(hyper, 1);
  set_optimizer(call, layer, weight, bias, state.data(), static_cast<int64_t>(state.size()), optimizer, pointer_to(lr),
                hyper.data());
}

// Launches what the problem asks for; `scratch` holds what its layers need, and gets the workspace's parts. `place` is
// called once scratch has its memory, and sets the layers' pointers into it.
template <typename Place>
void run(Call& call, Scratch& scratch, const Place& place) {
  Problem& problem = call.problem;
  const bool records = recording();
  const Device& device = records ? recorded_device() : device_of(call.place.index);
  set_splits(problem, device);
  const WorkspaceSizes sizes = workspace_sizes(problem);
  void* stream = records ? nullptr : current_stream(call.place.index);
  Workspace workspace{};
  if (!records) workspace.words = words_of_stream(call.place.index, stream, sizes.words);
  const bool own_words = workspace.words == nullptr;
  const int64_t words = scratch.add("words", own_words ? 4 * sizes.words : 0);
  const int64_t partial = scratch.add("partial", 4 * sizes.partial);
  const int64_t loss_partial = scratch.add("loss_partial", 4 * sizes.loss_partial);
  const int64_t rows = scratch.add("rows", 4 * sizes.rows);
  const int64_t split = scratch.add("split", 4 * sizes.split);
  const int64_t columns = scratch.add("columns", 4 * sizes.columns);
  scratch.allocate(call);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(scratch.at(offset)); };
  workspace.partial = floats(partial);
  workspace.loss_partial = floats(loss_partial);
  workspace.rows = floats(rows);
  workspace.split = floats(split);
  workspace.columns = floats(columns);
  if (own_words) workspace.words = reinterpret_cast<uint32_t*>(scratch.at(words));
  place();
  const std::vector<Launch> launches = plan(problem, workspace, device);
  if (records) {
    record(launches, describe(problem), scratch.tensor(), scratch.parts());
    return;
  }
  if (own_words) set_to_zero(workspace.words, 4 * sizes.words, stream);
  cuda::run(launches, problem, stream);
}

int64_t padded(int64_t cols) { return (cols + kRowPad - 1) / kRowPad * kRowPad; }

struct Outputs {
  Tensor y, goodness, p;
};

// The results of a forward pass, in tensors of their own.
Outputs set_outputs(Call& call, Layer& layer, bool return_p) {
  const int64_t rows = call.problem.rows;
  Outputs out = {call.new_tensor<2>({rows, layer.cols}, call.dtype), call.new_tensor<1>({rows}, ScalarType::Float),
                 return_p ? call.new_tensor<2>({rows, layer.cols}, call.dtype) : call.new_tensor<1>({0}, call.dtype)};
  layer.forward = 1;
  layer.y = out.y.mutable_data_ptr();
  layer.p = return_p ? out.p.mutable_data_ptr() : nullptr;
  layer.y_stride = layer.cols;
  layer.goodness = static_cast<float*>(out.goodness.mutable_data_ptr());
  return out;
}

Outputs run_forward(Call& call, Layer& layer, const std::string& precision, bool return_p) {
  Outputs out = set_outputs(call, layer, return_p);
  if (call.problem.rows == 0) return out;
  Scratch scratch;
  call.add(layer, precision);
  run(call, scratch, [] {});
  return out;
}

// A layer's step, once its arguments are there.
std::tuple<Tensor, Tensor, Tensor> run_step(Call& call, Layer& layer, const std::string& precision) {
  STD_TORCH_CHECK(call.problem.rows > 0, "x: must have at least one row");
  call.spans.check();
  Outputs out = set_outputs(call, layer, false);
  Tensor loss = call.new_tensor<0>({}, ScalarType::Float);
  layer.loss = static_cast<float*>(loss.mutable_data_ptr());
  const bool curved = layer.activation != Activation::relu;
  Scratch scratch;
  const int64_t p = curved ? scratch.add("p", out.y.numel() * width_of(call.dtype)) : 0;
  call.add(layer, precision);
  run(call, scratch, [&] {
    Layer& placed = call.problem.layers[0];
    if (curved) placed.p = scratch.at(p);
    placed.gradient_y = {curved ? placed.p : placed.y, placed.y_stride, 1};
  });
  return {out.y, out.goodness, loss};
}

// y (or p) and coef, for the ops that take them.
void set_gradient(Call& call, Layer& layer, const Tensor& y, const Tensor& coef) {
  layer.gradient_y = call.matrix(y, "y");
  check_size(y, "y", 0, call.problem.rows);
  check_size(y, "y", 1, layer.cols);
  call.spans.input(y);
  layer.coef = call.vector(coef, "coef", call.problem.rows);
  layer.update = 1;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ff_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& x_sqnorm, const std::string& normalize, double eps,
                                              const std::string& activation, const std::string& precision,
                                              bool return_p) {
  Call call("ff_forward", x);
  Layer layer = layer_of(call, x.size(1), weight, bias, normalize, eps, activation);
  set_input(call, layer, x);
  layer.x_sqnorm = call.vector(x_sqnorm, "x_sqnorm", call.problem.rows);
  Outputs out = run_forward(call, layer, precision, return_p);
  return {out.y, out.goodness, out.p};
}

std::tuple<Tensor, Tensor> ff_grad(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& x_sqnorm,
                                   const std::string& normalize, double eps, const std::string& activation,
                                   const OptionalTensor& row_term, const OptionalTensor& col_term,
                                   const std::string& precision) {
  Call call("ff_grad", x);
  Layer layer = layer_of(call, x.size(1), weight, bias, normalize, eps, activation);
  set_input(call, layer, x);
  layer.x_sqnorm = call.vector(x_sqnorm, "x_sqnorm", call.problem.rows);
  set_gradient(call, layer, y, coef);
  set_peers(call, layer, row_term, col_term);
  Tensor grad_weight = call.new_tensor<2>({layer.cols, layer.depth}, call.dtype);
  Tensor grad_bias = call.new_tensor<1>({bias ? layer.cols : 0}, call.dtype);
  layer.grad_weight = grad_weight.mutable_data_ptr();
  layer.grad_bias = bias ? grad_bias.mutable_data_ptr() : nullptr;
  layer.optimizer.kind = OptimizerKind::store;
  Scratch scratch;
  call.add(layer, precision);
  run(call, scratch, [] {});
  return {grad_weight, grad_bias};
}

void ff_update_(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight, const OptionalTensor& bias,
                const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
                const std::vector<double>& hyper, const OptionalTensor& x_sqnorm, const std::string& normalize,
                double eps, const std::string& activation, const OptionalTensor& row_term,
                const OptionalTensor& col_term, const std::string& precision) {
  Call call("ff_update_", x);
  Layer layer = layer_of(call, x.size(1), weight, bias, normalize, eps, activation);
  set_input(call, layer, x);
  layer.x_sqnorm = call.vector(x_sqnorm, "x_sqnorm", call.problem.rows);
  set_gradient(call, layer, y, coef);
  set_peers(call, layer, row_term, col_term);
  set_step(call, layer, weight, bias, state, optimizer, lr, hyper);
  call.spans.check();
  Scratch scratch;
  call.add(layer, precision);
  run(call, scratch, [] {});
}

std::tuple<Tensor, Tensor, Tensor> ff_step_(const Tensor& x, const Tensor& sign, const Tensor& weight,
                                            const OptionalTensor& bias, const Tensors& state,
                                            const std::string& optimizer, const OptionalTensor& lr,
                                            const std::vector<double>& hyper, double threshold, double temperature,
                                            const std::string& goodness, const OptionalTensor& x_sqnorm,
                                            const std::string& normalize, double eps, const std::string& activation,
                                            const OptionalTensor& row_term, const OptionalTensor& col_term,
                                            const std::string& precision) {
  Call call("ff_step_", x);
  Layer layer = layer_of(call, x.size(1), weight, bias, normalize, eps, activation);
  set_input(call, layer, x);
  layer.x_sqnorm = call.vector(x_sqnorm, "x_sqnorm", call.problem.rows);
  layer.sign = call.vector(sign, "sign", call.problem.rows);
  set_loss(layer, threshold, temperature, goodness);
  set_peers(call, layer, row_term, col_term);
  set_step(call, layer, weight, bias, state, optimizer, lr, hyper);
  return run_step(call, layer, precision);
}

std::tuple<Tensor, Tensor, Tensor> ff_label_forward(const Tensor& x, const Tensor& labels, const Tensor& weight,
                                                    const OptionalTensor& bias, int64_t num_classes, double strength,
                                                    const std::string& normalize, double eps,
                                                    const std::string& activation, const std::string& precision,
                                                    bool return_p) {
  Call call("ff_label_forward", x);
  set_labels(call, x, num_classes, strength);
  Labels& own = call.problem.labels;
  own.label[0] = static_cast<const int64_t*>(call.data(labels, "labels", 2, ScalarType::Long));
  check_size(labels, "labels", 0, x.size(0));
  own.candidates = checked_int(labels.size(1), "labels");
  own.row_stride[0] = labels.stride(0);
  own.candidate_stride = labels.stride(1);
  Layer layer = layer_of(call, x.size(1), weight, bias, normalize, eps, activation);
  set_input(call, layer, x);
  Outputs out = run_forward(call, layer, precision, return_p);
  return {out.y, out.goodness, out.p};
}

std::tuple<Tensor, Tensor, Tensor> ff_label_step_(
    const Tensor& x, const Tensor& labels_pos, const Tensor& labels_neg, const Tensor& weight,
    const OptionalTensor& bias, const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
    const std::vector<double>& hyper, int64_t num_classes, double strength, double threshold, double temperature,
    const std::string& goodness, const std::string& normalize, double eps, const std::string& activation,
    const OptionalTensor& row_term, const OptionalTensor& col_term, const std::string& precision) {
  Call call("ff_label_step_", x);
  set_label_pair(call, x, labels_pos, labels_neg, num_classes, strength);
  Layer layer = layer_of(call, x.size(1), weight, bias, normalize, eps, activation);
  set_input(call, layer, x);
  set_loss(layer, threshold, temperature, goodness);
  set_peers(call, layer, row_term, col_term);
  set_step(call, layer, weight, bias, state, optimizer, lr, hyper);
  return run_step(call, layer, precision);
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
  Call call("ff_network_step_", x);
  if (labels_pos) set_label_pair(call, x, *labels_pos, *labels_neg, num_classes, strength);
  Problem& problem = call.problem;
  problem.layers.reserve(count);
  const int64_t width = width_of(call.dtype);
  bool any_dropout = false, any_curved = false;
  int64_t widest = 0;
  size_t bias_at = 0, state_at = 0, peer_at = 0;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(!has_bias[i] || bias_at < biases.size(), "biases: too few");
    STD_TORCH_CHECK(state_sizes[i] > 0 && state_at + state_sizes[i] <= states.size(), "states: too few");
    const OptionalTensor bias = has_bias[i] ? OptionalTensor(biases[bias_at++]) : std::nullopt;
    const int64_t depth = i == 0 ? x.size(1) : problem.layers[i - 1].cols;
    Layer layer = layer_of(call, depth, weights[i], bias, normalize[i], eps[i], activations[i]);
    if (i == 0) {
      set_input(call, layer, x);
      layer.x_sqnorm = call.vector(x_sqnorm, "x_sqnorm", problem.rows);
    }
    if (sign) layer.sign = call.vector(sign, "sign", problem.rows);
    set_loss(layer, thresholds[i], temperatures[i], goodness[i]);
    set_optimizer(call, layer, weights[i], bias, &states[state_at], state_sizes[i], optimizers[i],
                  lrs.empty() ? nullptr : &lrs[i], &hypers[5 * i]);
    state_at += state_sizes[i];
    if (peers[i] != 0) {
      STD_TORCH_CHECK(peer_at < peer_means.size(), "peer_means: too few");
      layer.peer_mean =
          static_cast<float*>(call.spans.target(peer_means[peer_at++], "peer_mean", {layer.cols}, ScalarType::Float));
      layer.peer = static_cast<float>(peers[i]);
    }
    STD_TORCH_CHECK(dropouts[i] >= 0 && dropouts[i] < 1 && (i > 0 || dropouts[i] == 0), "dropouts: out of range");
    layer.dropout = dropouts[i];
    layer.layer_index = static_cast<int32_t>(i);
    any_dropout |= dropouts[i] > 0;
    any_curved |= layer.activation != Activation::relu;
    widest = std::max<int64_t>(widest, padded(layer.cols));
    layer.forward = 1;
    call.add(layer, precisions[i]);
  }
  STD_TORCH_CHECK(problem.rows > 0, "x: must have at least one row");
  if (any_dropout) {
    STD_TORCH_CHECK(dropout_seed.has_value(), "dropout_seed: must be given where a layer has dropout");
    problem.dropout_seed = static_cast<const int64_t*>(call.data(*dropout_seed, "dropout_seed", 1, ScalarType::Long));
    check_size(*dropout_seed, "dropout_seed", 0, 1);
    call.spans.input(dropout_seed);
  }
  call.spans.check();

  // Stage l writes y of layer l and reads those of layers l - 1 and l - 2: three buffers in turn. Of p the last two are
  // in use, of the dropped inputs three.
  const int64_t rows = problem.rows, bytes = rows * widest * width;
  Scratch scratch;
  std::array<int64_t, 3> y{}, p{}, dropped{};
  for (size_t i = 0; i < std::min<size_t>(count, 3); ++i) {
    y[i] = scratch.add(i == 0 ? "y0" : i == 1 ? "y1" : "y2", bytes);
    if (any_curved && i < 2) p[i] = scratch.add(i == 0 ? "p0" : "p1", bytes);
    if (any_dropout) dropped[i] = scratch.add(i == 0 ? "dropped0" : i == 1 ? "dropped1" : "dropped2", bytes);
  }
  const int64_t sqnorms = scratch.add("dropped_sqnorm", any_dropout ? 4 * rows * static_cast<int64_t>(count) : 0);
  Tensor totals = call.new_tensor<2>({static_cast<int64_t>(count), rows}, ScalarType::Float);
  Tensor losses = call.new_tensor<1>({static_cast<int64_t>(count)}, ScalarType::Float);
  auto* total = static_cast<float*>(totals.mutable_data_ptr());
  auto* loss = static_cast<float*>(losses.mutable_data_ptr());
  run(call, scratch, [&] {
    for (size_t i = 0; i < count; ++i) {
      Layer& layer = problem.layers[i];
      const bool curved = layer.activation != Activation::relu;
      layer.y = scratch.at(y[i % 3]);
      layer.p = curved ? scratch.at(p[i % 2]) : nullptr;
      layer.y_stride = padded(layer.cols);
      layer.gradient_y = {curved ? layer.p : layer.y, layer.y_stride, 1};
      layer.goodness = total + i * rows;
      layer.loss = loss + i;
      if (i == 0) continue;
      const Layer& below = problem.layers[i - 1];
      const bool drops = layer.dropout > 0;
      layer.x = {drops ? scratch.at(dropped[i % 3]) : below.y, below.y_stride, 1};
      layer.x_sqnorm = {drops ? reinterpret_cast<float*>(scratch.at(sqnorms)) + i * rows : below.goodness, 1};
    }
  });
  return {totals, losses};
}

}  // namespace ffkernels::cuda
