// An optimizer's step as an op's arguments give it: checked, and its numbers by name.
#pragma once

#include "arguments.h"

namespace ffkernels {

enum class OptimizerName { sgd, adam, adamw, hinton_sgd };

// As it stands in an op's arguments.
struct FlatOptimizer {
  const std::string& name;
  const Tensor* state;
  int64_t state_size;
  const Tensor* lr;     // null: it is a number, the first of hyper
  const double* hyper;  // 5 of them: Optimizer.hyper in ffkernels/optim.py

  FlatOptimizer(const std::string& name, const Tensor* state, int64_t state_size, const Tensor* lr, const double* hyper)
      : name(name), state(state), state_size(state_size), lr(lr), hyper(hyper) {}
  // of an op on one layer
  FlatOptimizer(const std::string& name, const std::vector<Tensor>& state, const std::optional<Tensor>& lr,
                const std::vector<double>& hyper)
      : FlatOptimizer(name, state.data(), static_cast<int64_t>(state.size()), lr ? &*lr : nullptr, hyper.data()) {
    check_hyper(hyper, 1);
  }
};

struct OptimizerArguments {
  OptimizerName name;
  void *weight, *bias;                      // (N, K), (N,): updated; null without a bias
  float* step;                              // (): updated
  float *slot[2] = {}, *bias_slot[2] = {};  // like weight and bias: momentum_buffer, or exp_avg and exp_avg_sq
  const float* lr_tensor = nullptr;
  double lr, weight_decay = 0, momentum = 0, dampening = 0, beta1 = 0, beta2 = 0, eps = 0;
  bool nesterov = false;

  bool adam() const { return name == OptimizerName::adam || name == OptimizerName::adamw; }
};

// For a weight that is known to be a matrix; the targets and lr are noted in `spans`.
inline OptimizerArguments optimizer_arguments(Spans& spans, const Tensor& weight, const std::optional<Tensor>& bias,
                                              ScalarType dtype, const FlatOptimizer& flat) {
  OptimizerArguments o{};
  o.name = parse<OptimizerName, 4>(flat.name, "optimizer", {"sgd", "adam", "adamw", "hinton_sgd"});
  const int64_t cols = weight.size(0), depth = weight.size(1), params = bias ? 2 : 1;
  const int64_t slots = o.adam() ? 2 : o.name == OptimizerName::sgd && flat.state_size == 1 ? 0 : 1;
  STD_TORCH_CHECK(flat.state_size == 1 + slots * params, "state: has ", flat.state_size, " tensors");
  const auto floats = [&](const Tensor& t, const char* name, std::vector<int64_t> sizes) {
    return static_cast<float*>(spans.target(t, name, std::move(sizes), ScalarType::Float));
  };
  o.weight = spans.target(weight, "weight", {cols, depth}, dtype);
  o.bias = bias ? spans.target(*bias, "bias", {cols}, dtype) : nullptr;
  o.step = floats(flat.state[0], "step", {});
  for (int64_t i = 0; i < slots; ++i) {
    o.slot[i] = floats(flat.state[1 + i], "state", {cols, depth});
    if (bias) o.bias_slot[i] = floats(flat.state[1 + slots + i], "state", {cols});
  }
  if (flat.lr != nullptr) {
    o.lr_tensor = static_cast<const float*>(checked_data(*flat.lr, "lr", 0, ScalarType::Float, spans.place()));
    spans.input(*flat.lr);
  }
  const double* hyper = flat.hyper;
  o.lr = hyper[0];
  if (o.adam()) {
    o.beta1 = hyper[1], o.beta2 = hyper[2], o.eps = hyper[3], o.weight_decay = hyper[4];
  } else if (o.name == OptimizerName::sgd) {
    o.momentum = hyper[1], o.dampening = hyper[2], o.weight_decay = hyper[3], o.nesterov = hyper[4] != 0.0;
  } else {
    o.momentum = hyper[1], o.weight_decay = hyper[2];
  }
  return o;
}

// A gradient that is there already, for a weight (N, K) and a bias that are known to be: float32 and contiguous.
struct GivenGradient {
  const float *weight, *bias;
};

inline GivenGradient given_gradient(Spans& spans, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Tensor& grad_weight, const std::optional<Tensor>& grad_bias) {
  STD_TORCH_CHECK(bias.has_value() == grad_bias.has_value(), "grad_bias: must be given with a bias and only then");
  const auto data = [&](const Tensor& t, const char* name, int64_t dim) {
    const void* data = checked_data(t, name, dim, ScalarType::Float, spans.place());
    for (int64_t d = 0; d < dim; ++d) check_size(t, name, d, weight.size(d));
    STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
    spans.input(t);
    return static_cast<const float*>(data);
  };
  return {data(grad_weight, "grad_weight", 2), bias ? data(*grad_bias, "grad_bias", 1) : nullptr};
}

}  // namespace ffkernels
