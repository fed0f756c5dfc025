// Registers the kernels with torch. ffkernels/registry.py defines their schemas; an overload's name is its backend.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/peaks.h"
#include "kernels.h"
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

// The ops with the flat arguments of their schemas, whichever device's kernel it is for.

using namespace ffkernels;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;
using Names = std::vector<std::string>;
using Name = std::string;
const OptionalTensor none;

template <Forward* kernel>
Three forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& x_sqnorm,
              const Name& normalize, double eps, const Name& activation, const Name& precision, bool return_p) {
  return kernel({x, weight, bias, x_sqnorm, normalize, eps, activation, none, none, precision}, return_p);
}

template <Gradient* kernel>
Two gradient(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& x_sqnorm, const Name& normalize, double eps, const Name& activation,
             const OptionalTensor& row_term, const OptionalTensor& col_term, const Name& precision) {
  return kernel({x, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision}, {y, coef});
}

template <Update* kernel>
void update(const Tensor& x, const Tensor& y, const Tensor& coef, const Tensor& weight, const OptionalTensor& bias,
            const Tensors& state, const Name& optimizer, const OptionalTensor& lr, const Numbers& hyper,
            const OptionalTensor& x_sqnorm, const Name& normalize, double eps, const Name& activation,
            const OptionalTensor& row_term, const OptionalTensor& col_term, const Name& precision) {
  kernel({x, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision}, {y, coef},
         {optimizer, state, lr, hyper});
}

template <ApplyGradient* kernel>
void apply_gradient(const Tensor& weight, const OptionalTensor& bias, const Tensors& state, const Name& optimizer,
                    const OptionalTensor& lr, const Numbers& hyper, const Tensor& grad_weight,
                    const OptionalTensor& grad_bias) {
  kernel(weight, bias, {optimizer, state, lr, hyper}, grad_weight, grad_bias);
}

template <Step* kernel>
Three step(const Tensor& x, const Tensor& sign, const Tensor& weight, const OptionalTensor& bias, const Tensors& state,
           const Name& optimizer, const OptionalTensor& lr, const Numbers& hyper, double threshold, double temperature,
           const Name& goodness, const OptionalTensor& x_sqnorm, const Name& normalize, double eps,
           const Name& activation, const OptionalTensor& row_term, const OptionalTensor& col_term,
           const Name& precision) {
  return kernel({x, weight, bias, x_sqnorm, normalize, eps, activation, row_term, col_term, precision}, sign,
                {threshold, temperature, goodness}, {optimizer, state, lr, hyper});
}

template <NetworkStep* kernel>
Two network_step(const Tensor& x, const OptionalTensor& sign, const OptionalTensor& x_sqnorm,
                 const OptionalTensor& labels_pos, const OptionalTensor& labels_neg, int64_t num_classes,
                 double strength, const Tensors& weights, const Tensors& biases, const Tensors& states,
                 const std::vector<bool>& has_bias, const std::vector<int64_t>& state_sizes, const Names& optimizers,
                 const Tensors& lrs, const Numbers& hypers, const Numbers& thresholds, const Numbers& temperatures,
                 const Names& goodness, const Names& normalize, const Numbers& eps, const Names& activations,
                 const Names& precisions, const Numbers& peers, const Tensors& peer_means, const Numbers& dropouts,
                 const OptionalTensor& dropout_seed) {
  return kernel({x,          sign,       x_sqnorm,     labels_pos, labels_neg,  num_classes, strength,
                 weights,    biases,     states,       has_bias,   state_sizes, optimizers,  lrs,
                 hypers,     thresholds, temperatures, goodness,   normalize,   eps,         activations,
                 precisions, peers,      peer_means,   dropouts,   dropout_seed});
}

template <LabelForward* kernel>
Three label_forward(const Tensor& x, const Tensor& labels, const Tensor& weight, const OptionalTensor& bias,
                    int64_t num_classes, double strength, const Name& normalize, double eps, const Name& activation,
                    const Name& precision, bool return_p) {
  return kernel({x, weight, bias, none, normalize, eps, activation, none, none, precision}, labels, num_classes,
                strength, return_p);
}

