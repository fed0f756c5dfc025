// The kernels that ops.cpp registers, of each device. Their schemas, and what the arguments mean, are in
// ffkernels/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ffkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
struct NetworkArguments;

using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& x_sqnorm, const std::string& normalize,
                                                   double eps, const std::string& activation,
                                                   const std::string& precision, bool return_p);

using Gradient = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& x_sqnorm,
                                            const std::string& normalize, double eps, const std::string& activation,
                                            const OptionalTensor& row_term, const OptionalTensor& col_term,
                                            const std::string& precision);

using Update = void(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight,
                    const OptionalTensor& bias, const Tensors& state, const std::string& optimizer,
                    const OptionalTensor& lr, const std::vector<double>& hyper, const OptionalTensor& x_sqnorm,
                    const std::string& normalize, double eps, const std::string& activation,
                    const OptionalTensor& row_term, const OptionalTensor& col_term, const std::string& precision);

using ApplyGradient = void(const Tensor& weight, const OptionalTensor& bias, const Tensors& state,
                           const std::string& optimizer, const OptionalTensor& lr, const std::vector<double>& hyper,
                           const Tensor& grad_weight, const OptionalTensor& grad_bias);

using Step = std::tuple<Tensor, Tensor, Tensor>(const Tensor& x, const Tensor& sign, const Tensor& weight,
                                                const OptionalTensor& bias, const Tensors& state,
                                                const std::string& optimizer, const OptionalTensor& lr,
                                                const std::vector<double>& hyper, double threshold, double temperature,
                                                const std::string& goodness, const OptionalTensor& x_sqnorm,
                                                const std::string& normalize, double eps, const std::string& activation,
                                                const OptionalTensor& row_term, const OptionalTensor& col_term,
                                                const std::string& precision);

using NetworkStep = std::tuple<Tensor, Tensor>(const NetworkArguments& network);

using LabelForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor& x, const Tensor& labels, const Tensor& weight,
                                                        const OptionalTensor& bias, int64_t num_classes,
                                                        double strength, const std::string& normalize, double eps,
                                                        const std::string& activation, const std::string& precision,
                                                        bool return_p);

using LabelStep = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& x, const Tensor& labels_pos, const Tensor& labels_neg, const Tensor& weight,
    const OptionalTensor& bias, const Tensors& state, const std::string& optimizer, const OptionalTensor& lr,
    const std::vector<double>& hyper, int64_t num_classes, double strength, double threshold, double temperature,
    const std::string& goodness, const std::string& normalize, double eps, const std::string& activation,
    const OptionalTensor& row_term, const OptionalTensor& col_term, const std::string& precision);

namespace cpu {

Forward ff_forward;
Gradient ff_grad;
Update ff_update_;
ApplyGradient apply_gradient_;
Step ff_step_;
NetworkStep ff_network_step_;
LabelForward ff_label_forward;
LabelStep ff_label_step_;

}  // namespace cpu

namespace cuda {

Forward ff_forward;
Gradient ff_grad;
Update ff_update_;
ApplyGradient apply_gradient_;
Step ff_step_;
NetworkStep ff_network_step_;
LabelForward ff_label_forward;
LabelStep ff_label_step_;

}  // namespace cuda
}  // namespace ffkernels
