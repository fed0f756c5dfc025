// Any machine: vectors of four floats, which SSE2 and NEON have.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>

#include "cpu/job.h"

#define FFK_NAMESPACE portable
#define FFK_LANES 4
#include "cpu/core_f32.h"
#include "cpu/head.h"
#include "cpu/layer.h"
namespace ffkernels::cpu {
const Kernels kernels_portable = {"portable",
                                  {portable::run<portable::CoreF32<4, 3>>, portable::run<portable::CoreF32<4, 3>>,
                                   portable::run<portable::CoreF32<4, 3>>},
                                  portable::run_head};
}
