// The CPU kernels that ops.cpp registers. Their schemas, and what the arguments mean, are in ffkernels/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace ffkernels::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> ff_forward(const Tensor& x,                        // (M, K)
                                              const Tensor& weight,                   // (N, K)
                                              const std::optional<Tensor>& bias,      // (N,)
                                              const std::optional<Tensor>& x_sqnorm,  // (M,) float32
                                              const std::string& normalize, double eps, const std::string& activation,
                                              const std::string& precision, bool return_p);

}  // namespace ffkernels::cpu
