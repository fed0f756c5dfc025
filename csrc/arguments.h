// The checks without which a wrong call would read or write out of bounds, for the kernels of every device. The
// messages are short: ffkernels/checks.py says in full what is wrong when a kernel refuses.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace ffkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the tensors of a call must be.
struct Place {
  int32_t type, index;
  bool on_cpu() const { return type == aoti_torch_device_type_cpu(); }
};

inline Place cpu_place() { return {aoti_torch_device_type_cpu(), 0}; }

inline Place place_of(const Tensor& t) {
  Place place{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &place.type));
  place.index = t.get_device_index();
  return place;
}

inline void check_place(const Tensor& t, const char* name, Place place) {
  if (place.on_cpu()) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU");
  } else {
    const Place own = place_of(t);
    STD_TORCH_CHECK(own.type == place.type && own.index == place.index, name, ": must be on x's device");
  }
}

inline int64_t width_of(ScalarType dtype) {
  if (dtype == ScalarType::Long || dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? 2 : 4;
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, name, ": must have size ", size, " in dimension ", dim, ", has ", t.size(dim));
}

// The data of an argument of the given dtype and number of dimensions, all of it inside its storage.
inline const void* checked_data(const Tensor& t, const char* name, int64_t dim, ScalarType dtype,
                                Place place = cpu_place()) {
  check_place(t, name, place);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dim, name, ": must have ", dim, " dimension(s), has ", t.dim());
  int64_t end = t.storage_offset() + 1, bytes = 0;
  for (int64_t d = 0; d < dim; ++d) end += (t.size(d) - 1) * t.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(t.numel() == 0 || end * width_of(dtype) <= bytes, name,
                  ": reaches beyond its storage, which was freed or made smaller");
  return t.const_data_ptr();
}

// The memory of one call's in-place targets and inputs, to see that no target overlaps anything.
class Spans {
 public:
  explicit Spans(Place place = cpu_place()) : place_(place) {}
  const Place& place() const { return place_; }
  // A contiguous target; returns its data.
  void* target(const Tensor& t, const char* name, std::vector<int64_t> sizes, ScalarType dtype) {
    checked_data(t, name, static_cast<int64_t>(sizes.size()), dtype, place_);
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
  Place place_;
  std::vector<Span> targets_, inputs_;
};

// The position of an option among its names.
template <typename Enum, size_t n>
Enum parse(const std::string& value, const char* argument, const std::array<const char*, n>& names) {
  for (size_t i = 0; i < n; ++i) {
    if (value == names[i]) return static_cast<Enum>(i);
  }
  STD_TORCH_CHECK(false, argument, ": unknown value ", value);
}

inline void check_hyper(const std::vector<double>& hyper, size_t layers) {
  STD_TORCH_CHECK(hyper.size() == 5 * layers, "hyper: must hold 5 numbers a layer");
}

}  // namespace ffkernels
