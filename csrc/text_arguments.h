// Strings as arguments of boxed kernels, without the leak of torch's own conversion (seen in torch 2.13):
// to<std::string> allocates a string, returns a copy of it and never frees it. That is 50 bytes for each string of each
// call, and worse, they lie between the tensors and keep the heap from being used again: gigabytes in a long training.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace ffkernels {

struct Text : std::string {
  using std::string::string;
};

struct Texts : std::vector<std::string> {
  using std::vector<std::string>::vector;
};

}  // namespace ffkernels

namespace torch::stable::detail {

template <>
struct ToImpl<ffkernels::Text> {
  static ffkernels::Text call(StableIValue value, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    ffkernels::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

template <>
struct ToImpl<ffkernels::Texts> {
  static ffkernels::Texts call(StableIValue value, uint64_t, bool) {
    const auto texts = to<std::vector<ffkernels::Text>>(value);
    return {texts.begin(), texts.end()};
  }
};

// What TORCH_BOX converts a kernel's arguments to before it calls the kernel.
template <>
struct UnboxType<std::string> {
  using type = ffkernels::Text;
};

template <>
struct UnboxType<std::vector<std::string>> {
  using type = ffkernels::Texts;
};

}  // namespace torch::stable::detail
