// The bf16 GEMM core on AVX512-BF16's dot products of pairs. Included by avx512.cpp.
#pragma once

#include "cpu/panels_bf16.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

struct CoreAvx512Bf16 : PanelsBf16<1> {
  static constexpr int64_t kGroup = 8;  // rows at once: 16 totals and their operands fill half of the registers

  static void enter() {}
  static void leave() {}

  // c (32, 32) = or += a b
  static void multiply(int64_t depth, const char* a, const char* b, float* c, int64_t stride, bool accumulate,
                       Ahead* ahead) {
    for (int64_t group = 0; group < kRows; group += kGroup, c += kGroup * stride) {
      const char* left = a + group / 16 * kTile + group % 16 * 64;
      const char* right = b;
      __m512 total[kGroup][2];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kGroup; ++i) {
        total[i][0] = accumulate ? _mm512_loadu_ps(c + i * stride) : _mm512_setzero_ps();
        total[i][1] = accumulate ? _mm512_loadu_ps(c + i * stride + 16) : _mm512_setzero_ps();
      }
      for (int64_t k = 0; k < depth; k += 32, left += kStep, right += kStep) {
        if (group == 0) ahead->fetch();
        for (int64_t pair = 0; pair < 16; ++pair) {
          const auto b0 = (__m512bh)_mm512_loadu_si512(right + pair * 64);
          const auto b1 = (__m512bh)_mm512_loadu_si512(right + kTile + pair * 64);
#pragma GCC unroll 8
          for (int64_t i = 0; i < kGroup; ++i) {
            int32_t values;
            __builtin_memcpy(&values, left + i * 64 + pair * 4, 4);
            const auto both = (__m512bh)_mm512_set1_epi32(values);
            total[i][0] = _mm512_dpbf16_ps(total[i][0], both, b0);
            total[i][1] = _mm512_dpbf16_ps(total[i][1], both, b1);
          }
        }
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kGroup; ++i) {
        _mm512_storeu_ps(c + i * stride, total[i][0]);
        _mm512_storeu_ps(c + i * stride + 16, total[i][1]);
      }
    }
  }
};

}  // namespace ffkernels::cpu::FFK_NAMESPACE
