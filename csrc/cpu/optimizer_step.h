// An optimizer's step as the kernels take it, from an op's checked arguments.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/job.h"
#include "optimizer_arguments.h"

namespace ffkernels::cpu {

// Adam's bias correction 1 - beta^t, in double: it cancels for small t.
inline double bias_correction(double beta, double step) { return 1.0 - std::pow(beta, step); }

inline OptimizerStep optimizer_step(const OptimizerArguments& given) {
  OptimizerStep o;
  o.kind = static_cast<Optimizer>(given.name);
  std::copy_n(given.slot, 2, o.slot);
  std::copy_n(given.bias_slot, 2, o.bias_slot);
  const double rate = given.lr_tensor ? *given.lr_tensor : given.lr;
  o.lr = static_cast<float>(rate);
  o.weight_decay = static_cast<float>(given.weight_decay);
  o.momentum = static_cast<float>(given.momentum);
  if (o.kind == Optimizer::sgd) {
    o.first = *given.step == 0.f;
    o.dampening = static_cast<float>(given.dampening);
    o.nesterov = given.nesterov;
  } else if (o.kind == Optimizer::hinton_sgd) {
    o.rest1 = static_cast<float>(1.0 - given.momentum);
  } else {
    const double next = static_cast<double>(*given.step) + 1.0;
    o.beta1 = static_cast<float>(given.beta1);
    o.beta2 = static_cast<float>(given.beta2);
    o.rest1 = static_cast<float>(1.0 - given.beta1);
    o.rest2 = static_cast<float>(1.0 - given.beta2);
    o.eps = static_cast<float>(given.eps);
    o.step_size = static_cast<float>(rate / bias_correction(given.beta1, next));
    o.inverse_root_correction2 = static_cast<float>(1.0 / std::sqrt(bias_correction(given.beta2, next)));
  }
  return o;
}

}  // namespace ffkernels::cpu
