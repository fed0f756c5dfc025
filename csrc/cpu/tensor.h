// Tensors as kernels see them, and the checks without which a wrong call would read or write out of bounds. The
// messages are short: ffkernels/ops.py says in full what is wrong when a kernel refuses.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/job.h"

namespace ffkernels::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: must be float32 or bfloat16");
  return dtype == ScalarType::Float ? Type::float32 : Type::bfloat16;
}

inline ScalarType dtype_of(Type type) { return type == Type::float32 ? ScalarType::Float : ScalarType::BFloat16; }

// The data of an argument of the given dtype and number of dimensions, all of it inside its storage.
inline const void* checked_data(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dim, name, ": must have ", dim, " dimension(s), has ", t.dim());
  int64_t end = t.storage_offset() + 1, bytes = 0;
  for (int64_t d = 0; d < dim; ++d) end += (t.size(d) - 1) * t.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t width = dtype == ScalarType::Long ? 8 : dtype == ScalarType::BFloat16 ? 2 : 4;
  STD_TORCH_CHECK(t.numel() == 0 || end * width <= bytes, name,
                  ": reaches beyond its storage, which was freed or made smaller");
  return t.const_data_ptr();
}

inline Matrix matrix_argument(const Tensor& t, const char* name, Type type) {
  return {checked_data(t, name, 2, dtype_of(type)), t.stride(0), t.stride(1)};
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, name, ": must have size ", size, " in dimension ", dim, ", has ", t.size(dim));
}

inline Floats floats_argument(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return {};
  const void* data = checked_data(*t, name, 1, ScalarType::Float);
  check_size(*t, name, 0, size);
  return {static_cast<const float*>(data), t->stride(0)};
}

// The memory of one call's in-place targets and inputs, to see that no target overlaps anything.
class Spans {
 public:
  // A contiguous target; returns its data.
  void* target(const Tensor& t, const char* name, std::vector<int64_t> sizes, ScalarType dtype) {
    checked_data(t, name, static_cast<int64_t>(sizes.size()), dtype);
    for (size_t d = 0; d < sizes.size(); ++d) check_size(t, name, static_cast<int64_t>(d), sizes[d]);
    STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
    targets_.push_back(span(t));
    return t.mutable_data_ptr();
  }
  void input(const Tensor& t) { inputs_.push_back(span(t)); }
  void input(const std::optional<Tensor>& t) {
    if (t) input(*t);
  }
  void check() const {
    for (size_t i = 0; i < targets_.size(); ++i) {
      for (size_t j = i + 1; j < targets_.size(); ++j) check(targets_[i], targets_[j]);
      for (const Span& other : inputs_) check(targets_[i], other);
    }
  }

 private:
  using Span = std::pair<const char*, const char*>;
  static Span span(const Tensor& t) {
    if (t.numel() == 0) return {nullptr, nullptr};
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    const char* data = static_cast<const char*>(t.const_data_ptr());
    return {data, data + (last + 1) * static_cast<int64_t>(t.element_size())};
  }
  static void check(const Span& a, const Span& b) {
    STD_TORCH_CHECK(a.first >= b.second || b.first >= a.second, "an in-place target shares memory with an argument");
  }
  std::vector<Span> targets_, inputs_;
};

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
  Tensor tensor(handle);
  const int64_t bytes = stride * (dtype == ScalarType::BFloat16 ? 2 : 4);
  constexpr int64_t large = 8 << 20;  // allocators keep smaller ones, and their pages, for the next call
  if (bytes >= large) advise_large_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace ffkernels::cpu
