#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>

namespace ffkernels::cuda {
namespace {

// Layers of one launch, and what a stage of them has to do.
struct Part {
  Math math;
  Params params{};
  bool updates = false;

  int32_t steps() const { return params.minibatches.end - params.minibatches.begin; }
  int32_t stages() const { return params.layers + (updates ? 1 : 0) + kBehind * (steps() - 1); }
  int64_t items(int32_t stage) const {
    int64_t items = 0;
    for (int32_t step = 0; step < steps(); ++step) items += items_of_one(stage - kBehind * step);
    return items;
  }

 private:
  // Of a minibatch in its own stage; none before the first, or behind the last.
  int64_t items_of_one(int32_t stage) const {
    int64_t items = 0;
    if (stage >= 0 && stage < params.layers) {
      const Layer& layer = params.layer[stage];
      const int64_t rows = stage == 0 ? params.rows / params.labels.candidates : params.rows;
      items += layer.forward ? forward_items(rows, layer.cols) : layer.coef.data != nullptr ? tiles(rows) : 0;
    }
    if (stage > 0 && stage <= params.layers && params.layer[stage - 1].update) {
      const Layer& layer = params.layer[stage - 1];
      items += update_items(layer.cols, layer.depth, layer.splits);
    }
    return items;
  }
};

// The layers from `begin` on that fit into a launch, which `begin` is moved behind. The forward pass of a layer writes
// the next one's input where that has dropout, so such a neighbour comes along, without work of its own.
Part take_part(const Problem& problem, size_t& begin) {
  const auto dropped = [&](size_t i) { return i < problem.layers.size() && problem.layers[i].dropout > 0; };
  Part part{problem.maths[begin]};
  size_t count = 1;
  while (count < kMaxLayers && begin + count < problem.layers.size() && problem.maths[begin + count] == part.math) {
    ++count;
  }
  if (count == kMaxLayers && dropped(begin + count)) --count;
  Params& params = part.params;
  params.rows = problem.rows;
  params.positive_rows = problem.positive_rows;
  params.minibatches = problem.minibatches;
  params.labels = problem.labels;
  if (begin > 0) {
    params.labels = Labels{};
    params.labels.candidates = 1;
  }
  params.dropout_seed = problem.dropout_seed;
  std::copy_n(problem.layers.begin() + begin, count, params.layer);
  params.layer[0].dropout = 0;  // its input is there already
  params.layers = static_cast<int32_t>(count);
  if (dropped(begin + count)) {
    Layer& neighbour = params.layer[params.layers++];
    neighbour = problem.layers[begin + count];
    neighbour.forward = neighbour.update = 0;
    neighbour.coef = {};
  }
  for (size_t i = 0; i < count; ++i) part.updates |= params.layer[i].update != 0;
  begin += count;
  return part;
}

}  // namespace

int32_t choose_splits(int64_t row_tiles, int64_t weight_tiles, int64_t forward_steps, int64_t capacity) {
  // Time in units of one step of a tile's product, which loads 16 KiB; the sums of a tile are as large.
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(row_tiles, 1); ++splits) {
    const int64_t steps = (row_tiles + splits - 1) / splits;
    const int64_t item = steps + (splits > 1 ? 1 + splits : 0);
    const int64_t items = weight_tiles * splits;
    const int64_t alone = (items + capacity - 1) / capacity * item;    // in waves of blocks
    const int64_t shared = (forward_steps + items * item) / capacity;  // beside the forward pass
    const int64_t time = std::max(alone, shared);
    if (splits == 1 || 10 * time < 9 * least) best = splits, least = time;  // not for a few per cent
  }
  return static_cast<int32_t>(best);
}

std::string describe(const Problem& problem) {
  std::string text = std::string(problem.op) + " of ";
  if (problem.rows > 0) text += std::to_string(problem.base_rows()) + " x ";
  if (!problem.layers.empty()) text += std::to_string(problem.layers[0].depth);
  for (const Layer& layer : problem.layers) text += " -> " + std::to_string(layer.cols);
  if (problem.minibatches.end > 1) text += ", " + std::to_string(problem.minibatches.end) + " minibatches";
  return text;
}

