// The arguments of ff_network_step_: flat lists with an entry a layer, and the way through them.
#pragma once

#include "layer_arguments.h"

namespace ffkernels {

// In the order of the schema. Of several minibatches x, sign, x_sqnorm, labels and dropout_seed have one more
// dimension, the first.
struct NetworkArguments {
  const Tensor& x;
  const std::optional<Tensor>&sign, &x_sqnorm, &labels_pos, &labels_neg;
  int64_t num_classes;
  double strength;
  const std::vector<Tensor>&weights, &biases, &states;  // biases, states: of the layers that have any, in their order
  const std::vector<bool>& has_bias;
  const std::vector<int64_t>& state_sizes;
  const std::vector<std::string>& optimizers;
  const std::vector<Tensor>& lrs;  // empty where they are numbers
  const std::vector<double>&hypers, &thresholds, &temperatures;
  const std::vector<std::string>&goodness, &normalize;
  const std::vector<double>& eps;
  const std::vector<std::string>&activations, &precisions;
  const std::vector<double>& peers;
  const std::vector<Tensor>& peer_means;  // of the layers whose peer is not 0
  const std::vector<double>& dropouts;
  const std::optional<Tensor>& dropout_seed;

  bool stacked() const { return x.dim() == 3; }  // several minibatches, though it may be one
  int64_t rows() const { return x.size(stacked() ? 1 : 0) * (labels_pos ? 2 : 1); }  // of y
  LabelPair label_pair() const { return {*labels_pos, *labels_neg, num_classes, strength}; }
};

struct NetworkLayer {
  const Tensor& weight;
  std::optional<Tensor> bias;
  FlatOptimizer optimizer;
  double threshold, temperature;
  const std::string &goodness, &normalize;
  double eps;
  const std::string &activation, &precision;
  double peer;
  const Tensor* peer_mean;  // null without peer normalisation
  double dropout;
};

// Of ff_network_forward, in the order of the schema.
struct NetworkForwardArguments {
  const Tensor& x;
  const std::optional<Tensor>& x_sqnorm;
  int64_t num_classes;  // columns that carry the neutral label; 0: none
  double strength;
  const std::vector<Tensor>&weights, &biases;  // biases: of the layers that have any, in their order
  const std::vector<bool>& has_bias;
  const std::vector<std::string>& normalize;
  const std::vector<double>& eps;
  const std::vector<std::string>&activations, &precisions;
};

inline std::vector<NetworkLayer> layers_of(const NetworkArguments& n) {
  const size_t count = n.weights.size();
  const auto check_count = [&](size_t size) {
    STD_TORCH_CHECK(size == count, "layers: every list must have an entry a layer");
  };
  STD_TORCH_CHECK(count > 0, "layers: there must be at least one");
  check_count(n.has_bias.size());
  check_count(n.state_sizes.size());
  for (const auto* texts : {&n.optimizers, &n.goodness, &n.normalize, &n.activations, &n.precisions}) {
    check_count(texts->size());
  }
  for (const auto* numbers : {&n.thresholds, &n.temperatures, &n.eps, &n.peers, &n.dropouts}) {
    check_count(numbers->size());
  }
  check_hyper(n.hypers, count);
  STD_TORCH_CHECK(n.lrs.empty() || n.lrs.size() == count, "lrs: must be a tensor a layer, or none");
  STD_TORCH_CHECK(
      n.labels_pos.has_value() == n.labels_neg.has_value() && n.labels_pos.has_value() != n.sign.has_value(),
      "either sign or both labels must be given");
  std::vector<NetworkLayer> layers;
  layers.reserve(count);
  size_t bias_at = 0, state_at = 0, peer_at = 0;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(!n.has_bias[i] || bias_at < n.biases.size(), "biases: too few");
    const auto state_size = static_cast<size_t>(n.state_sizes[i]);
    STD_TORCH_CHECK(state_size > 0 && state_size <= n.states.size() - state_at, "states: too few");
    STD_TORCH_CHECK(n.peers[i] == 0.0 || peer_at < n.peer_means.size(), "peer_means: too few");
    STD_TORCH_CHECK(n.dropouts[i] >= 0.0 && n.dropouts[i] < 1.0 && (i > 0 || n.dropouts[i] == 0.0),
                    "dropout: must be in [0, 1), and 0 in the first layer");
    STD_TORCH_CHECK(n.dropouts[i] == 0.0 || n.dropout_seed, "dropout_seed: must be given");
    layers.push_back({n.weights[i],
                      n.has_bias[i] ? std::optional<Tensor>(n.biases[bias_at++]) : std::nullopt,
                      {n.optimizers[i], &n.states[state_at], n.state_sizes[i], n.lrs.empty() ? nullptr : &n.lrs[i],
                       &n.hypers[5 * i]},
                      n.thresholds[i],
                      n.temperatures[i],
                      n.goodness[i],
                      n.normalize[i],
                      n.eps[i],
                      n.activations[i],
                      n.precisions[i],
                      n.peers[i],
                      n.peers[i] == 0.0 ? nullptr : &n.peer_means[peer_at++],
                      n.dropouts[i]});
    state_at += state_size;
  }
  return layers;
}

// (1,) int64, or (S,); null where no layer has dropout.
inline const int64_t* dropout_seed_of(const NetworkArguments& n, Spans& spans) {
  bool any = false;
  for (const double p : n.dropouts) any |= p > 0.0;
  if (!any) return nullptr;
  const auto* seed =
      static_cast<const int64_t*>(checked_data(*n.dropout_seed, "dropout_seed", 1, ScalarType::Long, spans.place()));
  check_size(*n.dropout_seed, "dropout_seed", 0, n.stacked() ? n.x.size(0) : 1);
  spans.input(n.dropout_seed);
  return seed;
}

}  // namespace ffkernels
