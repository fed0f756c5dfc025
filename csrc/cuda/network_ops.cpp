// A network's step on CUDA tensors.
#include <algorithm>

#include "cuda/call.h"

namespace ffkernels::cuda {
namespace {

int64_t padded(int64_t cols) { return (cols + kRowPad - 1) / kRowPad * kRowPad; }

}  // namespace

Two ff_network_step_(const NetworkArguments& network) {
  const std::vector<NetworkLayer> own = layers_of(network);
  const size_t count = own.size();
  const Tensor& x = network.x;
  Call call("ff_network_step_", x);
  if (network.stacked()) call.set_minibatches(x.size(0));
  if (network.labels_pos) set_label_pair(call, x, network.label_pair());
  Problem& problem = call.problem;
  Minibatches& minibatches = problem.minibatches;
  problem.layers.reserve(count);
  problem.dropout_seed = dropout_seed_of(network, call.spans);
  const bool any_dropout = problem.dropout_seed != nullptr;
  if (any_dropout) minibatches.dropout_seed = network.dropout_seed->stride(0);
  const int64_t width = width_of(call.dtype);
  bool any_curved = false;
  int64_t widest = 0;
  for (size_t i = 0; i < count; ++i) {
    const NetworkLayer& given = own[i];
    const int64_t depth = i == 0 ? x.size(x.dim() - 1) : problem.layers[i - 1].cols;
    Layer layer = layer_of(call, depth, given.weight, given.bias, given.normalize, given.eps, given.activation);
    if (i == 0) {
      set_input(call, layer, x);
      layer.x_sqnorm = call.vector(network.x_sqnorm, "x_sqnorm", problem.rows, &layer.x_sqnorm_minibatch);
    }
    layer.sign = call.vector(network.sign, "sign", problem.rows, &minibatches.sign);
    set_loss(layer, {given.threshold, given.temperature, given.goodness});
    set_optimizer(call, layer, given.weight, given.bias, given.optimizer);
    if (given.peer_mean) {
      layer.peer_mean =
          static_cast<float*>(call.spans.target(*given.peer_mean, "peer_mean", {layer.cols}, ScalarType::Float));
      layer.peer = static_cast<float>(given.peer);
    }
    layer.dropout = given.dropout;
    layer.layer_index = static_cast<int32_t>(i);
    any_curved |= layer.activation != Activation::relu;
    widest = std::max<int64_t>(widest, padded(layer.cols));
    layer.forward = 1;
    call.add(layer, given.precision);
  }
  STD_TORCH_CHECK(problem.rows > 0, "x: must have at least one row");
  call.spans.check();

  // A minibatch's y of layer l is written in one stage and read in the next two, its p in the next. Of one minibatch
  // three buffers in turn do for y and dropped inputs, and two for p. With several, layer l is written again two stages
  // later, and the next layers meanwhile: each has kInTurn buffers of its own, and a p.
  const int64_t rows = problem.rows, steps = minibatches.end, bytes = rows * widest * width;
  const bool several = steps > 1;
  const auto layers = static_cast<int64_t>(count);
  const int64_t handed_on = several ? kInTurn * layers : std::min<int64_t>(layers, 3);
  Scratch scratch;
  const int64_t y = scratch.add("y", handed_on * bytes);
  const int64_t p = scratch.add("p", any_curved ? (several ? layers : std::min<int64_t>(layers, 2)) * bytes : 0);
  const int64_t dropped = scratch.add("dropped", any_dropout ? handed_on * bytes : 0);
  const int64_t sqnorms = scratch.add("dropped_sqnorm", any_dropout ? 4 * rows * layers : 0);
  const int64_t to_other = several ? rows * widest : 0;  // elements from one buffer to the other
  Tensor totals = network.stacked() ? call.new_tensor<3>({steps, layers, rows}, ScalarType::Float)
                                    : call.new_tensor<2>({layers, rows}, ScalarType::Float);
  Tensor losses = network.stacked() ? call.new_tensor<2>({steps, layers}, ScalarType::Float)
                                    : call.new_tensor<1>({layers}, ScalarType::Float);
  auto* total = static_cast<float*>(totals.mutable_data_ptr());
  auto* loss = static_cast<float*>(losses.mutable_data_ptr());
  minibatches.goodness = layers * rows;
  minibatches.loss = layers;
  run(call, scratch, [&] {
    for (int64_t i = 0; i < layers; ++i) {
      Layer& layer = problem.layers[i];
      const bool curved = layer.activation != Activation::relu;
      const int64_t place = several ? kInTurn * i : i % 3;
      layer.y = scratch.at(y + place * bytes);
      layer.p = curved ? scratch.at(p + (several ? i : i % 2) * bytes) : nullptr;
      layer.y_stride = padded(layer.cols);
      layer.y_minibatch = to_other;
      layer.gradient_y = {curved ? layer.p : layer.y, layer.y_stride, 1};
      layer.goodness = total + i * rows;
      layer.loss = loss + i;
      if (i == 0) continue;
      const Layer& below = problem.layers[i - 1];
      const bool drops = layer.dropout > 0;
      layer.x = {drops ? scratch.at(dropped + place * bytes) : below.y, below.y_stride, 1};
      layer.x_minibatch = to_other;
      layer.x_sqnorm = {drops ? reinterpret_cast<float*>(scratch.at(sqnorms)) + i * rows : below.goodness, 1};
      layer.x_sqnorm_minibatch = drops ? 0 : minibatches.goodness;
    }
  });
  return {totals, losses};
}

}  // namespace ffkernels::cuda
