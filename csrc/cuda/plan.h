// What to launch for an op: decided from its arguments and the device's numbers alone, without any call of CUDA.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cuda/params.h"

namespace ffkernels::cuda {

// What a plan needs to know of a device and of the kernels on it.
struct Device {
  int32_t capability = 0;  // 80, 90, ...
  int32_t multiprocessors = 0;
  bool cooperative = false;                    // whether the blocks of a launch may wait for each other
  std::array<int32_t, kMathKinds> resident{};  // blocks of each kernel that one multiprocessor holds at once

  int64_t capacity(Math math) const { return int64_t{multiprocessors} * resident[static_cast<size_t>(math)]; }
};

// A call of an op, for a network of one layer or more. The layers' buffers, sizes and options are filled in; how often
// the rows of an update are split, and the workspace, are the plan's business.
struct Problem {
  const char* op = "";
  int32_t rows = 0;           // of y
  int32_t positive_rows = 0;  // see Params
  Minibatches minibatches{0, 1, 0, 0, 0, 0};
  Labels labels{};
  const int64_t* dropout_seed = nullptr;
  std::vector<Layer> layers;
  std::vector<Math> maths;  // of the layers

  int64_t base_rows() const { return rows / labels.candidates; }
  int64_t rows_of(size_t layer) const { return layer == 0 ? base_rows() : rows; }  // of the layer's x
};

// Elements of each buffer of a Workspace, and the numbers that stand in it.
struct WorkspaceSizes {
  int64_t words, partial, loss_partial, rows, split, columns;
  int32_t row_tiles, weight_tiles, widest;
};

struct Launch {
  Math math;
  int64_t grid;  // blocks of kThreads threads with shared_bytes(math) of dynamic shared memory
  bool cooperative;
  Params params;
};

// How many work items share the rows of a weight tile. Few weight tiles leave multiprocessors idle: splitting the rows
// gives them work, and costs a write of the tile's sums by each and a read of all by the last.
int32_t choose_splits(int64_t row_tiles, int64_t weight_tiles, int64_t forward_steps, int64_t capacity);

// "ff_step_ of 128 x 784 -> 500", for messages.
std::string describe(const Problem& problem);

// Sets the splits of every layer: those of one minibatch, however many there are, so that their number changes no bit.
// Raises where the device cannot run the kernels.
void set_splits(Problem& problem, const Device& device);

WorkspaceSizes workspace_sizes(const Problem& problem);

// One launch, from the first stage with work on; several, and these for each minibatch, of a network with more than
// kMaxLayers layers or with layers of different precision. Where the device has no cooperative launch, one a stage: the
// same bits, for more time.
std::vector<Launch> plan(const Problem& problem, const Workspace& workspace, const Device& device);

}  // namespace ffkernels::cuda
