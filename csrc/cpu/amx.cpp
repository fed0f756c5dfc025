// Machines with AVX512-BF16: its pairwise products, or AMX tiles where there are some.
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

#define FFK_NAMESPACE amx
#define FFK_LANES 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma,prefer-vector-width=512")
#include "cpu/core_amx.h"
#include "cpu/core_avx512_bf16.h"
#include "cpu/core_f32.h"
#include "cpu/head.h"
#include "cpu/layer.h"
#pragma GCC pop_options

namespace ffkernels::cpu {
const Kernels kernels_avx512_bf16 = {
    "avx512",
    {amx::run<amx::CoreF32<8, 3>>, amx::run<amx::CoreF32<8, 3>>, amx::run<amx::CoreAvx512Bf16>},
    amx::run_head};
const Kernels kernels_amx = {
    "amx", {amx::run<amx::CoreF32<8, 3>>, amx::run<amx::CoreAmx<2>>, amx::run<amx::CoreAmx<1>>}, amx::run_head};
}  // namespace ffkernels::cpu
#endif
