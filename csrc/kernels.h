// The kernels that ops.cpp registers, of each device. Their schemas, and what the arguments mean, are in
// ffkernels/ops.py and its like; *_arguments.h groups them.
#pragma once

#include <tuple>

#include "layer_arguments.h"
#include "network_arguments.h"

namespace ffkernels {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

using Forward = Three(const LayerArguments& layer, bool return_p);
using Gradient = Two(const LayerArguments& layer, const GradientArguments& gradient);
using Update = void(const LayerArguments& layer, const GradientArguments& gradient, const FlatOptimizer& optimizer);
using ApplyGradient = void(const Tensor& weight, const OptionalTensor& bias, const FlatOptimizer& optimizer,
                           const Tensor& grad_weight, const OptionalTensor& grad_bias);
using Step = Three(const LayerArguments& layer, const Tensor& sign, const LossArguments& loss,
                   const FlatOptimizer& optimizer);
using NetworkStep = Two(const NetworkArguments& network);
using LabelForward = Three(const LayerArguments& layer, const Tensor& labels, int64_t num_classes, double strength,
                           bool return_p);
using LabelStep = Three(const LayerArguments& layer, const LabelPair& labels, const LossArguments& loss,
                        const FlatOptimizer& optimizer);
using NetworkForward = std::tuple<std::vector<Tensor>, Tensor>(const NetworkForwardArguments& network);
using HeadStep = Two(const HeadArguments& head);
using DrawHardInputs = Tensor(const Tensor& logits, const Tensor& labels, const Tensor& draws, double floor,
                              int64_t count);
using DrawOtherLabels = Tensor(const Tensor& logits, const Tensor& labels, const Tensor& draws);

namespace cpu {

Forward ff_forward;
Gradient ff_grad;
Update ff_update_;
ApplyGradient apply_gradient_;
Step ff_step_;
NetworkStep ff_network_step_;
NetworkForward ff_network_forward;
LabelForward ff_label_forward;
LabelStep ff_label_step_;
HeadStep ff_head_step_;
DrawOtherLabels draw_other_labels;
DrawHardInputs draw_hard_inputs;

}  // namespace cpu

namespace cuda {

Forward ff_forward;
Gradient ff_grad;
Update ff_update_;
ApplyGradient apply_gradient_;
Step ff_step_;
NetworkStep ff_network_step_;
LabelForward ff_label_forward;
LabelStep ff_label_step_;

}  // namespace cuda
}  // namespace ffkernels
