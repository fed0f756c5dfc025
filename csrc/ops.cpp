// Registers the kernels with torch. ffkernels/ops.py defines the schemas; an overload's name is its backend.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/peaks.h"
#include "kernels.h"
#include "network_arguments.h"
#include "text_arguments.h"
#ifdef FFKERNELS_WITH_CUDA
#include "cuda/device.h"
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

using ffkernels::NetworkArguments;
using ffkernels::OptionalTensor;
using ffkernels::Tensor;
using ffkernels::Tensors;

// With the flat arguments of the schema, whichever device's kernel it is for.
template <ffkernels::NetworkStep* step>
std::tuple<Tensor, Tensor> network_step(
    const Tensor& x, const OptionalTensor& sign, const OptionalTensor& x_sqnorm, const OptionalTensor& labels_pos,
    const OptionalTensor& labels_neg, int64_t num_classes, double strength, const Tensors& weights,
    const Tensors& biases, const Tensors& states, const std::vector<bool>& has_bias,
    const std::vector<int64_t>& state_sizes, const std::vector<std::string>& optimizers, const Tensors& lrs,
    const std::vector<double>& hypers, const std::vector<double>& thresholds, const std::vector<double>& temperatures,
    const std::vector<std::string>& goodness, const std::vector<std::string>& normalize, const std::vector<double>& eps,
    const std::vector<std::string>& activations, const std::vector<std::string>& precisions,
    const std::vector<double>& peers, const Tensors& peer_means, const std::vector<double>& dropouts,
    const OptionalTensor& dropout_seed) {
  return step({x,          sign,       x_sqnorm,     labels_pos, labels_neg,  num_classes, strength,
               weights,    biases,     states,       has_bias,   state_sizes, optimizers,  lrs,
               hypers,     thresholds, temperatures, goodness,   normalize,   eps,         activations,
               precisions, peers,      peer_means,   dropouts,   dropout_seed});
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
  m.impl("ff_network_step_.cpu", TORCH_BOX(&network_step<&ffkernels::cpu::ff_network_step_>));
  m.impl("ff_label_forward.cpu", TORCH_BOX(&ffkernels::cpu::ff_label_forward));
  m.impl("ff_label_step_.cpu", TORCH_BOX(&ffkernels::cpu::ff_label_step_));
}

#ifdef FFKERNELS_WITH_CUDA
namespace {

void register_cuda(torch::stable::detail::StableLibrary& m) {
  m.impl("ff_forward.cuda", TORCH_BOX(&ffkernels::cuda::ff_forward));
  m.impl("ff_grad.cuda", TORCH_BOX(&ffkernels::cuda::ff_grad));
  m.impl("ff_update_.cuda", TORCH_BOX(&ffkernels::cuda::ff_update_));
  m.impl("apply_gradient_.cuda", TORCH_BOX(&ffkernels::cuda::apply_gradient_));
  m.impl("ff_step_.cuda", TORCH_BOX(&ffkernels::cuda::ff_step_));
  m.impl("ff_network_step_.cuda", TORCH_BOX(&network_step<&ffkernels::cuda::ff_network_step_>));
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
