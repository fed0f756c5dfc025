// AVX-512 (F, BW, DQ, VL), with and without its bf16 products.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>

#include "cpu/job.h"

#if defined(__x86_64__)
// gcc 12 warns of its own intrinsics, which leave an unused operand undefined on purpose (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#define FFK_NAMESPACE avx512
#define FFK_LANES 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#include "cpu/core_f32.h"
#include "cpu/head.h"
#include "cpu/layer.h"
#pragma GCC pop_options

namespace ffkernels::cpu {
const Kernels kernels_avx512 = {
    "avx512",
    {avx512::run<avx512::CoreF32<8, 3>>, avx512::run<avx512::CoreF32<8, 3>>, avx512::run<avx512::CoreF32<8, 3>>},
    avx512::run_head};
}
#endif
