// Floating-point arithmetic: f32, f64, f32x2, f16, bf16 and their pairs.
#include <algorithm>

#include "machine.h"
#include "numeric.h"

namespace ptx {
namespace {

// The element types of these handlers: how a register's bits become a number and back.
struct F32 {
  using Bits = float;
  using Num = float;
  static Num load(Bits b) { return b; }
  static Bits store(Num x) { return canonical(x); }
  static Num fma(Num a, Num b, Num c) { return std::fma(a, b, c); }
};
struct F64 {
  using Bits = double;
  using Num = double;
  static Num load(Bits b) { return b; }
  static Bits store(Num x) { return x; }
  static Num fma(Num a, Num b, Num c) { return std::fma(a, b, c); }
};
// 16-bit formats compute in float: its 24 bits are at least twice theirs plus 2, so +, -, * rounded twice are rounded
// once.
template <class Format16>
struct Narrow {
  using Bits = uint16_t;
  using Num = float;
  static Num load(Bits b) { return Format16::load(b); }
  static Bits store(Num x) { return Format16::store(x); }
};
using F16 = Narrow<Half>;
using Bf16 = Narrow<Brain>;

float flush16(float x) { return std::fabs(x) < 6.103515625e-05f ? std::copysign(0.0f, x) : x; }
template <class T>
typename T::Num flush_to(typename T::Num x) {
  return std::is_same<T, F16>::value ? flush16(float(x)) : flush(x);  // bf16 has the exponents of f32
}

// Applies f per lane under the instruction's rounding mode, .ftz and .sat.
template <class T, class F, class... S>
void apply(Warp& w, const Insn& in, Mask m, F f, S... s) {
  using Bits = typename T::Bits;
  Bits* d = dst<Bits>(w, in, 0);
  uint64_t flags = in.flags;
  if (flags == 0) {
    map_lanes(m, d, [f](auto... x) { return T::store(f(T::load(x)...)); }, s...);
    return;
  }
  Rounding rounding(int(flags & kRoundMask));
  if (std::is_same<T, F16>::value || std::is_same<T, Bf16>::value) {
    map_lanes(
        m, d,
        [=](auto... x) {
          float r = flags & kFtz ? flush_to<T>(f(flush_to<T>(T::load(x))...)) : f(T::load(x)...);
          if (flags & kSat) r = saturate(r);
          if (flags & kRelu) r = r != r ? r : std::max(r, 0.0f);
          return T::store(r);
        },
        s...);
  } else if (flags & kFtz) {
    map_lanes(
        m, d,
        [=](auto... x) {
          auto r = flush(f(flush(T::load(x))...));
          return T::store(flags & kSat ? saturate(r) : r);
        },
        s...);
  } else {
    map_lanes(
        m, d,
        [=](auto... x) {
          auto r = f(T::load(x)...);
          return T::store(flags & kSat ? saturate(r) : r);
        },
        s...);
  }
}
template <class T>
const typename T::Bits* arg(Warp& w, const Insn& in, int i) {
  return src<typename T::Bits>(w, in, i);
}

struct Add {
  template <class N>
  N operator()(N a, N b) const {
    return a + b;
  }
};
struct Sub {
  template <class N>
  N operator()(N a, N b) const {
    return a - b;
  }
};
struct Mul {
  template <class N>
  N operator()(N a, N b) const {
    return a * b;
  }
};
struct Div {
  template <class N>
  N operator()(N a, N b) const {
    return a / b;
  }
};
struct Neg {
  template <class N>
  N operator()(N a) const {
    return -a;
  }
};
struct Abs {
  template <class N>
  N operator()(N a) const {
    return std::fabs(a);
  }
};
struct Rcp {
  template <class N>
  N operator()(N a) const {
    return N(1) / a;
  }
};
struct Sqrt {
  template <class N>
  N operator()(N a) const {
    return std::sqrt(a);
  }
};
struct Rsqrt {
  template <class N>
  N operator()(N a) const {
    return N(1.0 / std::sqrt(double(a)));
  }
};
struct Sin {
  float operator()(float a) const { return float(std::sin(double(a))); }
};
struct Cos {
  float operator()(float a) const { return float(std::cos(double(a))); }
};
struct Lg2 {
  float operator()(float a) const { return std::log2(a); }
};
struct Ex2 {
  float operator()(float a) const { return std::exp2(a); }
};
struct Tanh {
  float operator()(float a) const { return std::tanh(a); }
};
// .approx division gives 0 for a divisor in (2^126, 2^128), NaN if the dividend is infinite
struct DivApprox {
  float operator()(float a, float b) const {
    float mag = std::fabs(b);
    if (mag > 8.507059173023462e37f && mag <= std::numeric_limits<float>::max())
      return std::isinf(a) ? NAN : std::copysign(0.0f, a * std::copysign(1.0f, b));
    return a / b;
  }
};

template <class N>
N minmax(N a, N b, bool is_max, uint64_t flags) {
  N r;
  if (a != a || b != b) {
    if (flags & kNan) return std::numeric_limits<N>::quiet_NaN();
    r = a != a ? b : a;
  } else if (a == b) {
    r = std::signbit(a) == is_max ? b : a;  // -0 < +0
  } else {
    r = (a > b) == is_max ? a : b;
  }
  return r;
}
template <class T>
void min_max(Warp& w, const Insn& in, Mask m) {
  using N = typename T::Num;
  bool is_max = in.imm[0];
  uint64_t flags = in.flags;
  auto f = [=](typename T::Bits x, typename T::Bits y) {
    N a = T::load(x), b = T::load(y);
    if (flags & kFtz) a = flush_to<T>(a), b = flush_to<T>(b);
    bool negative = std::signbit(a) != std::signbit(b);
    if (flags & kXorSign) a = std::fabs(a), b = std::fabs(b);
    N r = minmax(a, b, is_max, flags);
    if (flags & kXorSign) r = std::copysign(r, N(negative ? -1 : 1));
    return T::store(r);
  };
  map_lanes(m, dst<typename T::Bits>(w, in, 0), f, arg<T>(w, in, 0), arg<T>(w, in, 1));
}

// neg and abs of 16-bit formats only touch the sign, NaN included
uint16_t flip_sign(uint16_t a) { return a ^ 0x8000; }
uint16_t clear_sign(uint16_t a) { return a & 0x7fff; }

template <class T, class F>
void unary(Warp& w, const Insn& in, Mask m, F f) {
  apply<T>(w, in, m, f, arg<T>(w, in, 0));
}
template <class T, class F>
void binary(Warp& w, const Insn& in, Mask m, F f) {
  apply<T>(w, in, m, f, arg<T>(w, in, 0), arg<T>(w, in, 1));
}
template <class T, class F>
void ternary(Warp& w, const Insn& in, Mask m, F f) {
  apply<T>(w, in, m, f, arg<T>(w, in, 0), arg<T>(w, in, 1), arg<T>(w, in, 2));
}
template <class T>
void fma_op(Warp& w, const Insn& in, Mask m) {
  ternary<T>(w, in, m, [](typename T::Num a, typename T::Num b, typename T::Num c) { return T::fma(a, b, c); });
}
template <class Format16>
uint16_t fma16(uint16_t a, uint16_t b, uint16_t c, uint64_t flags) {
  auto in = [&](uint16_t x) { return flags & kFtz ? flush16(Format16::load(x)) : Format16::load(x); };
  double r = add_to_odd(double(in(a)) * double(in(b)), double(in(c)));
  if (flags & kSat) r = saturate(r);
  if (flags & kRelu && r < 0) r = 0;
  uint16_t h = Format16::store_exact(r);
  return flags & kFtz && !(h & 0x7c00) ? h & 0x8000 : h;
}
template <class Format16>
void fma_narrow(Warp& w, const Insn& in, Mask m) {
  uint64_t flags = in.flags;
  map3<uint16_t, uint16_t, uint16_t, uint16_t>(
      w, in, m, [=](uint16_t a, uint16_t b, uint16_t c) { return fma16<Format16>(a, b, c, flags); });
}

// Packed pairs of 16-bit formats run the scalar handler on each half.
template <int N>
void halves(Warp& w, const Insn& in, Mask m, Handler scalar) {
  alignas(64) uint16_t parts[N + 1][kLanes];
  Insn half = in;
  Operand ops[N + 1];
  // scratch registers beyond the file would need room in every warp, so operands point into `parts` instead
  half.ops = ops;
  half.ndst = 1;
  half.nsrc = N;
  const uint32_t* s[N];
  for (int k = 0; k < N; k++) s[k] = src<uint32_t>(w, in, k);
  uint32_t* d = dst<uint32_t>(w, in, 0);
  uint32_t result[kLanes] = {};
  char* regs = w.regs;
  w.regs = reinterpret_cast<char*>(parts);
  for (int k = 0; k <= N; k++) ops[k] = {uint32_t(k * sizeof parts[0]), 0};
  for (int side = 0; side < 2; side++) {
    for (int k = 0; k < N; k++)
      for (int i = 0; i < kLanes; i++) parts[k + 1][i] = uint16_t(s[k][i] >> (16 * side));
    scalar(w, half, m);
    for (int i = 0; i < kLanes; i++) result[i] |= uint32_t(parts[0][i]) << (16 * side);
  }
  w.regs = regs;
  each_lane(m, [&](int i) { d[i] = result[i]; });
}

template <class F>
void pair32(Warp& w, const Insn& in, Mask m, F f) {
  Rounding rounding(int(in.flags & kRoundMask));
  bool ftz = in.flags & kFtz;
  const uint64_t* s[3] = {src<uint64_t>(w, in, 0), src<uint64_t>(w, in, 1), src<uint64_t>(w, in, in.nsrc - 1)};
  uint64_t* d = dst<uint64_t>(w, in, 0);
  each_lane(m, [&](int i) {
    uint64_t r = 0;
    for (int side = 0; side < 64; side += 32) {
      float x[3];
      for (int k = 0; k < 3; k++) {
        x[k] = bits<float>(uint32_t(s[k][i] >> side));
        if (ftz) x[k] = flush(x[k]);
      }
      float y = f(x[0], x[1], x[2]);
      r |= uint64_t(bits<uint32_t>(canonical(ftz ? flush(y) : y))) << side;
    }
    d[i] = r;
  });
}

template <class B, int kExp, int kMant>
void test_property(Warp& w, const Insn& in, Mask m) {
  const B* a = src<B>(w, in, 0);
  constexpr B top = (B(1) << kExp) - 1;
  Mask r = 0;
  each_lane(m, [&](int i) {
    B exp = a[i] >> kMant & top, mant = a[i] & ((B(1) << kMant) - 1);
    bool v = false;
    switch (in.imm[0]) {
      case 0:
        v = exp != top;
        break;  // finite
      case 1:
        v = exp == top && mant == 0;
        break;  // infinite
      case 2:
        v = !(exp == top && mant != 0);
        break;  // number
      case 3:
        v = exp == top && mant != 0;
        break;  // notanumber
      case 4:
        v = (exp != 0 && exp != top) || (exp == 0 && mant == 0);
        break;  // normal: zero counts as one
      case 5:
        v = exp == 0 && mant != 0;
        break;  // subnormal
    }
    r |= uint32_t(v) << i;
  });
  set_pred(w, in.ops[0], m, r);
}

#define H [](Warp& w, const Insn& in, Mask m)
#define UNARY(key, T, F)           \
  {key, H{unary<T>(w, in, m, F()); \
  }                                \
  }
#define BINARY(key, T, F)           \
  {key, H{binary<T>(w, in, m, F()); \
  }                                 \
  }
#define PAIR1(key, T, F)                                       \
  {key, H{halves<1>(w, in, m, H { unary<T>(w, in, m, F()); }); \
  }                                                            \
  }
#define PAIR2(key, T, F)                                        \
  {key, H{halves<2>(w, in, m, H { binary<T>(w, in, m, F()); }); \
  }                                                             \
  }
#define BASIC(t, T) \
  BINARY("add." t, T, Add), BINARY("sub." t, T, Sub), BINARY("mul." t, T, Mul), { "minmax." t, min_max<T> }

const Register float_handlers{BASIC("f32", F32), BASIC("f64", F64), BASIC("f16", F16), BASIC("bf16", Bf16),
                              PAIR2("add.f16x2", F16, Add), PAIR2("sub.f16x2", F16, Sub), PAIR2("mul.f16x2", F16, Mul),
                              PAIR2("add.bf16x2", Bf16, Add), PAIR2("sub.bf16x2", Bf16, Sub),
                              PAIR2("mul.bf16x2", Bf16, Mul), {"minmax.f16x2", H{halves<2>(w, in, m, min_max<F16>);
}  // namespace
}  // namespace ptx
, {"minmax.bf16x2", H{halves<2>(w, in, m, min_max<Bf16>);
}
}
, {"fma.f32", fma_op<F32>}, {"fma.f64", fma_op<F64>}, {"fma.f16", fma_narrow<Half>}, {"fma.bf16", fma_narrow<Brain>},
    {"fma.f16x2", H{halves<3>(w, in, m, fma_narrow<Half>);
}
}
, {"fma.bf16x2", H{halves<3>(w, in, m, fma_narrow<Brain>);
}
}
, BINARY("div.f32", F32, Div), BINARY("div.f64", F64, Div), BINARY("div.approx.f32", F32, DivApprox),
    UNARY("neg.f32", F32, Neg), UNARY("neg.f64", F64, Neg), UNARY("abs.f32", F32, Abs), UNARY("abs.f64", F64, Abs),
    {"neg.16", H{map1<uint16_t, uint16_t>(w, in, m, flip_sign);
}
}
, {"abs.16", H{map1<uint16_t, uint16_t>(w, in, m, clear_sign);
}
}
, {"neg.16x2", H{map1<uint32_t, uint32_t>(w, in, m, [](uint32_t a) { return a ^ 0x80008000u; });
}
}
, {"abs.16x2", H{map1<uint32_t, uint32_t>(w, in, m, [](uint32_t a) { return a & 0x7fff7fffu; });
}
}
, UNARY("rcp.f32", F32, Rcp), UNARY("rcp.f64", F64, Rcp), UNARY("sqrt.f32", F32, Sqrt), UNARY("sqrt.f64", F64, Sqrt),
    UNARY("rsqrt.f32", F32, Rsqrt), UNARY("rsqrt.f64", F64, Rsqrt), UNARY("sin.f32", F32, Sin),
    UNARY("cos.f32", F32, Cos), UNARY("lg2.f32", F32, Lg2), UNARY("ex2.f32", F32, Ex2), UNARY("tanh.f32", F32, Tanh),
    UNARY("ex2.f16", F16, Ex2), UNARY("ex2.bf16", Bf16, Ex2), UNARY("tanh.f16", F16, Tanh),
    UNARY("tanh.bf16", Bf16, Tanh), PAIR1("ex2.f16x2", F16, Ex2), PAIR1("ex2.bf16x2", Bf16, Ex2),
    PAIR1("tanh.f16x2", F16, Tanh), PAIR1("tanh.bf16x2", Bf16, Tanh),
    {"add.f32x2", H{pair32(w, in, m, [](float a, float b, float) { return a + b; });
}
}
, {"sub.f32x2", H{pair32(w, in, m, [](float a, float b, float) { return a - b; });
}
}
, {"mul.f32x2", H{pair32(w, in, m, [](float a, float b, float) { return a * b; });
}
}
, {"fma.f32x2", H{pair32(w, in, m, [](float a, float b, float c) { return std::fma(a, b, c); });
}
}
, {"copysign.f32", H{map2<float, float, float>(w, in, m, [](float a, float b) { return std::copysign(b, a); });
}
}
, {"copysign.f64", H{map2<double, double, double>(w, in, m, [](double a, double b) { return std::copysign(b, a); });
}
}
, {"testp.f32", test_property<uint32_t, 8, 23>}, {"testp.f64", test_property<uint64_t, 11, 52>},
}
;

}  // namespace
}  // namespace ptx
