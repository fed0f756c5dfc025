// What the machine can do at most, measured: the benchmarks' limit.
#pragma once

#include <cstdint>
#include <string>

namespace ffkernels::cpu {

// Floating-point operations a second (a multiply-add is two) of products in `precision` ("highest", "high", "medium")
// on the instruction set whose kernels run: `threads` threads with all operands in registers.
double cpu_peak(const std::string& precision, int64_t threads);

// Bytes a second that `threads` threads move to and from `bytes` of memory: reading it, or reading and writing it,
// whichever moves more.
double cpu_bandwidth(int64_t bytes, int64_t threads);

}  // namespace ffkernels::cpu
