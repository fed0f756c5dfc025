#include "cuda/call.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/launch.h"

namespace ffkernels::cuda {

Call::Call(const char* op, const Tensor& x) : place(place_of(x)), dtype(x.scalar_type()), spans(place) {
  STD_TORCH_CHECK(!place.on_cpu() || recording(), "x: must be on a CUDA device");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "x: must be float32, bfloat16 or float16");
  problem.op = op;
  problem.labels.candidates = 1;
  if (!place.on_cpu()) guard_.emplace(place.index);
}

void Call::add(const Layer& layer, const std::string& precision) {
  const auto parsed = parse_precision<int>(precision);
  problem.layers.push_back(layer);
  problem.maths.push_back(dtype == ScalarType::BFloat16 ? Math::bf16
                          : dtype == ScalarType::Half   ? Math::fp16
                          : parsed == 0                 ? Math::f32
                          : parsed == 1                 ? Math::tf32
                                                        : Math::f32_bf16);
}

void Call::set_minibatches(int64_t count) {
  STD_TORCH_CHECK(count > 0, "x: must have at least one minibatch");
  stacked = true;
  problem.minibatches.end = checked_int(count, "x");
}

void Call::step_over(const Tensor& t, const char* name, int64_t* minibatch) const {
  check_size(t, name, 0, problem.minibatches.end);
  *minibatch = t.stride(0);
}

Matrix Call::matrix(const Tensor& t, const char* name, int64_t* minibatch) const {
  const int64_t rows = lead(minibatch), cols = rows + 1;
  const void* data = this->data(t, name, cols + 1, dtype);
  for (int64_t d = rows; d <= cols; ++d)
    checked_int(t.stride(d) * width_of(dtype), name);  // the kernels' type for them
  if (rows > 0) step_over(t, name, minibatch);
  return {data, t.stride(rows), t.stride(cols)};
}

Vector Call::vector(const OptionalTensor& t, const char* name, int64_t size, int64_t* minibatch) {
  if (!t) return {};
  const int64_t rows = lead(minibatch);
  const void* data = this->data(*t, name, rows + 1, ScalarType::Float);
  if (rows > 0) step_over(*t, name, minibatch);
  check_size(*t, name, rows, size);
  spans.input(t);
  return {static_cast<const float*>(data), t->stride(rows)};
}

Tensor Call::new_tensor(size_t dim, const int64_t* sizes, ScalarType type) const {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16(), uint8 = aoti_torch_dtype_uint8();
  std::array<int64_t, 3> strides;
  int64_t stride = 1;
  for (size_t d = dim; d-- > 0; stride *= sizes[d]) strides[d] = stride;
  AtenTensorHandle handle = nullptr;
  const int32_t code = type == ScalarType::BFloat16 ? bfloat16
                       : type == ScalarType::Half   ? float16
                       : type == ScalarType::Byte   ? uint8
                                                    : float32;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides.data(), code, place.type, place.index, &handle));
  return Tensor(handle);
}

int32_t checked_int(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int32_t>::max(), name, ": is too large for the CUDA kernels");
  return static_cast<int32_t>(size);
}

Layer layer_of(Call& call, int64_t depth, const Tensor& weight, const OptionalTensor& bias,
               const std::string& normalize, double eps, const std::string& activation) {
  Layer layer{};
  layer.weight = call.matrix(weight, "weight");
  layer.depth = checked_int(depth, "x");
  layer.cols = checked_int(weight.size(0), "weight");
  if (bias) {
    layer.bias = call.data(*bias, "bias", 1, call.dtype);
    layer.bias_stride = bias->stride(0);
  }
  check_layer_sizes(weight, bias, depth);
  layer.normalize = parse_normalize<Normalize>(normalize);
  layer.activation = parse_activation<Activation>(activation);
  layer.eps = static_cast<float>(eps);
  return layer;
}

void set_input(Call& call, Layer& layer, const Tensor& x) {
  layer.x = call.matrix(x, "x", &layer.x_minibatch);
  call.problem.rows = checked_int(x.size(call.stacked ? 1 : 0) * call.problem.labels.candidates, "x");
  call.spans.input(x);
}

void set_loss(Layer& layer, const LossArguments& loss) {
  layer.threshold = static_cast<float>(loss.threshold);
  layer.temperature = static_cast<float>(loss.temperature);
  layer.divisor = loss.divisor(layer.cols);
}

