// The activations: y = act(z) and its derivative. NaN stays NaN, as in torch's own functions.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <string>

namespace ffkernels {

struct Relu {
  static float value(float z) { return z <= 0.f ? 0.f : z; }
  static float derivative(float z) { return z <= 0.f ? 0.f : 1.f; }
};

struct LeakyRelu {
  static constexpr float slope = 0.01f;
  static float value(float z) { return z > 0.f ? z : slope * z; }
  static float derivative(float z) { return z > 0.f ? 1.f : slope; }
};

struct Gelu {
  static float normal_cdf(float z) { return 0.5f * (1.f + std::erf(z * 0.70710678f)); }
  static float value(float z) { return z * normal_cdf(z); }
  static float derivative(float z) { return normal_cdf(z) + z * 0.39894228f * std::exp(-0.5f * z * z); }
};

struct Silu {
  static float value(float z) { return z / (1.f + std::exp(-z)); }
  static float derivative(float z) {
    const float sigmoid = 1.f / (1.f + std::exp(-z));
    return sigmoid * (1.f + z * (1.f - sigmoid));
  }
};

struct Tanh {
  static float value(float z) { return std::tanh(z); }
  static float derivative(float z) {
    const float y = std::tanh(z);
    return 1.f - y * y;
  }
};

// Calls function(Activation{}) with the type that the name stands for.
template <typename F>
auto with_activation(const std::string& name, F&& function) {
  if (name == "relu") return function(Relu{});
  if (name == "leaky_relu") return function(LeakyRelu{});
  if (name == "gelu") return function(Gelu{});
  if (name == "silu") return function(Silu{});
  if (name == "tanh") return function(Tanh{});
  STD_TORCH_CHECK(false, "activation: must be relu, leaky_relu, gelu, silu or tanh, is ", name);
}

}  // namespace ffkernels
