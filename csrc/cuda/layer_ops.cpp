// The ops on one layer of CUDA tensors.
#include "cuda/call.h"

namespace ffkernels::cuda {
namespace {

void set_peers(Call& call, Layer& layer, const OptionalTensor& row_term, const OptionalTensor& col_term) {
  STD_TORCH_CHECK(row_term.has_value() == col_term.has_value(), "row_term and col_term must be given together");
  layer.row_term = call.vector(row_term, "row_term", call.problem.rows);
  layer.col_term = call.vector(col_term, "col_term", layer.cols);
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
  set_optimizer(call, layer, weight, bias, {optimizer, state, lr, hyper});
  call.spans.check();
  Scratch scratch;
  call.add(layer, precision);
  run(call, scratch, [] {});
}

void apply_gradient_(const Tensor& weight, const OptionalTensor& bias, const Tensors& state,
                     const std::string& optimizer, const OptionalTensor& lr, const std::vector<double>& hyper,
                     const Tensor& grad_weight, const OptionalTensor& grad_bias) {
  Call call("apply_gradient_", weight);
  Layer layer = layer_of(call, weight.size(1), weight, bias, "none", 0.0, "relu");
  const GivenGradient given = given_gradient(call.spans, weight, bias, grad_weight, grad_bias);
  layer.given_weight = given.weight;
  layer.given_bias = given.bias;
  set_optimizer(call, layer, weight, bias, {optimizer, state, lr, hyper});
  call.spans.check();
  Scratch scratch;
  call.add(layer, "highest");
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
  set_optimizer(call, layer, weight, bias, {optimizer, state, lr, hyper});
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
  set_optimizer(call, layer, weight, bias, {optimizer, state, lr, hyper});
  return run_step(call, layer, precision);
}

}  // namespace ffkernels::cuda
