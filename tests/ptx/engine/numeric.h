// Number formats of PTX: conversions with every rounding mode, canonical NaNs, single-rounding fma for narrow formats.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptx {

template <class To, class From>
inline To bits(From f) {
  static_assert(sizeof(To) == sizeof(From));
  To t;
  std::memcpy(&t, &f, sizeof t);
  return t;
}

enum Round : int { kNearestEven, kToZero, kDown, kUp, kNearestAway };

// PTX's canonical NaN
inline float canonical(float x) { return x == x ? x : bits<float>(0x7fffffffu); }
inline double canonical(double x) { return x; }
inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return x; }
template <class T>
inline T saturate(T x) {
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);  // NaN gives +0
}

// A binary format with `e` exponent bits and `m` mantissa bits. `infinities` is false for e4m3, where the top exponent
// holds numbers and the all-ones pattern is NaN.
struct Format {
  int e, m;
  bool infinities;
};
constexpr Format kF16{5, 10, true}, kBf16{8, 7, true}, kTf32{8, 10, true}, kE4m3{4, 3, false}, kE5m2{5, 2, true};

inline double decode(uint32_t v, Format f) {
  int bias = (1 << (f.e - 1)) - 1;
  uint32_t mant = v & ((1u << f.m) - 1), exp = (v >> f.m) & ((1u << f.e) - 1);
  double sign = (v >> (f.e + f.m)) & 1 ? -1.0 : 1.0;
  uint32_t top = (1u << f.e) - 1;
  if (f.infinities && exp == top) return mant ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (!f.infinities && exp == top && mant == (1u << f.m) - 1) return std::nan("");
  if (exp == 0) return sign * std::ldexp(double(mant), 1 - bias - f.m);
  return sign * std::ldexp(double(mant | (1u << f.m)), int(exp) - bias - f.m);
}

// Rounds x to the format. NaN becomes the format's canonical NaN (all ones without the sign). With `finite`, overflow
// gives the largest finite value.
inline uint32_t encode(double x, Format f, int round, bool finite = false) {
  int bias = (1 << (f.e - 1)) - 1;
  uint32_t nan = (1u << (f.e + f.m)) - 1;
  uint32_t sign = std::signbit(x) ? 1u << (f.e + f.m) : 0;
  uint32_t max_finite = f.infinities ? (((1u << f.e) - 2) << f.m) | ((1u << f.m) - 1) : nan - 1;
  uint32_t inf = f.infinities ? ((1u << f.e) - 1) << f.m : nan;
  if (x != x) return nan;
  double a = std::fabs(x);
  if (a == 0) return sign;
  if (std::isinf(a)) return sign | (finite ? max_finite : inf);
  int exp;
  std::frexp(a, &exp);  // a = f * 2^exp, f in [0.5, 1)
  int e = exp - 1;
  if (e < 1 - bias) e = 1 - bias;
  double scaled = std::ldexp(a, f.m - e);  // exact: in units of the last place
  double low = std::floor(scaled), rest = scaled - low;
  bool up = false;
  switch (round) {
    case kNearestEven:
      up = rest > 0.5 || (rest == 0.5 && std::fmod(low, 2.0) == 1.0);
      break;
    case kNearestAway:
      up = rest >= 0.5;
      break;
    case kToZero:
      break;
    case kDown:
      up = sign && rest > 0;
      break;
    case kUp:
      up = !sign && rest > 0;
      break;
  }
  uint64_t q = uint64_t(low) + up;
  uint64_t v;
  if (q >> (f.m + 1)) {  // carried into the next binade
    q >>= 1;
    e++;
  }
  v = q >> f.m ? (uint64_t(e + bias) << f.m) | (q & ((1u << f.m) - 1)) : q;
  if (v > max_finite) {
    bool to_max = finite || round == kToZero || (round == kDown && !sign) || (round == kUp && sign);
    v = to_max ? max_finite : inf;
  }
  return sign | uint32_t(v);
}

inline float f16_to_float(uint16_t h) { return float(bits<_Float16>(h)); }
inline uint16_t float_to_f16(float x) { return x == x ? bits<uint16_t>(_Float16(x)) : 0x7fff; }
inline float bf16_to_float(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
inline uint16_t float_to_bf16(float x) {
  uint32_t u = bits<uint32_t>(x);
  uint16_t rounded = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  return x == x ? rounded : 0x7fff;
}
// tensor cores read the upper 19 bits
inline float as_tf32(uint32_t u) { return bits<float>(u & 0xffffe000u); }

// p + c rounded to odd: rounding the result once more, to a format of at most 50 bits, gives the correctly rounded sum.
inline double add_to_odd(double p, double c) {
  double s = p + c;
  if (!std::isfinite(s)) return s;
  double bb = s - p, err = (p - (s - bb)) + (c - bb);
  if (err != 0 && !(bits<uint64_t>(s) & 1)) s = std::nextafter(s, err > 0 ? INFINITY : -INFINITY);
  return s;
}

// Storage types of 16-bit floats, for templates over formats.
struct Half {
  static float load(uint16_t h) { return f16_to_float(h); }
  static uint16_t store(float x) { return float_to_f16(x); }
  static uint16_t store_exact(double x) { return uint16_t(encode(x, kF16, kNearestEven)); }
};
struct Brain {
  static float load(uint16_t h) { return bf16_to_float(h); }
  static uint16_t store(float x) { return float_to_bf16(x); }
  static uint16_t store_exact(double x) { return uint16_t(encode(x, kBf16, kNearestEven)); }
};

// Sets the rounding mode while it lives.
class Rounding {
 public:
  explicit Rounding(int mode) : mode_(mode) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    if (mode_) std::fesetround(modes[mode_]);
  }
  ~Rounding() {
    if (mode_) std::fesetround(FE_TONEAREST);
  }

 private:
  int mode_;
};

}  // namespace ptx
