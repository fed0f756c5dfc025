// Dropout by Philox4x32-10, as ffkernels/dropout.py defines it. Included once per instruction set.
#pragma once

#include "cpu/simd.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

// A row of inputs in place: columns 4 j to 4 j + 3 by the four words of the generator at (j, row, layer, 0).
inline void drop_row(const Dropout& dropout, int64_t row, float* x, int64_t depth) {
  constexpr int64_t groups = 16;  // at once, so that the compiler has vectors to make
  for (int64_t first = 0; first < depth; first += 4 * groups) {
    uint32_t c0[groups], c1[groups], c2[groups], c3[groups], words[4 * groups];
    for (int64_t i = 0; i < groups; ++i) {
      c0[i] = static_cast<uint32_t>(first / 4 + i);
      c1[i] = static_cast<uint32_t>(row);
      c2[i] = dropout.layer;
      c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int64_t round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int64_t i = 0; i < groups; ++i) {
        const uint64_t a = uint64_t{0xD2511F53u} * c0[i], b = uint64_t{0xCD9E8D57u} * c2[i];
        c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(b);
        c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(a);
      }
    }
    for (int64_t i = 0; i < groups; ++i) {
      words[4 * i] = c0[i];
      words[4 * i + 1] = c1[i];
      words[4 * i + 2] = c2[i];
      words[4 * i + 3] = c3[i];
    }
    const int64_t count = smaller(4 * groups, depth - first);
    for (int64_t k = 0; k < count; ++k) x[first + k] = words[k] >= dropout.below ? x[first + k] * dropout.scale : 0.f;
  }
}

}  // namespace ffkernels::cpu::FFK_NAMESPACE