template <LabelStep* kernel>
Three label_step(const Tensor& x, const Tensor& labels_pos, const Tensor& labels_neg, const Tensor& weight,
                 const OptionalTensor& bias, const Tensors& state, const Name& optimizer, const OptionalTensor& lr,
                 const Numbers& hyper, int64_t num_classes, double strength, double threshold, double temperature,
                 const Name& goodness, const Name& normalize, double eps, const Name& activation,
                 const OptionalTensor& row_term, const OptionalTensor& col_term, const Name& precision) {
  return kernel({x, weight, bias, none, normalize, eps, activation, row_term, col_term, precision},
                {labels_pos, labels_neg, num_classes, strength}, {threshold, temperature, goodness},
                {optimizer, state, lr, hyper});
}

std::tuple<Tensors, Tensor> network_forward(const Tensor& x, const OptionalTensor& x_sqnorm, int64_t num_classes,
                                            double strength, const Tensors& weights, const Tensors& biases,
                                            const std::vector<bool>& has_bias, const Names& normalize,
                                            const Numbers& eps, const Names& activations, const Names& precisions) {
  return cpu::ff_network_forward(
      {x, x_sqnorm, num_classes, strength, weights, biases, has_bias, normalize, eps, activations, precisions});
}

Two head_step(const Tensors& ys, const Tensors& sqnorms, const Tensor& labels, const Tensors& weights,
              const Tensors& states, const Name& optimizer, const OptionalTensor& lr, const Numbers& hyper,
              double eps) {
  return cpu::ff_head_step_({ys, sqnorms, labels, weights, states, optimizer, lr, hyper, eps});
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
  m.impl("ff_forward.cpu", TORCH_BOX(&forward<&cpu::ff_forward>));
  m.impl("ff_grad.cpu", TORCH_BOX(&gradient<&cpu::ff_grad>));
  m.impl("ff_update_.cpu", TORCH_BOX(&update<&cpu::ff_update_>));
  m.impl("apply_gradient_.cpu", TORCH_BOX(&apply_gradient<&cpu::apply_gradient_>));
  m.impl("ff_step_.cpu", TORCH_BOX(&step<&cpu::ff_step_>));
  m.impl("ff_network_step_.cpu", TORCH_BOX(&network_step<&cpu::ff_network_step_>));
  m.impl("ff_network_forward.cpu", TORCH_BOX(&network_forward));
  m.impl("ff_label_forward.cpu", TORCH_BOX(&label_forward<&cpu::ff_label_forward>));
  m.impl("ff_label_step_.cpu", TORCH_BOX(&label_step<&cpu::ff_label_step_>));
  m.impl("ff_head_step_.cpu", TORCH_BOX(&head_step));
  m.impl("draw_other_labels.cpu", TORCH_BOX(&cpu::draw_other_labels));
  m.impl("draw_hard_inputs.cpu", TORCH_BOX(&cpu::draw_hard_inputs));
}

#ifdef FFKERNELS_WITH_CUDA
namespace {

void register_cuda(torch::stable::detail::StableLibrary& m) {
  m.impl("ff_forward.cuda", TORCH_BOX(&forward<&cuda::ff_forward>));
  m.impl("ff_grad.cuda", TORCH_BOX(&gradient<&cuda::ff_grad>));
  m.impl("ff_update_.cuda", TORCH_BOX(&update<&cuda::ff_update_>));
  m.impl("apply_gradient_.cuda", TORCH_BOX(&apply_gradient<&cuda::apply_gradient_>));
  m.impl("ff_step_.cuda", TORCH_BOX(&step<&cuda::ff_step_>));
  m.impl("ff_network_step_.cuda", TORCH_BOX(&network_step<&cuda::ff_network_step_>));
  m.impl("ff_label_forward.cuda", TORCH_BOX(&label_forward<&cuda::ff_label_forward>));
  m.impl("ff_label_step_.cuda", TORCH_BOX(&label_step<&cuda::ff_label_step_>));
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
