// Views of tensors as kernels see them, and the checks without which a wrong call would read out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace ffkernels {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  T& operator()(int64_t row, int64_t col) const { return data[row * row_stride + col * col_stride]; }
};

template <typename T>
struct Vector {
  T* data = nullptr;  // null: the argument was not given
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
  T& operator[](int64_t i) const { return data[i * stride]; }
};

// The data of an argument that has the given number of dimensions and dtype T, all of it inside its storage.
template <typename T>
const T* checked_data(const Tensor& t, const char* name, int64_t dim) {
  constexpr bool is_float32 = std::is_same_v<T, float>;
  STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == (is_float32 ? ScalarType::Float : ScalarType::BFloat16), name, ": must be ",
                  is_float32 ? "float32" : "bfloat16");
  STD_TORCH_CHECK(t.dim() == dim, name, ": must have ", dim, " dimension(s), has ", t.dim());
  int64_t end = t.storage_offset() + 1, bytes = 0;
  for (int64_t d = 0; d < dim; ++d) end += (t.size(d) - 1) * t.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(t.numel() == 0 || end * static_cast<int64_t>(sizeof(T)) <= bytes, name,
                  ": reaches beyond its storage, which was freed or made smaller");
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
Matrix<const T> matrix_argument(const Tensor& t, const char* name) {
  return {checked_data<T>(t, name, 2), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <typename T>
Vector<const T> vector_argument(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return {};
  const T* data = checked_data<T>(*t, name, 1);
  STD_TORCH_CHECK(t->size(0) == size, name, ": must have ", size, " element(s), has ", t->size(0));
  return {data, t->stride(0)};
}

// A new contiguous tensor. torch::stable::empty() does the same through a boxed call, at twice the cost.
template <size_t dim>
Tensor new_tensor(const std::array<int64_t, dim>& sizes, ScalarType dtype) {
  std::array<int64_t, dim> strides;
  int64_t stride = 1;
  for (size_t d = dim; d-- > 0; stride *= sizes[d]) strides[d] = stride;
  static const int32_t cpu = aoti_torch_device_type_cpu();
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides.data(),
                                                  dtype == ScalarType::BFloat16 ? bfloat16 : float32, cpu, 0, &handle));
  return Tensor(handle);
}

}  // namespace ffkernels
