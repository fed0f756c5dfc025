// Registers the kernels with torch. ffkernels/ops.py defines the schemas; an overload's name is its backend.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels.h"
#ifdef FFKERNELS_WITH_CUDA
#include "cuda/device.h"
#endif

namespace {

// JSON, written by setup.py.
std::string build_info() {
  return
#include "build_info.inc"
      ;
}

std::string cuda_devices() {
#ifdef FFKERNELS_WITH_CUDA
  return ffkernels::cuda::devices();
#else
  return R"({"driver": null, "runtime": null, "error": "built without CUDA", "kernel_error": null, "devices": []})";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ffkernels, m) {
  m.def("build_info() -> str");
  m.def("cuda_devices() -> str");
}

// No tensor among the arguments: one kernel for every dispatch key.
STABLE_TORCH_LIBRARY_IMPL(ffkernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cuda_devices", TORCH_BOX(&cuda_devices));
}

STABLE_TORCH_LIBRARY_IMPL(ffkernels, CPU, m) { m.impl("ff_forward.cpu", TORCH_BOX(&ffkernels::cpu::ff_forward)); }
