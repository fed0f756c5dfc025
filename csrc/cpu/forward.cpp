// ff_forward: a blocked GEMM whose epilogue scales the rows, adds the bias, applies the activation and sums the
// goodness.
#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/row_norm.h"

namespace ffkernels::cpu {
namespace {

template <typename T>
struct Layer {
  Matrix<const T> x;             // (M, K)
  Matrix<const T> weight;        // (N, K)
  Vector<const T> bias;          // (N,)
  Vector<const float> x_sqnorm;  // (M,)
  Normalize normalize;
  float eps;
  T* y;             // (M, N)
  T* p;             // (M, N), or null
  float* goodness;  // (M,)
};

// z is a row's share of x W^T; columns from col0 on. Returns the share of the row's goodness.
template <typename T, typename Activation>
float finish_row(const Layer<T>& layer, int64_t m, int64_t col0, int64_t cols, float scale, float* z) {
  for (int64_t j = 0; j < cols; ++j) {
    z[j] *= scale;
    if (layer.bias) z[j] += static_cast<float>(layer.bias[col0 + j]);
  }
  const int64_t offset = m * layer.weight.rows + col0;
  if (layer.p) {
    for (int64_t j = 0; j < cols; ++j) {
      layer.p[offset + j] = static_cast<T>(Activation::value(z[j]) * Activation::derivative(z[j]));
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    z[j] = Activation::value(z[j]);
    layer.y[offset + j] = static_cast<T>(z[j]);
  }
  return sum_of_squares(cols, [z](int64_t j) { return z[j]; });
}

template <typename T, typename Activation>
void forward(const Layer<T>& layer, Activation) {
  const int64_t rows = layer.x.rows, cols = layer.weight.rows, depth = layer.x.cols;
  const int64_t row_blocks = ceil_div(rows, block_rows), col_blocks = ceil_div(cols, block_cols);
  // Blocks of columns leave their part of the goodness here; it is added in order, whichever thread comes first.
  std::unique_ptr<float[]> workspace(new float[rows + rows * col_blocks]);
  float* scale = workspace.get();
  float* parts = scale + rows;
  row_scales(layer.x, layer.x_sqnorm, layer.normalize, layer.eps, scale);

  // Below this a second thread costs more than it saves.
  constexpr int64_t smallest_share = 1 << 19;
  const int64_t block_work = std::min(rows, block_rows) * std::min(cols, block_cols) * depth;
  const int64_t grain = std::max<int64_t>(1, smallest_share / block_work);
  torch::stable::parallel_for(0, row_blocks * col_blocks, grain, [&](int64_t begin, int64_t end) {
    BlockGemm gemm(rows, cols, depth);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row0 = block / col_blocks * block_rows, col_block = block % col_blocks;
      const int64_t col0 = col_block * block_cols;
      const int64_t block_height = std::min(block_rows, rows - row0), block_width = std::min(block_cols, cols - col0);
      gemm.compute(layer.x, row0, block_height, layer.weight, col0, block_width);
      for (int64_t i = 0; i < block_height; ++i) {
        const int64_t m = row0 + i;
        parts[m * col_blocks + col_block] =
            finish_row<T, Activation>(layer, m, col0, block_width, scale[m], gemm.row(i));
      }
    }
  });
  for (int64_t m = 0; m < rows; ++m) {
    float sum = 0.f;
    for (int64_t part = 0; part < col_blocks; ++part) sum += parts[m * col_blocks + part];
    layer.goodness[m] = sum;
  }
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> typed_forward(const Tensor& x, const Tensor& weight,
                                                 const std::optional<Tensor>& bias,
                                                 const std::optional<Tensor>& x_sqnorm, const std::string& normalize,
                                                 double eps, const std::string& activation, bool return_p,
                                                 ScalarType dtype) {
  Layer<T> layer;
  layer.x = matrix_argument<T>(x, "x");
  layer.weight = matrix_argument<T>(weight, "weight");
  const int64_t rows = layer.x.rows, cols = layer.weight.rows;
  STD_TORCH_CHECK(layer.x.cols == layer.weight.cols, "weight: must have ", layer.x.cols, " columns, as x has; it has ",
                  layer.weight.cols);
  STD_TORCH_CHECK(layer.x.cols > 0 && cols > 0, "weight: must not be empty");
  layer.bias = vector_argument<T>(bias, "bias", cols);
  layer.x_sqnorm = vector_argument<float>(x_sqnorm, "x_sqnorm", rows);
  layer.normalize = parse_normalize(normalize);
  layer.eps = static_cast<float>(eps);

  Tensor y = new_tensor<2>({rows, cols}, dtype);
  Tensor goodness = new_tensor<1>({rows}, ScalarType::Float);
  Tensor p = return_p ? new_tensor<2>({rows, cols}, dtype) : new_tensor<1>({0}, dtype);
  layer.y = static_cast<T*>(y.mutable_data_ptr());
  layer.goodness = static_cast<float*>(goodness.mutable_data_ptr());
  layer.p = return_p ? static_cast<T*>(p.mutable_data_ptr()) : nullptr;
  with_activation(activation, [&](auto chosen) {
    if (rows > 0) forward(layer, chosen);
  });
  return {y, goodness, p};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ff_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& x_sqnorm, const std::string& normalize,
                                              double eps, const std::string& activation, const std::string& precision,
                                              bool return_p) {
  // Every precision is computed in float32, the best of them: the others only allow less.
  STD_TORCH_CHECK(precision == "highest" || precision == "high" || precision == "medium",
                  "precision: must be highest, high or medium, is ", precision);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: must be float32 or bfloat16");
  const auto kernel = dtype == ScalarType::Float ? typed_forward<float> : typed_forward<BFloat16>;
  return kernel(x, weight, bias, x_sqnorm, normalize, eps, activation, return_p, dtype);
}

}  // namespace ffkernels::cpu
