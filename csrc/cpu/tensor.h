// Tensors as the CPU kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <optional>

#include "arguments.h"
#include "cpu/job.h"

namespace ffkernels::cpu {

inline Type type_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: must be float32 or bfloat16");
  return dtype == ScalarType::Float ? Type::float32 : Type::bfloat16;
}

inline ScalarType dtype_of(Type type) { return type == Type::float32 ? ScalarType::Float : ScalarType::BFloat16; }

inline Matrix matrix_argument(const Tensor& t, const char* name, Type type) {
  return {checked_data(t, name, 2, dtype_of(type)), t.stride(0), t.stride(1)};
}

inline Floats floats_argument(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return {};
  const void* data = checked_data(*t, name, 1, ScalarType::Float);
  check_size(*t, name, 0, size);
  return {static_cast<const float*>(data), t->stride(0)};
}

inline const int64_t* labels_argument(const Tensor& t, const char* name, int64_t dim, int64_t num_classes) {
  const auto* data = static_cast<const int64_t*>(checked_data(t, name, dim, ScalarType::Long));
  const int64_t cols = dim == 2 ? t.size(1) : 1;
  for (int64_t i = 0; i < t.size(0); ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t label = data[i * t.stride(0) + (dim == 2 ? j * t.stride(1) : 0)];
      STD_TORCH_CHECK(label >= 0 && label < num_classes, name, ": must be in [0, ", num_classes, ")");
    }
  }
  return data;
}

// A new contiguous tensor. torch::stable::empty() does the same through a boxed call, at twice the cost.
template <size_t dim>
Tensor new_tensor(const std::array<int64_t, dim>& sizes, ScalarType dtype) {
  std::array<int64_t, dim> strides;
  int64_t stride = 1;
  for (size_t d = dim; d-- > 0;) {
    strides[d] = stride;
    STD_TORCH_CHECK(!__builtin_mul_overflow(stride, sizes[d], &stride) && stride <= INT64_MAX / width_of(dtype),
                    "the result has more values than there are addresses");
  }
  static const int32_t cpu = aoti_torch_device_type_cpu();
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  static const int32_t int64 = aoti_torch_dtype_int64();
  const int32_t type = dtype == ScalarType::BFloat16 ? bfloat16 : dtype == ScalarType::Long ? int64 : float32;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.data(), strides.data(), type, cpu, 0, &handle));
  Tensor tensor(handle);
  const int64_t bytes = stride * width_of(dtype);
  constexpr int64_t large = 8 << 20;  // allocators keep smaller ones, and their pages, for the next call
  if (bytes >= large) advise_large_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace ffkernels::cpu
