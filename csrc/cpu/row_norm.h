// The row scales r_m = 1 / (sqrt(q_m / D) + eps) that stand for normalising x: a row scale of the GEMM's result.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/tensor.h"

namespace ffkernels {

// A sum of squares in a fixed order: side by side in lanes, which the compiler vectorises, and block by block, which
// keeps the rounding error small for long rows.
template <typename Get>
float sum_of_squares(int64_t size, const Get& get) {
  constexpr int64_t lanes = 16, block = 512;
  float total = 0.f;
  for (int64_t start = 0; start < size; start += block) {
    const int64_t end = std::min(start + block, size);
    float lane[lanes] = {};
    int64_t i = start;
    for (; i + lanes <= end; i += lanes) {
      for (int64_t j = 0; j < lanes; ++j) lane[j] += get(i + j) * get(i + j);
    }
    for (int64_t j = 0; i < end; ++i, ++j) lane[j] += get(i) * get(i);
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    total += lane[0];
  }
  return total;
}

enum class Normalize { none, l2, rms };

inline Normalize parse_normalize(const std::string& name) {
  if (name == "none") return Normalize::none;
  if (name == "l2") return Normalize::l2;
  if (name == "rms") return Normalize::rms;
  STD_TORCH_CHECK(false, "normalize: must be l2, rms or none, is ", name);
}

// scale[m] for every row of x; sqnorm holds the q_m where the caller has them.
template <typename T>
void row_scales(const Matrix<const T>& x, const Vector<const float>& sqnorm, Normalize normalize, float eps,
                float* scale) {
  if (normalize == Normalize::none) {
    std::fill_n(scale, x.rows, 1.f);
    return;
  }
  const float divisor = normalize == Normalize::rms ? static_cast<float>(x.cols) : 1.f;
  const int64_t grain = std::max<int64_t>(1, 65536 / x.cols);
  torch::stable::parallel_for(0, x.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* row = &x(m, 0);
      const int64_t stride = x.col_stride;
      const float q = sqnorm ? sqnorm[m]
                      : stride == 1
                          ? sum_of_squares(x.cols, [=](int64_t k) { return static_cast<float>(row[k]); })
                          : sum_of_squares(x.cols, [=](int64_t k) { return static_cast<float>(row[k * stride]); });
      scale[m] = 1.f / (std::sqrt(q / divisor) + eps);
    }
  });
}

}  // namespace ffkernels
