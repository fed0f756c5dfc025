// Vectors of floats in the compiler's own notation: one source for every instruction set. Included once per instruction
// set, after its target is set, into that set's namespace (see kernels.inc).
#pragma once

// An instruction-set file defines FFK_NAMESPACE and FFK_LANES before this header.
namespace ffkernels::cpu::FFK_NAMESPACE {

constexpr int64_t kLanes = FFK_LANES;
using Vector = float __attribute__((vector_size(4 * FFK_LANES)));
using Mask = int32_t __attribute__((vector_size(4 * FFK_LANES)));

inline Vector load(const float* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vector broadcast(float s) { return s - Vector{}; }

inline float sum(Vector v) {  // in a fixed order
  float total = 0.f;
  for (int64_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

template <typename T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
// Lanes 0, 1, ... of two vectors in turn, from their lower or their upper halves.
template <int64_t... i>
inline Vector interleave(Vector a, Vector b, int64_t upper, std::integer_sequence<int64_t, i...>) {
  constexpr int64_t half = kLanes / 2;
  return upper ? __builtin_shufflevector(a, b, (half + i / 2 + i % 2 * kLanes)...)
               : __builtin_shufflevector(a, b, (i / 2 + i % 2 * kLanes)...);
}

// A square block in place: interleaving the first half of its rows with the second half, log2 times, transposes it.
inline void transpose(Vector rows[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int64_t, kLanes>();
#pragma GCC unroll 4
  for (int64_t step = 1; step < kLanes; step *= 2) {
    Vector next[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + kLanes / 2], 0, lanes);
      next[2 * i + 1] = interleave(rows[i], rows[i + kLanes / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Memory that will be read soon, fetched into the L2 cache a few lines at a time while a core multiplies.
struct Ahead {
  const char* next;
  int64_t lines;  // at a time

  Ahead(const void* begin, int64_t bytes, int64_t times)
      : next(static_cast<const char*>(begin)), lines(times > 0 ? (bytes + 64 * times - 1) / (64 * times) : 0) {}
  void fetch() {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};
constexpr int64_t kFetchDepth = 32;  // a core fetches once in so much depth

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ffkernels::cpu::FFK_NAMESPACE
