// Registers the kernels with torch. ffkernels/ops.py defines the schemas; an overload's name is its backend.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/peaks.h"
#include "text_arguments.h"
#ifdef FFKERNELS_WITH_CUDA
#include "cuda/device.h"
#include "cuda/ops.h"
#include "cuda/record.h"
#endif

namespace {

// JSON, written by setup.py.
std::string build_info() {
  return
#include "build_info.inc"
      ;
}

// What this machine can run, from the lowest on; then, after a space, what runs.
std::string cpu_isa() { return ffkernels::cpu::available_isas() + " " + ffkernels::cpu::kernels().name; }

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
  m.def("cpu_isa() -> str");
  m.def("cuda_devices() -> str");
  m.def("cpu_peak(str precision, int threads) -> float");
  m.def("cpu_bandwidth(int bytes, int threads) -> float");
}

// No tensor among the arguments: one kernel for every dispatch key.
STABLE_TORCH_LIBRARY_IMPL(ffkernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cuda_devices", TORCH_BOX(&cuda_devices));
  m.impl("cpu_peak", TORCH_BOX(&ffkernels::cpu::cpu_peak));
  m.impl("cpu_bandwidth", TORCH_BOX(&ffkernels::cpu::cpu_bandwidth));
}

STABLE_TORCH_LIBRARY_IMPL(ffkernels, CPU, m) {
  m.impl("ff_forward.cpu", TORCH_BOX(&ffkernels::cpu::ff_forward));
  m.impl("ff_grad.cpu", TORCH_BOX(&ffkernels::cpu::ff_grad));
  m.impl("ff_update_.cpu", TORCH_BOX(&ffkernels::cpu::ff_update_));
  m.impl("apply_gradient_.cpu", TORCH_BOX(&ffkernels::cpu::apply_gradient_));
  m.impl("ff_step_.cpu", TORCH_BOX(&ffkernels::cpu::ff_step_));
  m.impl("ff_network_step_.cpu", TORCH_BOX(&ffkernels::cpu::ff_network_step_));
  m.impl("ff_label_forward.cpu", TORCH_BOX(&ffkernels::cpu::ff_label_forward));
  m.impl("ff_label_step_.cpu", TORCH_BOX(&ffkernels::cpu::ff_label_step_));
}

#ifdef FFKERNELS_WITH_CUDA
namespace {

template <class Library>
void register_cuda(Library& m) {
  m.impl("ff_forward.cuda", TORCH_BOX(&ffkernels::cuda::ff_forward));
  m.impl("ff_grad.cuda", TORCH_BOX(&ffkernels::cuda::ff_grad));
  m.impl("ff_update_.cuda", TORCH_BOX(&ffkernels::cuda::ff_update_));
  m.impl("ff_step_.cuda", TORCH_BOX(&ffkernels::cuda::ff_step_));
  m.impl("ff_network_step_.cuda", TORCH_BOX(&ffkernels::cuda::ff_network_step_));
  m.impl("ff_label_forward.cuda", TORCH_BOX(&ffkernels::cuda::ff_label_forward));
  m.impl("ff_label_step_.cuda", TORCH_BOX(&ffkernels::cuda::ff_label_step_));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ffkernels, m) {
  m.def("cuda_record(int capability, int multiprocessors, bool cooperative, int[] resident) -> ()");
  m.def("cuda_recorded() -> (str, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(ffkernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_record", TORCH_BOX(&ffkernels::cuda::cuda_record));
  m.impl("cuda_recorded", TORCH_BOX(&ffkernels::cuda::cuda_recorded));
}

STABLE_TORCH_LIBRARY_IMPL(ffkernels, CUDA, m) { register_cuda(m); }

// On CPU tensors they record a plan (cuda/record.h), or refuse.
STABLE_TORCH_LIBRARY_IMPL(ffkernels, CPU, m) { register_cuda(m); }
#endif
