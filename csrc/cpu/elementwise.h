// What happens to each value beside the GEMMs: conversions, activations, optimizers, in vectors. Included by
// each instruction set.
#pragma once

#include "cpu/simd.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

// -- bf16

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float get(float v) { return v; }
inline float get(uint16_t v) { return from_bf16(v); }
inline void set(float* to, float v) { *to = v; }
inline void set(uint16_t* to, float v) { *to = to_bf16(v); }

inline Vector load(const uint16_t* p) {
  Vector v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = from_bf16(p[i]);
  return v;
}
inline void store(uint16_t* p, Vector v) {
  for (int64_t i = 0; i < kLanes; ++i) p[i] = to_bf16(v[i]);
}

// The first `used` values from p, and zeros.
template <typename T>
inline Vector load_part(const T* p, int64_t used) {
  float values[kLanes] = {};
  for (int64_t i = 0; i < used; ++i) values[i] = get(p[i]);
  return load(values);
}
template <typename T>
inline void store_part(T* p, Vector v, int64_t used) {
  for (int64_t i = 0; i < used; ++i) set(p + i, v[i]);
}
#if FFK_LANES == 16
inline __mmask16 first_lanes(int64_t used) { return static_cast<__mmask16>((1u << used) - 1); }
inline Vector load_part(const float* p, int64_t used) { return (Vector)_mm512_maskz_loadu_ps(first_lanes(used), p); }
inline void store_part(float* p, Vector v, int64_t used) { _mm512_mask_storeu_ps(p, first_lanes(used), (__m512)v); }
inline Vector part_of(Vector v, int64_t used) { return (Vector)_mm512_maskz_mov_ps(first_lanes(used), (__m512)v); }
#else
inline Vector part_of(Vector v, int64_t used) {
  float values[kLanes] = {};
  store_part(values, v, used);
  return load(values);
}
#endif

// a / (sqrt(x) * scale + eps), Adam's step
inline Vector over_root(Vector a, Vector x, float scale, float eps) {
#if FFK_LANES == 16
  // Estimates and one step of Newton's for each: within 3 units in the last place, at a third of the instructions'
  // cost.
  const __m512 v = (__m512)x, estimate = _mm512_maskz_rsqrt14_ps(_mm512_cmp_ps_mask(v, __m512{}, _CMP_NEQ_UQ), v);
  const __m512 rough = _mm512_mul_ps(v, estimate), rest = _mm512_fnmadd_ps(rough, estimate, _mm512_set1_ps(1.f));
  const __m512 root = _mm512_fmadd_ps(_mm512_mul_ps(rough, _mm512_set1_ps(0.5f)), rest, rough);
  const __m512 divisor = _mm512_fmadd_ps(root, _mm512_set1_ps(scale), _mm512_set1_ps(eps));
  const __m512 inverse = _mm512_rcp14_ps(divisor), near = _mm512_mul_ps((__m512)a, inverse);
  const __m512 quotient = _mm512_fmadd_ps(_mm512_fnmadd_ps(near, divisor, (__m512)a), inverse, near);
  // Infinities, NaN and divisions by zero end as NaN here; the instructions know better.
  const __mmask16 odd = _mm512_cmp_ps_mask(quotient, quotient, _CMP_UNORD_Q);
  if (__builtin_expect(odd == 0, 1)) return (Vector)quotient;
  const __m512 exact = _mm512_fmadd_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(scale), _mm512_set1_ps(eps));
  return (Vector)_mm512_mask_div_ps(quotient, odd, (__m512)a, exact);
#elif FFK_LANES == 8
  return a / ((Vector)_mm256_sqrt_ps((__m256)x) * scale + eps);
#else
  for (int64_t i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return a / (x * scale + eps);
#endif
}

// -- activations: NaN stays NaN

inline Vector select(Mask condition, Vector yes, Vector no) { return condition ? yes : no; }

// Cephes' expf: relative error below 2e-7; 0 below -87.3, infinite above 88.7.
inline Vector exponential(Vector x) {
  const Mask tiny = x < -87.3365447504019f, huge = x > 88.7228317260742f;
  const Vector shift = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector inside = select(tiny | huge, Vector{}, x);
  const Vector n = (inside * 1.44269504088896341f + shift) - shift;
  const Vector f = inside - n * 0.693359375f - n * -2.12194440e-4f;
  Vector y = broadcast(1.9875691500e-4f);
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.f;
  // 2^n in two factors: n reaches 128
  const Mask whole = __builtin_convertvector(n, Mask), half = whole >> 1;
  const Mask bits[2] = {(half + 127) << 23, (whole - half + 127) << 23};
  Vector scale[2];
  __builtin_memcpy(scale, bits, sizeof scale);
  return select(tiny, Vector{}, select(huge, broadcast(__builtin_inff()), y * scale[0] * scale[1]));
}

inline Vector magnitude(Vector x) { return select(x < 0.f, -x, x); }

// value gives y = act(z), and in `slope` act'(z) where a pointer is given.
struct ReluAct {
  static Vector value(Vector z, Vector* slope) {
    const Mask off = z <= 0.f;
    if (slope) *slope = select(off, Vector{}, broadcast(1.f));
    return select(off, Vector{}, z);
  }
};

