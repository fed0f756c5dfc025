// The arguments of the ops on one layer, in groups that several of them share. What they mean is in ffkernels/ops.py.
#pragma once

#include <cmath>

#include "optimizer_arguments.h"

namespace ffkernels {

using OptionalTensor = std::optional<Tensor>;

struct LayerArguments {
  const Tensor &x, &weight;
  const OptionalTensor &bias, &x_sqnorm;
  const std::string& normalize;
  double eps;
  const std::string& activation;
  const OptionalTensor &row_term, &col_term;
  const std::string& precision;
};

struct LossArguments {
  double threshold, temperature;
  const std::string& goodness;

  // E: what the goodness of a layer of `cols` columns is divided by.
  float divisor(int64_t cols) const {
    STD_TORCH_CHECK(goodness == "mean" || goodness == "sum", "goodness: unknown value ", goodness);
    return goodness == "mean" ? static_cast<float>(cols) : 1.f;
  }
};

// y (or p) and coef, for the ops that take them.
struct GradientArguments {
  const Tensor &y, &coef;
};

struct LabelPair {
  const Tensor &positive, &negative;
  int64_t num_classes;
  double strength;
};

// Of the softmax head, in the order of the schema; an entry for each layer that it sees, states in their order.
struct HeadArguments {
  const std::vector<Tensor>&ys, &sqnorms;
  const Tensor& labels;
  const std::vector<Tensor>&weights, &states;
  const std::string& optimizer;
  const OptionalTensor& lr;
  const std::vector<double>& hyper;
  double eps;
};

// The enumerations of either device have these orders.
template <typename Enum>
Enum parse_normalize(const std::string& value) {
  return parse<Enum, 3>(value, "normalize", {"none", "l2", "rms"});
}
template <typename Enum>
Enum parse_activation(const std::string& value) {
  return parse<Enum, 5>(value, "activation", {"relu", "leaky_relu", "gelu", "silu", "tanh"});
}
template <typename Enum>
Enum parse_precision(const std::string& value) {
  return parse<Enum, 3>(value, "precision", {"highest", "high", "medium"});
}

// A finite number >= low, or > low.
inline void check_number(double value, const char* name, double low, bool above = false) {
  STD_TORCH_CHECK(std::isfinite(value) && (above ? value > low : value >= low), name, ": must be finite and ",
                  above ? "> " : ">= ", low);
}

// What labels write into x, finite as a number of its dtype.
inline void check_strength(double strength, ScalarType dtype) {
  const double largest = dtype == ScalarType::Half       ? 65504.0
                         : dtype == ScalarType::BFloat16 ? 0x1.fep127
                                                         : 0x1.fffffep127;
  STD_TORCH_CHECK(std::fabs(strength) <= largest, "strength: must be finite in x's dtype");
}

inline void check_num_classes(int64_t num_classes, int64_t depth) {
  STD_TORCH_CHECK(num_classes > 0 && num_classes <= depth, "num_classes: must be in [1, ", depth, "]");
}

inline void check_peers(const LayerArguments& a) {
  STD_TORCH_CHECK(a.row_term.has_value() == a.col_term.has_value(), "row_term and col_term must be given together");
}

// What a layer's weight and bias must be, once the number of its input's columns is known.
inline void check_layer_sizes(const Tensor& weight, const OptionalTensor& bias, int64_t depth) {
  STD_TORCH_CHECK(depth > 0 && weight.size(0) > 0, "weight: must not be empty");
  check_size(weight, "weight", 1, depth);
  if (bias) check_size(*bias, "bias", 0, weight.size(0));
}

}  // namespace ffkernels
