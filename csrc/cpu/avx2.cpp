// AVX2 and FMA: vectors of eight floats.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>

#include "cpu/job.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FFK_NAMESPACE avx2
#define FFK_LANES 8
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/core_f32.h"
#include "cpu/head.h"
#include "cpu/layer.h"
#pragma GCC pop_options

namespace ffkernels::cpu {
const Kernels kernels_avx2 = {
    "avx2",
    {avx2::run<avx2::CoreF32<6, 2>>, avx2::run<avx2::CoreF32<6, 2>>, avx2::run<avx2::CoreF32<6, 2>>},
    avx2::run_head};
}
#endif
