// AMX's tile instructions in software, for machines without them and for sanitizers: included in front of each source
// (tests/edited.py). A product gives what the instruction's description says (Intel's manual, TDPBF16PS): values at
// even and at odd depth are summed apart, by fused multiply-adds in float32, and denormals count as zero.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ffkernels::emulated {

struct Tiles {
  bool configured = false;
  alignas(64) float values[8][16][16] = {};
};
inline thread_local Tiles tiles;

// Where the processor would raise a signal.
inline void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline float (*tile(int index))[16] {
  require(tiles.configured, "a tile is used without a configuration");
  return tiles.values[index];
}

inline void load_config(const void* config) {
  unsigned char expected[64] = {1};  // palette 1; 16 rows of 64 bytes in each of the eight tiles
  for (int i = 0; i < 8; ++i) expected[16 + 2 * i] = 64, expected[48 + i] = 16;
  require(std::memcmp(config, expected, 64) == 0, "not a configuration of eight full tiles");
  tiles = Tiles{};  // as the instruction does
  tiles.configured = true;
}

inline void release() {
  require(tiles.configured, "released without a configuration");
  tiles.configured = false;
}

inline void zero(int index) { std::memset(tile(index), 0, 1024); }

inline void load(int index, const void* from, int64_t stride) {
  auto* rows = tile(index);
  for (int i = 0; i < 16; ++i) std::memcpy(rows[i], static_cast<const char*>(from) + i * stride, 64);
}

inline void store(int index, void* to, int64_t stride) {
  auto* rows = tile(index);
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, rows[i], 64);
}

#pragma GCC push_options
#pragma GCC target("avx512f")
inline __m512 flushed(__m512 x) {  // denormals to zero, with the sign
  const auto bits = _mm512_castps_si512(x);
  const auto small = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, small, bits, _mm512_set1_epi32(static_cast<int>(0x80000000))));
}

inline __m512 broadcast(uint32_t bits) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits))); }

inline void dot(int c, int a, int b) {
  auto* total = tile(c);
  auto* left = tile(a);
  auto* right = tile(b);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int m = 0; m < 16; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < 16; ++k) {
      uint32_t pair;  // of bf16, each the upper half of a float
      std::memcpy(&pair, &left[m][k], 4);
      const __m512i pairs = _mm512_loadu_si512(right[k]);
      const __m512 even_columns = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 odd_columns = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
      even = flushed(_mm512_fmadd_ps(flushed(broadcast(pair << 16)), flushed(even_columns), even));
      odd = flushed(_mm512_fmadd_ps(flushed(broadcast(pair & 0xffff0000)), flushed(odd_columns), odd));
    }
    const __m512 sum = flushed(_mm512_add_ps(even, odd));
    _mm512_storeu_ps(total[m], flushed(_mm512_add_ps(flushed(_mm512_loadu_ps(total[m])), sum)));
  }
}
#pragma GCC pop_options

}  // namespace ffkernels::emulated

// The intrinsics are macros, which take the tile's number as it stands.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ffkernels::emulated::load_config(config)
#define _tile_release() ffkernels::emulated::release()
#define _tile_zero(index) ffkernels::emulated::zero(index)
#define _tile_loadd(index, from, stride) ffkernels::emulated::load(index, from, stride)
#define _tile_stored(index, to, stride) ffkernels::emulated::store(index, to, stride)
#define _tile_dpbf16ps(c, a, b) ffkernels::emulated::dot(c, a, b)
#endif
