// A call of an op on its way: its arguments are checked and become a Problem, its results and scratch memory are
// allocated, and its plan is launched. Whatever can fail happens before the first launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <functional>

#include "cuda/plan.h"
#include "cuda/record.h"
#include "kernels.h"

namespace ffkernels::cuda {

// What becomes the call's Problem, and the checks that all of its arguments share.
class Call {
 public:
  Call(const char* op, const Tensor& x);  // x: whose dtype and device the others must have

  void add(const Layer& layer, const std::string& precision);  // the layers of the Problem, from the input on

  const void* data(const Tensor& t, const char* name, int64_t dim, ScalarType type) const {
    return checked_data(t, name, dim, type, place);
  }
  // With `minibatch`, and where the call is of several, t has one more dimension, whose stride is stored there.
  Matrix matrix(const Tensor& t, const char* name, int64_t* minibatch = nullptr) const;
  // an input; not given: null
  Vector vector(const OptionalTensor& t, const char* name, int64_t size, int64_t* minibatch = nullptr);

  template <size_t dim>
  Tensor new_tensor(const std::array<int64_t, dim>& sizes, ScalarType type) const {
    return new_tensor(dim, sizes.data(), type);
  }

  Place place;
  ScalarType dtype;
  Spans spans;
  Problem problem;
  bool stacked = false;  // the call is of problem.minibatches.end minibatches

  int64_t lead(const int64_t* minibatch) const { return stacked && minibatch ? 1 : 0; }  // dimensions before the others
  void set_minibatches(int64_t count);
  // t's first dimension is of minibatches.
  void step_over(const Tensor& t, const char* name, int64_t* minibatch) const;

 private:
  Tensor new_tensor(size_t dim, const int64_t* sizes, ScalarType type) const;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// One allocation for all the memory that a call needs beside its results. Parts are asked for first and placed later.
class Scratch {
 public:
  int64_t add(const char* name, int64_t bytes) {
    const int64_t offset = bytes_;
    if (bytes > 0) parts_.push_back({name, offset, bytes});
    bytes_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  void allocate(const Call& call) {
    tensor_ = call.new_tensor<1>({bytes_}, ScalarType::Byte);
    data_ = static_cast<char*>(tensor_->mutable_data_ptr());
  }
  char* at(int64_t offset) const { return data_ + offset; }
  const Tensor& tensor() const { return *tensor_; }
  const std::vector<Part>& parts() const { return parts_; }

 private:
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::optional<Tensor> tensor_;
  char* data_ = nullptr;
};

int32_t checked_int(int64_t size, const char* name);

// A layer on its input of `depth` columns.
Layer layer_of(Call& call, int64_t depth, const Tensor& weight, const OptionalTensor& bias,
               const std::string& normalize, double eps, const std::string& activation);

void set_input(Call& call, Layer& layer, const Tensor& x);
void set_loss(Layer& layer, const LossArguments& loss);
void set_labels(Call& call, const Tensor& x, int64_t num_classes, double strength);
void set_label_pair(Call& call, const Tensor& x, const LabelPair& pair);
void set_optimizer(Call& call, Layer& layer, const Tensor& weight, const OptionalTensor& bias,
                   const FlatOptimizer& flat);

// Launches what the problem asks for; `scratch` holds what its layers need, and gets the workspace's parts. `place` is
// called once scratch has its memory, and sets the layers' pointers into it.
void run(Call& call, Scratch& scratch, const std::function<void()>& place);

}  // namespace ffkernels::cuda