struct LeakyReluAct {
  static Vector value(Vector z, Vector* slope) {
    const Mask on = z > 0.f;
    if (slope) *slope = select(on, broadcast(1.f), broadcast(0.01f));
    return select(on, z, 0.01f * z);
  }
};

struct GeluAct {
  static Vector value(Vector z, Vector* slope) {
    // erf by Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7
    const Vector x = magnitude(z) * 0.70710678f, t = 1.f / (1.f + 0.3275911f * x), bell = exponential(-x * x);
    const Vector tail =
        ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t * bell;
    const Vector cdf = select(z < 0.f, 0.5f * tail, 1.f - 0.5f * tail);
    if (slope) *slope = cdf + z * bell * 0.39894228f;
    return z * cdf;
  }
};

struct SiluAct {
  static Vector value(Vector z, Vector* slope) {
    const Vector sigmoid = 1.f / (1.f + exponential(-z));
    if (slope) *slope = sigmoid * (1.f + z * (1.f - sigmoid));
    return z * sigmoid;
  }
};

struct TanhAct {
  static Vector value(Vector z, Vector* slope) {
    const Vector x = magnitude(z), square = z * z;
    // Cephes' tanhf near 0, where the other form cancels
    Vector series = broadcast(-5.70498872745e-3f);
    series = series * square + 2.06390887954e-2f;
    series = series * square - 5.37397155531e-2f;
    series = series * square + 1.33314422036e-1f;
    series = series * square - 3.33332819422e-1f;
    series = series * square * z + z;
    const Vector far = 1.f - 2.f / (exponential(2.f * x) + 1.f);
    const Vector y = select(x < 0.625f, series, select(z < 0.f, -far, far));
    if (slope) *slope = 1.f - y * y;
    return y;
  }
};

// -- optimizers: torch.optim's formulas on a run of n elements; the run `ahead` elements on is fetched meanwhile

template <Optimizer kind, typename T>
inline void optimize(const OptimizerStep& o, const float* gradient, T* weight, float* slot0, float* slot1, int64_t n,
                     int64_t ahead) {
  const auto element = [&o](auto g, auto w, auto* s0, auto* s1) {
    if constexpr (kind == Optimizer::sgd) {
      if (o.weight_decay != 0.f) g = g + o.weight_decay * w;
      if (s0) {
        *s0 = o.first ? g : o.momentum * *s0 + (1.f - o.dampening) * g;
        g = o.nesterov ? g + o.momentum * *s0 : *s0;
      }
      return w - o.lr * g;
    } else if constexpr (kind == Optimizer::hinton_sgd) {
      *s0 = o.momentum * *s0 + o.rest1 * g;
      return w - o.lr * (*s0 + o.weight_decay * w);
    } else {
      if constexpr (kind == Optimizer::adamw) {
        w = w * (1.f - o.lr * o.weight_decay);
      } else if (o.weight_decay != 0.f) {
        g = g + o.weight_decay * w;
      }
      *s0 = o.beta1 * *s0 + o.rest1 * g;
      *s1 = o.beta2 * *s1 + o.rest2 * g * g;
      return w - over_root(o.step_size * *s0, *s1, o.inverse_root_correction2, o.eps);
    }
  };
  // Known to the compiler where the optimizer says it: SGD has a slot with momentum, the others as many as they have.
  const bool first = kind == Optimizer::sgd ? slot0 != nullptr : true;
  constexpr bool second = kind == Optimizer::adam || kind == Optimizer::adamw;
  const auto step = [&](auto load_from, auto store_to, int64_t i) {
    Vector s0{}, s1{};
    if (first) s0 = load_from(slot0 + i);
    if (second) s1 = load_from(slot1 + i);
    store_to(weight + i, element(load_from(gradient + i), load_from(weight + i), first ? &s0 : nullptr, &s1));
    if (first) store_to(slot0 + i, s0);
    if (second) store_to(slot1 + i, s1);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(weight + ahead + i, 1, 3);
    if (first) __builtin_prefetch(slot0 + ahead + i, 1, 3);
    if (second) __builtin_prefetch(slot1 + ahead + i, 1, 3);
    step([](const auto* p) { return load(p); }, [](auto* p, Vector v) { store(p, v); }, i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    step([rest](const auto* p) { return load_part(p, rest); }, [rest](auto* p, Vector v) { store_part(p, v, rest); },
         i);
  }
}

// Calls function(kind) with the kind as a constant.
template <typename F>
void with_optimizer(Optimizer kind, F&& function) {
  switch (kind) {
    case Optimizer::sgd:
      return function(std::integral_constant<Optimizer, Optimizer::sgd>{});
    case Optimizer::adam:
      return function(std::integral_constant<Optimizer, Optimizer::adam>{});
    case Optimizer::adamw:
      return function(std::integral_constant<Optimizer, Optimizer::adamw>{});
    case Optimizer::hinton_sgd:
      return function(std::integral_constant<Optimizer, Optimizer::hinton_sgd>{});
  }
}

}  // namespace ffkernels::cpu::FFK_NAMESPACE