void set_labels(Call& call, const Tensor& x, int64_t num_classes, double strength) {
  const int64_t dims = call.stacked ? 3 : 2;
  STD_TORCH_CHECK(x.dim() == dims, "x: must have ", dims, " dimensions, has ", x.dim());
  check_num_classes(num_classes, x.size(dims - 1));
  Labels& labels = call.problem.labels;
  labels.num_classes = static_cast<int32_t>(num_classes);
  const auto number = static_cast<float>(strength);  // as a number of x's type
  labels.strength = call.dtype == ScalarType::BFloat16 ? static_cast<float>(torch::headeronly::BFloat16(number))
                    : call.dtype == ScalarType::Half   ? static_cast<float>(torch::headeronly::Half(number))
                                                       : number;
}

void set_label_pair(Call& call, const Tensor& x, const LabelPair& pair) {
  set_labels(call, x, pair.num_classes, pair.strength);
  Labels& labels = call.problem.labels;
  labels.candidates = 2;
  labels.separate = 1;
  const int64_t rows = call.stacked ? 1 : 0;
  call.problem.positive_rows = checked_int(x.size(rows), "x");
  for (int c = 0; c < 2; ++c) {
    const Tensor& t = c == 0 ? pair.positive : pair.negative;
    const char* name = c == 0 ? "labels_pos" : "labels_neg";
    labels.label[c] = static_cast<const int64_t*>(call.data(t, name, rows + 1, ScalarType::Long));
    labels.row_stride[c] = t.stride(rows);
    if (call.stacked) call.step_over(t, name, &labels.minibatch_stride[c]);
    check_size(t, name, rows, x.size(rows));
    call.spans.input(t);
  }
}

void set_optimizer(Call& call, Layer& layer, const Tensor& weight, const OptionalTensor& bias,
                   const FlatOptimizer& flat) {
  const OptimizerArguments given = optimizer_arguments(call.spans, weight, bias, call.dtype, flat);
  Optimizer& o = layer.optimizer;
  o.kind = static_cast<OptimizerKind>(static_cast<int>(given.name) + 1);  // 0 is store
  o.step = given.step;
  std::copy_n(given.slot, 2, o.slot);
  std::copy_n(given.bias_slot, 2, o.bias_slot);
  o.lr_tensor = given.lr_tensor;
  o.lr = static_cast<float>(given.lr);
  o.weight_decay = static_cast<float>(given.weight_decay);
  o.momentum = static_cast<float>(given.momentum);
  o.dampening = static_cast<float>(given.dampening);
  o.nesterov = given.nesterov;
  if (given.adam()) {
    o.beta1 = static_cast<float>(given.beta1);
    o.beta2 = static_cast<float>(given.beta2);
    o.rest1 = static_cast<float>(1.0 - given.beta1);
    o.rest2 = static_cast<float>(1.0 - given.beta2);
    o.log_beta1 = static_cast<float>(std::log(given.beta1));
    o.log_beta2 = static_cast<float>(std::log(given.beta2));
    o.eps = static_cast<float>(given.eps);
  }
  layer.update = 1;
}

void run(Call& call, Scratch& scratch, const std::function<void()>& place) {
  Problem& problem = call.problem;
  const bool records = recording();
  const Device& device = records ? recorded_device() : device_of(call.place.index);
  set_splits(problem, device);
  const WorkspaceSizes sizes = workspace_sizes(problem);
  void* stream = records ? nullptr : current_stream(call.place.index);
  Workspace workspace{};
  if (!records) workspace.words = words_of_stream(call.place.index, stream, sizes.words);
  const bool own_words = workspace.words == nullptr;
  const int64_t words = scratch.add("words", own_words ? 4 * sizes.words : 0);
  const int64_t partial = scratch.add("partial", 4 * sizes.partial);
  const int64_t loss_partial = scratch.add("loss_partial", 4 * sizes.loss_partial);
  const int64_t rows = scratch.add("rows", 4 * sizes.rows);
  const int64_t split = scratch.add("split", 4 * sizes.split);
  const int64_t columns = scratch.add("columns", 4 * sizes.columns);
  scratch.allocate(call);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(scratch.at(offset)); };
  workspace.partial = floats(partial);
  workspace.loss_partial = floats(loss_partial);
  workspace.rows = floats(rows);
  workspace.split = floats(split);
  workspace.columns = floats(columns);
  workspace.row_tiles = sizes.row_tiles;
  workspace.weight_tiles = sizes.weight_tiles;
  workspace.widest = sizes.widest;
  if (own_words) workspace.words = reinterpret_cast<uint32_t*>(scratch.at(words));
  place();
  const std::vector<Launch> launches = plan(problem, workspace, device);
  if (records) {
    record(launches, describe(problem), scratch.tensor(), scratch.parts());
    return;
  }
  if (own_words) set_to_zero(workspace.words, 4 * sizes.words, stream);
  cuda::run(launches, problem, stream);
}

}  // namespace ffkernels::cuda
