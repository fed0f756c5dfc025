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
  if (network.labels_pos) set_label_pair(call, x, network.label_pair());
  Problem& problem = call.problem;
  problem.layers.reserve(count);
  problem.dropout_seed = dropout_seed_of(network, call.spans);
  const bool any_dropout = problem.dropout_seed != nullptr;
  const int64_t width = width_of(call.dtype);
  bool any_curved = false;
  int64_t widest = 0;
  for (size_t i = 0; i < count; ++i) {
    const NetworkLayer& given = own[i];
    const int64_t depth = i == 0 ? x.size(1) : problem.layers[i - 1].cols;
    Layer layer = layer_of(call, depth, given.weight, given.bias, given.normalize, given.eps, given.activation);
    if (i == 0) {
      set_input(call, layer, x);
      layer.x_sqnorm = call.vector(network.x_sqnorm, "x_sqnorm", problem.rows);
    }
    if (network.sign) layer.sign = call.vector(network.sign, "sign", problem.rows);
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

  // Stage l writes y of layer l and reads those of layers l - 1 and l - 2: three buffers in turn. Of p the last two are
  // in use, of the dropped inputs three.
  const int64_t rows = problem.rows, bytes = rows * widest * width;
  Scratch scratch;
  std::array<int64_t, 3> y{}, p{}, dropped{};
  for (size_t i = 0; i < std::min<size_t>(count, 3); ++i) {
    y[i] = scratch.add(i == 0 ? "y0" : i == 1 ? "y1" : "y2", bytes);
    if (any_curved && i < 2) p[i] = scratch.add(i == 0 ? "p0" : "p1", bytes);
    if (any_dropout) dropped[i] = scratch.add(i == 0 ? "dropped0" : i == 1 ? "dropped1" : "dropped2", bytes);
  }
  const int64_t sqnorms = scratch.add("dropped_sqnorm", any_dropout ? 4 * rows * static_cast<int64_t>(count) : 0);
  Tensor totals = call.new_tensor<2>({static_cast<int64_t>(count), rows}, ScalarType::Float);
  Tensor losses = call.new_tensor<1>({static_cast<int64_t>(count)}, ScalarType::Float);
  auto* total = static_cast<float*>(totals.mutable_data_ptr());
  auto* loss = static_cast<float*>(losses.mutable_data_ptr());
  run(call, scratch, [&] {
    for (size_t i = 0; i < count; ++i) {
      Layer& layer = problem.layers[i];
      const bool curved = layer.activation != Activation::relu;
      layer.y = scratch.at(y[i % 3]);
      layer.p = curved ? scratch.at(p[i % 2]) : nullptr;
      layer.y_stride = padded(layer.cols);
      layer.gradient_y = {curved ? layer.p : layer.y, layer.y_stride, 1};
      layer.goodness = total + i * rows;
      layer.loss = loss + i;
      if (i == 0) continue;
      const Layer& below = problem.layers[i - 1];
      const bool drops = layer.dropout > 0;
      layer.x = {drops ? scratch.at(dropped[i % 3]) : below.y, below.y_stride, 1};
      layer.x_sqnorm = {drops ? reinterpret_cast<float*>(scratch.at(sqnorms)) + i * rows : below.goodness, 1};
    }
  });
  return {totals, losses};
}

}  // namespace ffkernels::cuda
