// Operands of bf16 GEMM cores: panels of 32 rows or columns. Included by the instruction sets that have bf16 products.
//
// A panels: for each 32 of depth two tiles of 16 rows x 32 values. B panels: for each 32 of depth two tiles of 16 pairs
// of depth x 16 columns, the pairs side by side (VNNI). Depth is padded to 32 with zeros.
#pragma once

#include "cpu/simd.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

// 16 rows of 16 32-bit values, transposed in place
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int64_t i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The mask of the first `used` of 16 values.
inline __mmask16 first(int64_t used) {
  return used >= 16 ? 0xffff : used <= 0 ? 0 : static_cast<__mmask16>((1u << used) - 1);
}

// The bf16 nearest to each of 32 floats, in order.
inline __m512i round_to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// What 16 floats lose in rounding to bf16; 0 where that is infinite or NaN.
inline __m512 rest_of(__m512 x, __m256i rounded) {
  const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(back), _mm512_set1_ps(3.4e38f), _CMP_LE_OQ);
  return _mm512_maskz_sub_ps(finite, x, back);
}
inline __m256i lower(__m512i v) { return _mm512_castsi512_si256(v); }
inline __m256i upper(__m512i v) { return _mm512_extracti64x4_epi64(v, 1); }

// 16 values of rows m and m + 1 as 16 pairs
inline __m512i interleave(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// parts = 1: operands rounded to bf16. parts = 2: each as the sum of two bf16.
template <int64_t parts>
struct PanelsBf16 {
  static constexpr int64_t kRows = 32, kCols = 32, kDepthUnit = 32;
  static constexpr int64_t kBytes = 2 * parts;
  static constexpr double kThreadWork = 1e7 / parts;  // flops that are worth a second thread: some 20 us
  static constexpr int64_t kChunk = 512 / parts;      // depth at once: a panel's part takes 32 KiB
  static constexpr int64_t kGradientCols = 128;       // columns of dz in a gradient block
  using Element = char;
  static constexpr int64_t kAhead = 64;                              // values of a row to fetch ahead
  static constexpr int64_t kTile = 1024, kStep = 2 * kTile * parts;  // bytes; a step is 32 of depth

  static void store_parts(__m512 low, __m512 high, __m512i out[parts]) {
    out[0] = round_to_bf16(low, high);
    if constexpr (parts == 2) {
      out[1] = round_to_bf16(rest_of(low, lower(out[0])), rest_of(high, upper(out[0])));
    }
  }

  // Rows along the depth. A: a tile's row is 32 of depth as they stand. B: the same, transposed in 32-bit pairs.
  template <bool transposed>
  static void pack_rows(const float* from, int64_t stride, int64_t used, int64_t depth, char* to) {
    for (int64_t k = 0; k < depth; k += 32, to += kStep) {
      const __mmask16 low = first(depth - k), high = first(depth - k - 16);
      for (int64_t tile = 0; tile < 2; ++tile) {
        __m512i rows[parts][16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t row = tile * 16 + i;
          __m512i out[parts] = {};
          if (row < used) {
            const float* at = from + row * stride + k;
            // 32 rows are more streams than the hardware follows
            __builtin_prefetch(at + kAhead, 0, 3);
            __builtin_prefetch(at + kAhead + 16, 0, 3);
            store_parts(_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at + 16), out);
          }
          for (int64_t part = 0; part < parts; ++part) rows[part][i] = out[part];
        }
        for (int64_t part = 0; part < parts; ++part) {
          if (transposed) transpose(rows[part]);
          char* out = to + (part * 2 + tile) * kTile;
          for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 64, rows[part][i]);
        }
      }
    }
  }

  // Columns along the depth. B: pairs of rows side by side. A: the same, transposed.
  template <bool transposed>
  static void pack_cols(const float* from, int64_t stride, int64_t used, int64_t depth, char* to) {
    const __mmask16 low = first(used), high = first(used - 16);
    for (int64_t k = 0; k < depth; k += 32, to += kStep) {
      __m512i pairs[parts][2][16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = k + 2 * i;
        __m512i even[parts] = {}, odd[parts] = {};
        if (row < depth)
          store_parts(_mm512_maskz_loadu_ps(low, from + row * stride),
                      _mm512_maskz_loadu_ps(high, from + row * stride + 16), even);
        if (row + 1 < depth)
          store_parts(_mm512_maskz_loadu_ps(low, from + (row + 1) * stride),
                      _mm512_maskz_loadu_ps(high, from + (row + 1) * stride + 16), odd);
        for (int64_t part = 0; part < parts; ++part) {
          pairs[part][0][i] = interleave(lower(even[part]), lower(odd[part]));
          pairs[part][1][i] = interleave(upper(even[part]), upper(odd[part]));
        }
      }
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t tile = 0; tile < 2; ++tile) {
          if (transposed) transpose(pairs[part][tile]);
          char* out = to + (part * 2 + tile) * kTile;
          for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 64, pairs[part][tile][i]);
        }
      }
    }
  }
  static void pack_a_rows(const float* from, int64_t stride, int64_t used, int64_t depth, char* to) {
    pack_rows<false>(from, stride, used, depth, to);
  }
  static void pack_b_rows(const float* from, int64_t stride, int64_t used, int64_t depth, char* to) {
    pack_rows<true>(from, stride, used, depth, to);
  }
  static void pack_a_cols(const float* from, int64_t stride, int64_t used, int64_t depth, char* to) {
    pack_cols<true>(from, stride, used, depth, to);
  }
  static void pack_b_cols(const float* from, int64_t stride, int64_t used, int64_t depth, char* to) {
    pack_cols<false>(from, stride, used, depth, to);
  }
};

}  // namespace ffkernels::cpu::FFK_NAMESPACE
