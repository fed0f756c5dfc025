// Vectors of floats in the compiler's own notation: one source for every instruction set. Included once per instruction
// set, after its target is set, into that set's namespace (see avx2.cpp).
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

// The same in log2 steps, for sums that are many.
template <int64_t half, int64_t... i>
inline float fold(Vector v, std::integer_sequence<int64_t, i...> lanes) {
  v += __builtin_shufflevector(v, v, (i ^ half)...);
  if constexpr (half == 1) {
    return v[0];
  } else {
    return fold<half / 2>(v, lanes);
  }
}
inline float folded(Vector v) { return fold<kLanes / 2>(v, std::make_integer_sequence<int64_t, kLanes>()); }

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

// Of a product of two panels: what of the depth, the rows and the columns is there. The rest may be left out.
struct Extent {
  int64_t depth, rows, cols;  // any number from 1 on: more than a panel has means all of it
};

// Memory that will be read soon, fetched into the L2 cache a few lines at a time while a core multiplies.
class Ahead {
 public:
  // In all, fetch() will be called `times` times.
  explicit Ahead(int64_t times) : times_(times) {}

  // `rows` pieces of `bytes`, `stride` bytes apart
  void add(const void* begin, int64_t bytes, int64_t rows = 1, int64_t stride = 0) {
    if (bytes <= 0 || rows <= 0) return;
    pieces_[count_++] = {static_cast<const char*>(begin), bytes, rows, stride};
    total_ += (bytes + 63) / 64 * rows;
    lines_ = (total_ + times_ - 1) / times_;
  }

  void fetch() {
    for (int64_t i = 0; i < lines_; ++i) {
      if (at_ >= end_ && !next_piece()) return;
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
    }
  }

 private:
  struct Piece {
    const char* begin;
    int64_t bytes, rows, stride;
  };

  bool next_piece() {
    if (piece_ == count_) {
      lines_ = 0;
      return false;
    }
    const Piece& piece = pieces_[piece_];
    at_ = piece.begin + row_ * piece.stride;
    end_ = at_ + piece.bytes;
    if (++row_ == piece.rows) {
      row_ = 0;
      ++piece_;
    }
    return true;
  }

  int64_t times_, total_ = 0, lines_ = 0;
  Piece pieces_[4];
  int64_t count_ = 0, piece_ = 0, row_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};
constexpr int64_t kFetchDepth = 32;  // a core fetches once in so much depth

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ffkernels::cpu::FFK_NAMESPACE
