// Element types of matrix operations, shared by mma, wmma and wgmma.
#pragma once

#include "machine.h"
#include "numeric.h"

namespace ptx {

enum ElementType { kElF16, kElBf16, kElTf32, kElE4m3, kElE5m2, kElS8, kElU8, kElS4, kElU4, kElF64, kElF32, kElS32 };

inline int element_bits(int type) {
  static const int sizes[] = {16, 16, 32, 8, 8, 8, 8, 4, 4, 64, 32, 32};
  return sizes[type];
}
inline bool is_integer(int type) { return type >= kElS8 && type <= kElU4; }

// The value of an element from its bits. All products of two such values are exact in float or fit a 32-bit integer.
float element_value(uint32_t v, int type);

// A warp operation that all lanes execute together (.sync.aligned): false while lanes are on their way.
inline bool full_warp(Warp& w, Mask m) { return gather_lanes(w, m, kAll); }

// d += a * b, a (m, k) row-major, b (k, n) row-major, d (m, n) row-major
inline void multiply_add(float* d, const float* a, const float* b, int m, int n, int k) {
  for (int i = 0; i < m; i++) {
    float* row = d + i * n;
    for (int l = 0; l < k; l++) {
      float x = a[i * k + l];
      const float* y = b + l * n;
      for (int j = 0; j < n; j++) row[j] = __builtin_fmaf(x, y[j], row[j]);
    }
  }
}

}  // namespace ptx
