// The ops on one layer of CUDA tensors.
#include "cuda/call.h"

namespace ffkernels::cuda {
namespace {

Layer layer_of(Call& call, const LayerArguments& a) {
  Layer layer = layer_of(call, a.x.size(1), a.weight, a.bias, a.normalize, a.eps, a.activation);
  set_input(call, layer, a.x);
  layer.x_sqnorm = call.vector(a.x_sqnorm, "x_sqnorm", call.problem.rows);
  return layer;
}

void set_peers(Call& call, Layer& layer, const LayerArguments& a) {
  check_peers(a);
  layer.row_term = call.vector(a.row_term, "row_term", call.problem.rows);
  layer.col_term = call.vector(a.col_term, "col_term", layer.cols);
}

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

Three run_forward(Call& call, Layer& layer, const std::string& precision, bool return_p) {
  Outputs out = set_outputs(call, layer, return_p);
  if (call.problem.rows > 0) {
    Scratch scratch;
    call.add(layer, precision);
    run(call, scratch, [] {});
  }
  return {out.y, out.goodness, out.p};
}

// A layer's step, once its arguments are there.
Three run_step(Call& call, Layer& layer, const LayerArguments& a, const LossArguments& loss,
               const FlatOptimizer& optimizer) {
  set_loss(layer, loss);
  set_peers(call, layer, a);
  set_optimizer(call, layer, a.weight, a.bias, optimizer);
  STD_TORCH_CHECK(call.problem.rows > 0, "x: must have at least one row");
  call.spans.check();
  Outputs out = set_outputs(call, layer, false);
  Tensor mean = call.new_tensor<0>({}, ScalarType::Float);
  layer.loss = static_cast<float*>(mean.mutable_data_ptr());
  const bool curved = layer.activation != Activation::relu;
  Scratch scratch;
  const int64_t p = curved ? scratch.add("p", out.y.numel() * width_of(call.dtype)) : 0;
  call.add(layer, a.precision);
  run(call, scratch, [&] {
    Layer& placed = call.problem.layers[0];
    if (curved) placed.p = scratch.at(p);
    placed.gradient_y = {curved ? placed.p : placed.y, placed.y_stride, 1};
  });
  return {out.y, out.goodness, mean};
}

void set_gradient(Call& call, Layer& layer, const GradientArguments& gradient) {
  const auto& [y, coef] = gradient;
  layer.gradient_y = call.matrix(y, "y");
  check_size(y, "y", 0, call.problem.rows);
  check_size(y, "y", 1, layer.cols);
  call.spans.input(y);
  layer.coef = call.vector(coef, "coef", call.problem.rows);
  layer.update = 1;
}

}  // namespace

Three ff_forward(const LayerArguments& a, bool return_p) {
  Call call("ff_forward", a.x);
  Layer layer = layer_of(call, a);
  return run_forward(call, layer, a.precision, return_p);
}

Two ff_grad(const LayerArguments& a, const GradientArguments& gradient) {
  Call call("ff_grad", a.x);
  Layer layer = layer_of(call, a);
  set_gradient(call, layer, gradient);
  set_peers(call, layer, a);
  Tensor grad_weight = call.new_tensor<2>({layer.cols, layer.depth}, call.dtype);
  Tensor grad_bias = call.new_tensor<1>({a.bias ? layer.cols : 0}, call.dtype);
  layer.grad_weight = grad_weight.mutable_data_ptr();
  layer.grad_bias = a.bias ? grad_bias.mutable_data_ptr() : nullptr;
  layer.optimizer.kind = OptimizerKind::store;
  Scratch scratch;
  call.add(layer, a.precision);
  run(call, scratch, [] {});
  return {grad_weight, grad_bias};
}

void ff_update_(const LayerArguments& a, const GradientArguments& gradient, const FlatOptimizer& optimizer) {
  Call call("ff_update_", a.x);
  Layer layer = layer_of(call, a);
  set_gradient(call, layer, gradient);
  set_peers(call, layer, a);
  set_optimizer(call, layer, a.weight, a.bias, optimizer);
  call.spans.check();
  Scratch scratch;
  call.add(layer, a.precision);
  run(call, scratch, [] {});
}

void apply_gradient_(const Tensor& weight, const OptionalTensor& bias, const FlatOptimizer& optimizer,
                     const Tensor& grad_weight, const OptionalTensor& grad_bias) {
  Call call("apply_gradient_", weight);
  Layer layer = layer_of(call, weight.size(1), weight, bias, "none", 0.0, "relu");
  const GivenGradient given = given_gradient(call.spans, weight, bias, grad_weight, grad_bias);
  layer.given_weight = given.weight;
  layer.given_bias = given.bias;
  set_optimizer(call, layer, weight, bias, optimizer);
  call.spans.check();
  Scratch scratch;
  call.add(layer, "highest");
  run(call, scratch, [] {});
}

Three ff_step_(const LayerArguments& a, const Tensor& sign, const LossArguments& loss, const FlatOptimizer& optimizer) {
  Call call("ff_step_", a.x);
  Layer layer = layer_of(call, a);
  layer.sign = call.vector(sign, "sign", call.problem.rows);
  return run_step(call, layer, a, loss, optimizer);
}

Three ff_label_forward(const LayerArguments& a, const Tensor& labels, int64_t num_classes, double strength,
                       bool return_p) {
  Call call("ff_label_forward", a.x);
  set_labels(call, a.x, num_classes, strength);
  Labels& own = call.problem.labels;
  own.label[0] = static_cast<const int64_t*>(call.data(labels, "labels", 2, ScalarType::Long));
  check_size(labels, "labels", 0, a.x.size(0));
  own.candidates = checked_int(labels.size(1), "labels");
  own.row_stride[0] = labels.stride(0);
  own.candidate_stride = labels.stride(1);
  Layer layer = layer_of(call, a);
  return run_forward(call, layer, a.precision, return_p);
}

Three ff_label_step_(const LayerArguments& a, const LabelPair& labels, const LossArguments& loss,
                     const FlatOptimizer& optimizer) {
  Call call("ff_label_step_", a.x);
  set_label_pair(call, a.x, labels);
  Layer layer = layer_of(call, a);
  return run_step(call, layer, a, loss, optimizer);
}

}  // namespace ffkernels::cuda
