// The bf16 GEMM core on AVX512-BF16's dot products of pairs. Included by avx512.cpp.
#pragma once

#include "cpu/panels_bf16.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

struct CoreAvx512Bf16 : PanelsBf16<1> {
  static constexpr int64_t kFetches = 16;  // many, so that few lines are asked for at once
  static constexpr int64_t kGroup = 8;     // rows at once: 16 totals and their operands fill half of the registers

  static void enter() {}
  static void leave() {}

  // c (32, 32) = or += a b
  static void multiply(const Extent& used, const char* a, const char* b, float* c, int64_t stride, bool accumulate,
                       Ahead* ahead) {
    if (used.cols <= 16) {
      multiply<1>(used, a, b, c, stride, accumulate, ahead);
    } else {
      multiply<2>(used, a, b, c, stride, accumulate, ahead);
    }
  }

  // the first `count` vectors of each row
  template <int64_t count>
  static void multiply(const Extent& used, const char* a, const char* b, float* c, int64_t stride, bool accumulate,
                       Ahead* ahead) {
    const int64_t rows = smaller(kRows, used.rows);
    for (int64_t group = 0; group < rows; group += kGroup, c += kGroup * stride) {
      const char* left = a + group / 16 * kTile + group % 16 * 64;
      const char* right = b;
      __m512 total[kGroup][count];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kGroup; ++i) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < count; ++j) {
          total[i][j] = accumulate ? _mm512_loadu_ps(c + i * stride + 16 * j) : _mm512_setzero_ps();
        }
      }
      for (int64_t k = 0; k < used.depth; k += 32, left += kStep, right += kStep) {
        const int64_t pairs = smaller<int64_t>(16, (used.depth - k + 1) / 2);
        for (int64_t pair = 0; pair < pairs; ++pair) {
          if (pair % 4 == 0) ahead->fetch();
          __m512bh columns[count];
#pragma GCC unroll 2
          for (int64_t j = 0; j < count; ++j) {
            columns[j] = (__m512bh)_mm512_loadu_si512(right + j * kTile + pair * 64);
          }
#pragma GCC unroll 8
          for (int64_t i = 0; i < kGroup; ++i) {
            int32_t values;
            __builtin_memcpy(&values, left + i * 64 + pair * 4, 4);
            const auto both = (__m512bh)_mm512_set1_epi32(values);
#pragma GCC unroll 2
            for (int64_t j = 0; j < count; ++j) total[i][j] = _mm512_dpbf16_ps(total[i][j], both, columns[j]);
          }
        }
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kGroup; ++i) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < count; ++j) _mm512_storeu_ps(c + i * stride + 16 * j, total[i][j]);
      }
    }
  }
};

}  // namespace ffkernels::cpu::FFK_NAMESPACE
