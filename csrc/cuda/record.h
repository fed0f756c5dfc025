// Plans without a GPU, for tests: while a recording is on, the ops take CPU tensors, do all that they do on a GPU
// except for the launches, and what they would launch is kept.
#pragma once

#include <tuple>
#include <vector>

#include "arguments.h"
#include "cuda/plan.h"

namespace ffkernels::cuda {

// Named parts of the memory that a call allocates beside its results.
struct Part {
  std::string name;
  int64_t offset, bytes;
};

bool recording();
const Device& recorded_device();
void record(const std::vector<Launch>& launches, const std::string& call, const Tensor& scratch,
            const std::vector<Part>& parts);

// The ops ffkernels::cuda_record and cuda_recorded. The first starts a recording in this thread, for a device of these
// numbers (`resident`: one a Math); the second ends it. It returns the scratch memory of each call, and as JSON what
// the parts of that memory are and what is to be launched.
void cuda_record(int64_t capability, int64_t multiprocessors, bool cooperative, const std::vector<int64_t>& resident);
std::tuple<std::string, std::vector<Tensor>> cuda_recorded();

}  // namespace ffkernels::cuda
