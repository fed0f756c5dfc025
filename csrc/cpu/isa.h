// Which instruction set's kernels run.
#pragma once

#include <string>

#include "cpu/job.h"

namespace ffkernels::cpu {

// The best that this machine has, or the lower one that FFKERNELS_CPU_ISA names; throws where it names none of them.
const Kernels& kernels();

// The names of all that this machine can run, from the lowest on, with commas between.
std::string available_isas();

}  // namespace ffkernels::cpu
