// The float32 GEMM core: register tiles of kRows x kVectors vectors, for any width. Included by each instruction set.
//
// A core packs its operands into panels: A panels of kRows rows, B panels of kCols columns, each holding the whole
// depth, zero beyond the matrix. "rows" packs a matrix whose rows run along the depth, "cols" one whose columns do.
#pragma once

#include "cpu/simd.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

template <int64_t rows_, int64_t vectors_>
struct CoreF32 {
  static constexpr int64_t kRows = rows_, kCols = vectors_ * kLanes, kDepthUnit = 1;
  static constexpr int64_t kBytes = 4;                 // of a packed element
  static constexpr double kThreadWork = 2e5 * kLanes;  // flops that are worth a second thread: some 20 us
  static constexpr int64_t kChunk = 256;               // depth at once: the panels' parts stay in the L1 cache
  static constexpr int64_t kGradientCols = 128;        // columns of dz in a gradient block
  static constexpr int64_t kFetches = 1;               // calls of fetch() a panel and kFetchDepth
  using Element = float;

  static void enter() {}
  static void leave() {}

  template <int64_t tile>
  static void pack_rows(const float* from, int64_t stride, int64_t used, int64_t depth, float* to) {
    int64_t k = 0;
    for (; used == tile && k + kLanes <= depth; k += kLanes) {
#pragma GCC unroll 4
      for (int64_t row = 0; row < tile; row += kLanes) {
        Vector block[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          if (row + i >= tile) {
            block[i] = Vector{};
            continue;
          }
          const float* at = from + (row + i) * stride + k;
          __builtin_prefetch(at + 64, 0, 3);  // more rows than the hardware follows
          block[i] = load(at);
        }
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          __builtin_memcpy(to + (k + i) * tile + row, &block[i], 4 * smaller(kLanes, tile - row));
        }
      }
    }
    for (int64_t i = 0; i < tile; ++i) {
      for (int64_t rest = k; rest < depth; ++rest) to[rest * tile + i] = i < used ? from[i * stride + rest] : 0.f;
    }
  }
  template <int64_t tile>
  static void pack_cols(const float* from, int64_t stride, int64_t used, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; ++k, from += stride, to += tile) {
      if (used == tile) {
        for (int64_t i = 0; i < tile; ++i) to[i] = from[i];
      } else {
        for (int64_t i = 0; i < tile; ++i) to[i] = i < used ? from[i] : 0.f;
      }
    }
  }
  static void pack_a_rows(const float* from, int64_t stride, int64_t used, int64_t depth, float* to) {
    pack_rows<kRows>(from, stride, used, depth, to);
  }
  static void pack_b_rows(const float* from, int64_t stride, int64_t used, int64_t depth, float* to) {
    pack_rows<kCols>(from, stride, used, depth, to);
  }
  static void pack_a_cols(const float* from, int64_t stride, int64_t used, int64_t depth, float* to) {
    pack_cols<kRows>(from, stride, used, depth, to);
  }
  static void pack_b_cols(const float* from, int64_t stride, int64_t used, int64_t depth, float* to) {
    pack_cols<kCols>(from, stride, used, depth, to);
  }

  // c (kRows, kCols) = or += a b
  static void multiply(const Extent& used, const float* a, const float* b, float* c, int64_t stride, bool accumulate,
                       Ahead* ahead) {
    if (vectors_ > 1 && used.cols <= kLanes) {
      multiply<1>(used.depth, a, b, c, stride, accumulate, ahead);
    } else if (vectors_ > 2 && used.cols <= 2 * kLanes) {
      multiply<2>(used.depth, a, b, c, stride, accumulate, ahead);
    } else {
      multiply<vectors_>(used.depth, a, b, c, stride, accumulate, ahead);
    }
  }

  // the first `count` vectors of each row
  template <int64_t count>
  static void multiply(int64_t depth, const float* a, const float* b, float* c, int64_t stride, bool accumulate,
                       Ahead* ahead) {
    Vector total[rows_][count];
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows_; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) total[i][j] = Vector{};
    }
    for (int64_t k = 0; k < depth; ++k, a += kRows, b += kCols) {
      if (k % kFetchDepth == 0) ahead->fetch();
      Vector right[count];
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 16
      for (int64_t i = 0; i < rows_; ++i) {
        const Vector left = broadcast(a[i]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < count; ++j) total[i][j] += left * right[j];
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows_; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) {
        float* to = c + i * stride + j * kLanes;
        store(to, accumulate ? load(to) + total[i][j] : total[i][j]);
      }
    }
  }
};

}  // namespace ffkernels::cpu::FFK_NAMESPACE
