// mov, selections and comparisons.
#include <cmath>

#include "machine.h"
#include "numeric.h"

namespace ptx {
namespace {

template <class T>
void mov(Warp& w, const Insn& in, Mask m) {
  map1<T, T>(w, in, m, [](T a) { return a; });
}
struct Wide {
  uint64_t lo, hi;
};
void mov_pred(Warp& w, const Insn& in, Mask m) { set_pred(w, in.ops[0], m, pred(w, in.ops[1])); }

// {a, b, ...} -> d and d -> {a, b, ...}; imm[0]: bytes of an element
template <class F>
void with_bytes(const Insn& in, int first, int count, F f) {
  for (int k = 0; k < count; k++) f(in.ops[first + k], k * int(in.imm[0]), int(in.imm[0]));
}
void pack(Warp& w, const Insn& in, Mask m) {
  int total = int(in.imm[0]) * in.nsrc;
  each_lane(m, [&](int i) {
    char value[16];
    with_bytes(in, 1, in.nsrc,
               [&](Operand o, int at_byte, int n) { std::memcpy(value + at_byte, at(w, o) + i * n, n); });
    std::memcpy(at(w, in.ops[0]) + i * total, value, total);
  });
}
void unpack(Warp& w, const Insn& in, Mask m) {
  int total = int(in.imm[0]) * in.ndst;
  each_lane(m, [&](int i) {
    char value[16];
    std::memcpy(value, at(w, in.ops[in.ndst]) + i * total, total);
    with_bytes(in, 0, in.ndst,
               [&](Operand o, int at_byte, int n) { std::memcpy(at(w, o) + i * n, value + at_byte, n); });
  });
}

// Only the chosen operand has to be defined.
template <class T>
void selp(Warp& w, const Insn& in, Mask m) {
  const T *a = src<T>(w, in, 0), *b = src<T>(w, in, 1);
  Mask p = pred(w, in.ops[in.ndst + 2]);
  Mask ok = defined(w, in, 2) & ((p & defined(w, in, 0)) | (~p & defined(w, in, 1)));
  T* d = dst<T>(w, in, 0);
  each_lane(m, [&](int i) { d[i] = p >> i & 1 ? a[i] : b[i]; });
  mark_defined(w, in.ops[0], m, ok);
}
template <class T, class C>
void slct(Warp& w, const Insn& in, Mask m) {
  const T *a = src<T>(w, in, 0), *b = src<T>(w, in, 1);
  const C* c = src<C>(w, in, 2);
  T* d = dst<T>(w, in, 0);
  each_lane(m, [&](int i) { d[i] = c[i] >= C(0) ? a[i] : b[i]; });
}

struct Int {
  template <class T>
  static T load(T x) {
    return x;
  }
};
struct Float {
  static float load(float x) { return x; }
  static double load(double x) { return x; }
};
struct HalfBits {
  static float load(uint16_t x) { return f16_to_float(x); }
};
struct BrainBits {
  static float load(uint16_t x) { return bf16_to_float(x); }
};

// The comparison operators; a comparison with NaN is false unless the operator is an unordered one.
#define COMPARE(Name, expr)      \
  struct Name {                  \
    template <class N>           \
    static bool test(N a, N b) { \
      return expr;               \
    }                            \
  };
COMPARE(Eq, a == b)
COMPARE(Ne, (a < b) || (a > b))
COMPARE(Lt, a < b)
COMPARE(Le, a <= b)
COMPARE(Gt, a > b)
COMPARE(Ge, a >= b)
COMPARE(Equ, !((a < b) || (a > b)))
COMPARE(Neu, !(a == b))
COMPARE(Ltu, !(a >= b))
COMPARE(Leu, !(a > b))
COMPARE(Gtu, !(a <= b))
COMPARE(Geu, !(a < b))
COMPARE(Num, a == a && b == b)
COMPARE(Nan, a != a || b != b)

template <class C, class L, class T>
Mask compare(Warp& w, const Insn& in, Mask m) {
  const T *a = src<T>(w, in, 0), *b = src<T>(w, in, 1);
  Mask r = 0;
  if (in.flags & kFtz) {
    each_lane(m, [&](int i) { r |= Mask(C::test(flush(float(L::load(a[i]))), flush(float(L::load(b[i]))))) << i; });
  } else {
    for (int i = 0; i < kLanes; i++) r |= Mask(C::test(L::load(a[i]), L::load(b[i]))) << i;
  }
  return r;
}

// imm[0]: 0 none, 1 and, 2 or, 3 xor with the predicate source; imm[1]: that source is negated
Mask combine(Warp& w, const Insn& in, Mask r) {
  if (in.imm[0] == 0) return r;
  Mask q = pred(w, in.ops[in.ndst + 2]);
  if (in.imm[1]) q = ~q;
  return in.imm[0] == 1 ? r & q : in.imm[0] == 2 ? r | q : r ^ q;
}
template <class C, class L, class T>
void setp(Warp& w, const Insn& in, Mask m) {
  Mask r = compare<C, L, T>(w, in, m);
  Mask p = combine(w, in, r), q = in.ndst > 1 ? combine(w, in, ~r) : 0;
  set_pred(w, in.ops[0], m, p);
  if (in.ndst > 1) set_pred(w, in.ops[1], m, q);
}
// imm[2]: value of true (all ones, or 1.0 of the destination's format); imm[3]: destination bytes
template <class C, class L, class T>
void set(Warp& w, const Insn& in, Mask m) {
  Mask r = combine(w, in, compare<C, L, T>(w, in, m));
  each_lane(m, [&](int i) {
    uint64_t v = r >> i & 1 ? uint64_t(in.imm[2]) : 0;
    if (in.imm[3] == 4)
      dst<uint32_t>(w, in, 0)[i] = uint32_t(v);
    else
      dst<uint16_t>(w, in, 0)[i] = uint16_t(v);
  });
}
// setp.f16x2 and bf16x2: a predicate a half
template <class C, class L>
void setp_pair(Warp& w, const Insn& in, Mask m) {
  const uint32_t *a = src<uint32_t>(w, in, 0), *b = src<uint32_t>(w, in, 1);
  Mask lo = 0, hi = 0;
  each_lane(m, [&](int i) {
    lo |= Mask(C::test(L::load(uint16_t(a[i])), L::load(uint16_t(b[i])))) << i;
    hi |= Mask(C::test(L::load(uint16_t(a[i] >> 16)), L::load(uint16_t(b[i] >> 16)))) << i;
  });
  set_pred(w, in.ops[0], m, combine(w, in, lo));
  set_pred(w, in.ops[1], m, combine(w, in, hi));
}

void read_clock(Warp& w, const Insn& in, Mask m) {
  uint64_t now = w.launch->now;
  each_lane(m, [&](int i) {
    if (in.imm[0] == 4)
      dst<uint32_t>(w, in, 0)[i] = uint32_t(now >> in.imm[1]);
    else
      dst<uint64_t>(w, in, 0)[i] = now;
  });
}

#define INT_COMPARE(op, C, t, T) \
  {"setp." op "." t, setp<C, Int, T>}, { "set." op "." t, set<C, Int, T> }
#define INT_COMPARES(t, T)                                                                                            \
  INT_COMPARE("eq", Eq, t, T), INT_COMPARE("ne", Ne, t, T), INT_COMPARE("lt", Lt, t, T), INT_COMPARE("le", Le, t, T), \
      INT_COMPARE("gt", Gt, t, T), INT_COMPARE("ge", Ge, t, T)
#define FLOAT_COMPARE(op, C)                                                                                \
  {"setp." op ".f32", setp<C, Float, float>}, {"set." op ".f32", set<C, Float, float>},                     \
      {"setp." op ".f64", setp<C, Float, double>}, {"set." op ".f64", set<C, Float, double>},               \
      {"setp." op ".f16", setp<C, HalfBits, uint16_t>}, {"set." op ".f16", set<C, HalfBits, uint16_t>},     \
      {"setp." op ".bf16", setp<C, BrainBits, uint16_t>}, {"set." op ".bf16", set<C, BrainBits, uint16_t>}, \
      {"setp." op ".f16x2", setp_pair<C, HalfBits>}, {                                                      \
    "setp." op ".bf16x2", setp_pair<C, BrainBits>                                                           \
  }

const Register comparisons{
    INT_COMPARES("u16", uint16_t), INT_COMPARES("s16", int16_t),  INT_COMPARES("u32", uint32_t),
    INT_COMPARES("s32", int32_t),  INT_COMPARES("u64", uint64_t), INT_COMPARES("s64", int64_t),
    FLOAT_COMPARE("eq", Eq),       FLOAT_COMPARE("ne", Ne),       FLOAT_COMPARE("lt", Lt),
    FLOAT_COMPARE("le", Le),       FLOAT_COMPARE("gt", Gt),       FLOAT_COMPARE("ge", Ge),
    FLOAT_COMPARE("equ", Equ),     FLOAT_COMPARE("neu", Neu),     FLOAT_COMPARE("ltu", Ltu),
    FLOAT_COMPARE("leu", Leu),     FLOAT_COMPARE("gtu", Gtu),     FLOAT_COMPARE("geu", Geu),
    FLOAT_COMPARE("num", Num),     FLOAT_COMPARE("nan", Nan),
};

const Register moves{
    {"mov.16", mov<uint16_t>},
    {"mov.32", mov<uint32_t>},
    {"mov.64", mov<uint64_t>},
    {"mov.128", mov<Wide>},
    {"mov.pred", mov_pred},
    {"pack", pack},
    {"unpack", unpack},
    {"clock", read_clock},
    {"selp.16", selp<uint16_t>},
    {"selp.32", selp<uint32_t>},
    {"selp.64", selp<uint64_t>},
    {"slct.16.s32", slct<uint16_t, int32_t>},
    {"slct.32.s32", slct<uint32_t, int32_t>},
    {"slct.64.s32", slct<uint64_t, int32_t>},
    {"slct.16.f32", slct<uint16_t, float>},
    {"slct.32.f32", slct<uint32_t, float>},
    {"slct.64.f32", slct<uint64_t, float>},
};

}  // namespace
}  // namespace ptx