void set_splits(Problem& problem, const Device& device) {
  if (device.capability < 80) {
    throw std::runtime_error("the CUDA kernels need a GPU of compute capability 8.0 or newer, this one has " +
                             std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10));
  }
  int64_t split_floats = 0;
  for (size_t i = 0; i < problem.layers.size(); ++i) {
    Layer& layer = problem.layers[i];
    const Math math = problem.maths[i];
    if (device.capacity(math) < 1) {
      throw std::runtime_error(describe(problem) + ": kernel " + kernel_name(math) + " needs " +
                               std::to_string(shared_bytes(math)) +
                               " bytes of shared memory a block, more than this GPU has");
    }
    int64_t forward_steps = 0;
    if (i + 1 < problem.layers.size()) {
      const Layer& above = problem.layers[i + 1];
      forward_steps = forward_items(problem.rows, above.cols) * tiles(above.depth);
    }
    layer.splits = choose_splits(tiles(problem.rows_of(i)), update_items(layer.cols, layer.depth, 1), forward_steps,
                                 device.capacity(math));
    layer.split_offset = split_floats;
    if (layer.splits > 1) split_floats += update_items(layer.cols, layer.depth, layer.splits) * kSplitFloats;
  }
}

WorkspaceSizes workspace_sizes(const Problem& problem) {
  int64_t widest = 0, weight_tiles = 0, split = 0, row_tiles = 0;
  const auto layers = static_cast<int64_t>(problem.layers.size());
  bool peers = false;
  for (size_t i = 0; i < problem.layers.size(); ++i) {
    const Layer& layer = problem.layers[i];
    widest = std::max<int64_t>(widest, layer.cols);
    weight_tiles = std::max(weight_tiles, update_items(layer.cols, layer.depth, 1));
    row_tiles = std::max(row_tiles, tiles(problem.rows_of(i)));
    peers |= layer.peer_mean != nullptr;
    if (layer.splits > 1) split += update_items(layer.cols, layer.depth, layer.splits) * kSplitFloats;
  }
  return {word_count(layers, row_tiles, weight_tiles),
          layers * partial_count(problem.rows, widest),
          layers * row_tiles,
          row_vector_count(layers, problem.rows),
          split,
          peers ? layers * column_count(row_tiles, widest) : 0,
          static_cast<int32_t>(row_tiles),
          static_cast<int32_t>(weight_tiles),
          static_cast<int32_t>(widest)};
}

std::vector<Launch> plan(const Problem& problem, const Workspace& workspace, const Device& device) {
  std::vector<Part> parts;
  for (size_t begin = 0; begin < problem.layers.size();) {
    parts.push_back(take_part(problem, begin));
    parts.back().params.workspace = workspace;
  }
  // Minibatches overlap where one launch has all layers.
  const int32_t all = problem.minibatches.end, together = parts.size() == 1 ? all : 1;
  std::vector<Launch> launches;
  for (int32_t minibatch = 0; minibatch < all; minibatch += together) {
    for (Part& part : parts) {
      part.params.minibatches.begin = minibatch;
      part.params.minibatches.end = minibatch + together;
      const int32_t stages = part.stages();
      int32_t first = 0;
      while (first + 1 < stages && part.items(first) == 0) ++first;
      for (int32_t stage = first; stage < stages;) {
        const int32_t end = device.cooperative ? stages : stage + 1;
        int64_t items = 1;
        for (int32_t s = stage; s < end; ++s) items = std::max(items, part.items(s));
        part.params.stage_begin = stage;
        part.params.stage_end = end;
        launches.push_back({part.math, std::min(items, device.capacity(part.math)), end - stage > 1, part.params});
        stage = end;
      }
    }
  }
  return launches;
}

}  // namespace ffkernels::cuda
