// The calls of the CUDA runtime. Each is checked: an error becomes an exception that says what was being done.
#pragma once

#include "cuda/plan.h"

namespace ffkernels::cuda {

// The numbers of device `index`, looked up once.
const Device& device_of(int32_t index);

// torch's current stream, a cudaStream_t.
void* current_stream(int32_t index);

// Memory for Workspace::words, zero before its first use. One launch after another leaves it ready for the next, so a
// stream has one such memory for all its launches. Null where that does not hold: what is captured into a graph may run
// beside other launches, and the per-thread default stream is many streams.
uint32_t* words_of_stream(int32_t index, void* stream, int64_t count);

void set_to_zero(void* data, int64_t bytes, void* stream);

void run(const std::vector<Launch>& launches, const Problem& problem, void* stream);

}  // namespace ffkernels::cuda
