// The CUDA kernels that ops.cpp registers. Their schemas, and what the arguments mean, are in ffkernels/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ffkernels::cuda {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor, Tensor> ff_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& x_sqnorm, const std::string& normalize, double eps,
                                              const std::string& activation, const std::string& precision,
                                              bool return_p);

std::tuple<Tensor, Tensor> ff_grad(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& x_sqnorm,
                                   const std::string& normalize, double eps, const std::string& activation,
                                   const OptionalTensor& row_term, const OptionalTensor& col_term,
                                   const std::string& precision);

void ff_update_(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight, const OptionalTensor& bias,
                const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
                const std::vector<double>& hyper, const OptionalTensor& x_sqnorm, const std::string& normalize,
                double eps, const std::string& activation, const OptionalTensor& row_term,
                const OptionalTensor& col_term, const std::string& precision);

std::tuple<Tensor, Tensor, Tensor> ff_step_(const Tensor& x, const Tensor& sign, const Tensor& weight,
                                            const OptionalTensor& bias, const Tensors& state,
                                            const std::string& optimizer, const OptionalTensor& lr,
                                            const std::vector<double>& hyper, double threshold, double temperature,
                                            const std::string& goodness, const OptionalTensor& x_sqnorm,
                                            const std::string& normalize, double eps, const std::string& activation,
                                            const OptionalTensor& row_term, const OptionalTensor& col_term,
                                            const std::string& precision);

std::tuple<Tensor, Tensor> ff_network_step_(
    const Tensor& x, const OptionalTensor& sign, const OptionalTensor& x_sqnorm, const OptionalTensor& labels_pos,
    const OptionalTensor& labels_neg, int64_t num_classes, double strength, const Tensors& weights,
    const Tensors& biases, const Tensors& states, const std::vector<bool>& has_bias,
    const std::vector<int64_t>& state_sizes, const std::vector<std::string>& optimizers, const Tensors& lrs,
    const std::vector<double>& hypers, const std::vector<double>& thresholds, const std::vector<double>& temperatures,
    const std::vector<std::string>& goodness, const std::vector<std::string>& normalize, const std::vector<double>& eps,
    const std::vector<std::string>& activations, const std::vector<std::string>& precisions,
    const std::vector<double>& peers, const Tensors& peer_means, const std::vector<double>& dropouts,
    const OptionalTensor& dropout_seed);

std::tuple<Tensor, Tensor, Tensor> ff_label_forward(const Tensor& x, const Tensor& labels, const Tensor& weight,
                                                    const OptionalTensor& bias, int64_t num_classes, double strength,
                                                    const std::string& normalize, double eps,
                                                    const std::string& activation, const std::string& precision,
                                                    bool return_p);

std::tuple<Tensor, Tensor, Tensor> ff_label_step_(
    const Tensor& x, const Tensor& labels_pos, const Tensor& labels_neg, const Tensor& weight,
    const OptionalTensor& bias, const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
    const std::vector<double>& hyper, int64_t num_classes, double strength, double threshold, double temperature,
    const std::string& goodness, const std::string& normalize, double eps, const std::string& activation,
    const OptionalTensor& row_term, const OptionalTensor& col_term, const std::string& precision);

}  // namespace ffkernels::cuda
