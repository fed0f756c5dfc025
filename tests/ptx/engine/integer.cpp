// Integer arithmetic, bit manipulation, shifts and logic.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

template <class T>
T high(T a, T b) {
  return T((__int128(a) * __int128(b)) >> (8 * sizeof(T)));
}
template <>
uint64_t high(uint64_t a, uint64_t b) {
  return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
}
template <class T>
T clamp_s32(T x) {
  return std::min<T>(std::max<T>(x, INT32_MIN), INT32_MAX);
}
// The ISA leaves division by zero unspecified; the hardware gives all ones.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed<T>::value && b == T(-1)) return T(0 - uint64_t(a));
  return a / b;
}
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed<T>::value && b == T(-1)) return 0;
  return a % b;
}
inline int32_t sext24(uint32_t a) { return int32_t(a << 8) >> 8; }

template <class T>
T bit_field_extract(T a, uint32_t pos, uint32_t len) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t width = 8 * sizeof(T);
  pos &= 0xff;
  len &= 0xff;
  bool sgn = std::is_signed<T>::value && len != 0 && (U(a) >> std::min(pos + len - 1, width - 1)) & 1;
  U value = pos < width ? U(a) >> pos : 0;
  if (len < width) value &= (U(1) << len) - 1;
  // bits beyond the source are copies of the field's sign
  uint32_t have = pos < width ? std::min(len, width - pos) : 0;
  if (sgn && have < width) value |= ~U(0) << have;
  return T(value);
}
template <class T>
T bit_field_insert(T a, T b, uint32_t pos, uint32_t len) {
  constexpr uint32_t width = 8 * sizeof(T);
  pos &= 0xff;
  len &= 0xff;
  if (pos >= width || len == 0) return b;
  T mask = len >= width ? ~T(0) : (T(1) << len) - 1;
  return T((b & ~(mask << pos)) | ((a & mask) << pos));
}
template <class T>
uint32_t find_bit(T a, bool shift_amount) {
  using U = std::make_unsigned_t<T>;
  U u = std::is_signed<T>::value && a < 0 ? U(~a) : U(a);
  if (u == 0) return kAll;
  int top = sizeof(T) == 8 ? 63 - __builtin_clzll(u) : 31 - __builtin_clz(uint32_t(u));
  return shift_amount ? uint32_t(8 * sizeof(T) - 1 - top) : uint32_t(top);
}
uint32_t find_nth_set(uint32_t mask, uint32_t base, int32_t offset) {
  base &= 31;
  if (offset == 0) return mask >> base & 1 ? base : kAll;
  int step = offset > 0 ? 1 : -1, count = 0;
  for (int i = int(base); i >= 0 && i < 32; i += step)
    if (mask >> i & 1 && ++count == std::abs(offset)) return uint32_t(i);
  return kAll;
}
uint32_t reverse32(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) return std::is_signed<T>::value && a < 0 ? T(-1) : T(0);
  return T(a >> n);
}
uint32_t funnel(uint32_t a, uint32_t b, uint32_t c, bool left, bool wrap) {
  uint32_t n = wrap ? c & 31 : std::min(c, 32u);
  uint64_t both = uint64_t(b) << 32 | a;
  return left ? uint32_t((both << n) >> 32) : uint32_t(both >> n);
}
uint32_t permute(uint32_t a, uint32_t b, uint32_t c, int mode) {
  uint64_t both = uint64_t(b) << 32 | a;
  auto byte = [&](int i) { return uint32_t(both >> (8 * (i & 7))) & 0xff; };
  uint32_t r = 0, s = c & 3;
  for (int i = 0; i < 4; i++) {
    uint32_t v;
    switch (mode) {
      case 0: {
        uint32_t sel = c >> (4 * i) & 0xf;
        v = byte(sel & 7);
        if (sel & 8) v = v & 0x80 ? 0xff : 0;
        break;
      }
      case 1:
        v = byte(s + i);
        break;  // f4e
      case 2:
        v = byte(int(s) - i + 8);
        break;  // b4e
      case 3:
        v = byte(s);
        break;  // rc8
      case 4:
        v = byte(std::max<uint32_t>(s, i));
        break;  // ecl
      case 5:
        v = byte(std::min<uint32_t>(s, i));
        break;  // ecr
      default:
        v = byte(i & 1 ? (s & 1) * 2 + 1 : (s & 1) * 2);  // rc16
    }
    r |= v << (8 * i);
  }
  return r;
}
uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t lut) {
  uint32_t r = 0;
  if (lut & 0x01) r |= ~a & ~b & ~c;
  if (lut & 0x02) r |= ~a & ~b & c;
  if (lut & 0x04) r |= ~a & b & ~c;
  if (lut & 0x08) r |= ~a & b & c;
  if (lut & 0x10) r |= a & ~b & ~c;
  if (lut & 0x20) r |= a & ~b & c;
  if (lut & 0x40) r |= a & b & ~c;
  if (lut & 0x80) r |= a & b & c;
  return r;
}
int64_t dot4(uint32_t a, uint32_t b, bool sa, bool sb) {
  int64_t r = 0;
  for (int i = 0; i < 4; i++) {
    int x = sa ? int8_t(a >> 8 * i) : int(a >> 8 * i & 0xff), y = sb ? int8_t(b >> 8 * i) : int(b >> 8 * i & 0xff);
    r += x * y;
  }
  return r;
}
int64_t dot2(uint32_t a, uint32_t b, bool hi, bool sa, bool sb) {
  int64_t r = 0;
  for (int i = 0; i < 2; i++) {
    int x = sa ? int16_t(a >> 16 * i) : int(a >> 16 * i & 0xffff);
    uint32_t part = b >> (8 * (i + 2 * hi)) & 0xff;
    r += int64_t(x) * (sb ? int8_t(part) : int(part));
  }
  return r;
}

// add.cc, addc and their kin: `with_carry` reads the carry, `set` writes it
template <class T>
void add_carry(Warp& w, const Insn& in, Mask m) {
  bool with = in.imm[0], set = in.imm[1], subtract = in.imm[2];
  const T *a = src<T>(w, in, 0), *b = src<T>(w, in, 1);
  T* d = dst<T>(w, in, 0);
  each_lane(m, [&](int i) {
    T carry = with ? w.carry >> i & 1 : 0;
    T x = a[i], y = b[i];
    bool out;
    T r;
    if (subtract) {
      r = x - y - carry;
      out = static_cast<unsigned __int128>(x) < static_cast<unsigned __int128>(y) + carry;
    } else {
      unsigned __int128 sum = static_cast<unsigned __int128>(x) + y + carry;
      r = T(sum);
      out = sum >> (8 * sizeof(T)) & 1;
    }
    d[i] = r;
    if (set) w.carry = (w.carry & ~(1u << i)) | (uint32_t(out) << i);
  });
}
template <class T>
void mad_carry(Warp& w, const Insn& in, Mask m) {
  bool with = in.imm[0], set = in.imm[1], hi = in.imm[2];
  const T *a = src<T>(w, in, 0), *b = src<T>(w, in, 1), *c = src<T>(w, in, 2);
  T* d = dst<T>(w, in, 0);
  using U = std::make_unsigned_t<T>;
  each_lane(m, [&](int i) {
    U product = hi ? U(high<T>(a[i], b[i])) : U(a[i]) * U(b[i]);
    unsigned __int128 sum = static_cast<unsigned __int128>(product) + U(c[i]) + (with ? w.carry >> i & 1 : 0);
    d[i] = T(sum);
    if (set) w.carry = (w.carry & ~(1u << i)) | (uint32_t(sum >> (8 * sizeof(T)) & 1) << i);
  });
}

template <class T, class F>
void pair16(Warp& w, const Insn& in, Mask m, F f) {
  map2<uint32_t, uint32_t, uint32_t>(w, in, m, [f](uint32_t a, uint32_t b) {
    return uint32_t(uint16_t(f(T(a), T(b)))) | uint32_t(uint16_t(f(T(a >> 16), T(b >> 16)))) << 16;
  });
}

#define H [](Warp& w, const Insn& in, Mask m)
#define UN(key, D, A, expr)                                  \
  {key, H{map1<D, A>(w, in, m, [](A a) { return D(expr); }); \
  }                                                          \
  }
#define BIN(key, D, A, B, expr)                                      \
  {key, H{map2<D, A, B>(w, in, m, [](A a, B b) { return D(expr); }); \
  }                                                                  \
  }
#define TER(key, D, A, B, C, expr)                                           \
  {key, H{map3<D, A, B, C>(w, in, m, [](A a, B b, C c) { return D(expr); }); \
  }                                                                          \
  }

#define ARITHMETIC(t, T, U)                                                                                 \
  BIN("add." t, T, U, U, a + b), BIN("sub." t, T, U, U, a - b), BIN("mul.lo." t, T, U, U, uint64_t(a) * b), \
      BIN("mul.hi." t, T, T, T, high<T>(a, b)), TER("mad.lo." t, T, U, U, U, uint64_t(a) * b + c),          \
      TER("mad.hi." t, T, T, T, U, U(high<T>(a, b)) + c), BIN("div." t, T, T, T, quotient<T>(a, b)),        \
      BIN("rem." t, T, T, T, remainder_of<T>(a, b)), BIN("min." t, T, T, T, std::min(a, b)),                \
      BIN("max." t, T, T, T, std::max(a, b)), TER("sad." t, T, T, T, U, c + U(a < b ? U(b) - U(a) : U(a) - U(b)))
#define SIGNED(t, T, U) UN("abs." t, T, T, a < 0 ? U(0) - U(a) : U(a)), UN("neg." t, T, U, U(0) - a)
#define WIDE(t, W, T)                       \
  BIN("mul.wide." t, W, T, T, W(a) * W(b)), \
      TER("mad.wide." t, W, T, T, W, std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c))

const Register arithmetic{
    ARITHMETIC("u16", uint16_t, uint16_t), ARITHMETIC("s16", int16_t, uint16_t), ARITHMETIC("u32", uint32_t, uint32_t),
    ARITHMETIC("s32", int32_t, uint32_t), ARITHMETIC("u64", uint64_t, uint64_t), ARITHMETIC("s64", int64_t, uint64_t),
    SIGNED("s16", int16_t, uint16_t), SIGNED("s32", int32_t, uint32_t), SIGNED("s64", int64_t, uint64_t),
    WIDE("u16", uint32_t, uint16_t), WIDE("s16", int32_t, int16_t), WIDE("u32", uint64_t, uint32_t),
    WIDE("s32", int64_t, int32_t), BIN("add.sat.s32", int32_t, int32_t, int32_t, clamp_s32(int64_t(a) + b)),
    BIN("sub.sat.s32", int32_t, int32_t, int32_t, clamp_s32(int64_t(a) - b)),
    TER("mad.hi.sat.s32", int32_t, int32_t, int32_t, int32_t, clamp_s32(int64_t(high<int32_t>(a, b)) + c)),
    BIN("min.relu.s32", int32_t, int32_t, int32_t, std::max(std::min(a, b), 0)),
    BIN("max.relu.s32", int32_t, int32_t, int32_t, std::max(std::max(a, b), 0)),
    BIN("mul24.lo.u32", uint32_t, uint32_t, uint32_t, uint64_t(a & 0xffffff) * (b & 0xffffff)),
    BIN("mul24.hi.u32", uint32_t, uint32_t, uint32_t, uint64_t(a & 0xffffff) * (b & 0xffffff) >> 16),
    BIN("mul24.lo.s32", int32_t, uint32_t, uint32_t, int64_t(sext24(a)) * sext24(b)),
    BIN("mul24.hi.s32", int32_t, uint32_t, uint32_t, int64_t(sext24(a)) * sext24(b) >> 16),
    TER("mad24.lo.u32", uint32_t, uint32_t, uint32_t, uint32_t, uint64_t(a & 0xffffff) * (b & 0xffffff) + c),
    TER("mad24.hi.u32", uint32_t, uint32_t, uint32_t, uint32_t, (uint64_t(a & 0xffffff) * (b & 0xffffff) >> 16) + c),
    TER("mad24.lo.s32", int32_t, uint32_t, uint32_t, uint32_t, int64_t(sext24(a)) * sext24(b) + c),
    TER("mad24.hi.s32", int32_t, uint32_t, uint32_t, uint32_t, (int64_t(sext24(a)) * sext24(b) >> 16) + c),
    {"add.u16x2", H{pair16<uint16_t>(w, in, m, [](uint16_t a, uint16_t b) { return a + b; });
}  // namespace
}  // namespace ptx
, {"add.s16x2", H{pair16<int16_t>(w, in, m, [](int16_t a, int16_t b) { return a + b; });
}
}
, {"min.u16x2", H{pair16<uint16_t>(w, in, m, [](uint16_t a, uint16_t b) { return std::min(a, b); });
}
}
, {"min.s16x2", H{pair16<int16_t>(w, in, m, [](int16_t a, int16_t b) { return std::min(a, b); });
}
}
, {"max.u16x2", H{pair16<uint16_t>(w, in, m, [](uint16_t a, uint16_t b) { return std::max(a, b); });
}
}
, {"max.s16x2", H{pair16<int16_t>(w, in, m, [](int16_t a, int16_t b) { return std::max(a, b); });
}
}
, {"addcarry.32", add_carry<uint32_t>}, {"addcarry.64", add_carry<uint64_t>}, {"madcarry.u32", mad_carry<uint32_t>},
    {"madcarry.s32", mad_carry<int32_t>}, {"madcarry.u64", mad_carry<uint64_t>}, {"madcarry.s64", mad_carry<int64_t>},
    TER("dp4a.u32.u32", uint32_t, uint32_t, uint32_t, uint32_t, dot4(a, b, false, false) + c),
    TER("dp4a.u32.s32", uint32_t, uint32_t, uint32_t, uint32_t, dot4(a, b, false, true) + c),
    TER("dp4a.s32.u32", uint32_t, uint32_t, uint32_t, uint32_t, dot4(a, b, true, false) + c),
    TER("dp4a.s32.s32", uint32_t, uint32_t, uint32_t, uint32_t, dot4(a, b, true, true) + c),
    {"dp2a", H{bool hi = in.imm[0], sa = in.imm[1], sb = in.imm[2];
map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, m, [=](uint32_t a, uint32_t b, uint32_t c) {
  return uint32_t(dot2(a, b, hi, sa, sb) + c);
});
}
}
,
}
;

#define LOGIC(t, T)                                                                                                  \
  BIN("and." t, T, T, T, a& b), BIN("or." t, T, T, T, a | b), BIN("xor." t, T, T, T, a ^ b), UN("not." t, T, T, ~a), \
      UN("cnot." t, T, T, a == 0), BIN("shl." t, T, T, uint32_t, shift_left<T>(a, b))
#define SHIFT(t, T) BIN("shr." t, T, T, uint32_t, shift_right<T>(a, b))
#define FIELD(t, T, U)                                                    \
  TER("bfe." t, T, T, uint32_t, uint32_t, bit_field_extract<T>(a, b, c)), \
      UN("bfind." t, uint32_t, T, find_bit<T>(a, false)), UN("bfind.shiftamt." t, uint32_t, T, find_bit<T>(a, true))

template <class T>
void insert_field(Warp& w, const Insn& in, Mask m) {
  map_lanes(m, dst<T>(w, in, 0), bit_field_insert<T>, src<T>(w, in, 0), src<T>(w, in, 1), src<uint32_t>(w, in, 2),
            src<uint32_t>(w, in, 3));
}

// and, or, xor, not of predicates: a predicate is one mask
#define PREDICATE(key, expr)                                                       \
  {key, H{Mask a = pred(w, in.ops[1]), b = pred(w, in.ops[in.ndst + in.nsrc - 1]); \
  (void)b;                                                                         \
  set_pred(w, in.ops[0], m, expr);                                                 \
  }                                                                                \
  }

const Register logic{
    LOGIC("b16", uint16_t), LOGIC("b32", uint32_t), LOGIC("b64", uint64_t), SHIFT("b16", uint16_t),
    SHIFT("b32", uint32_t), SHIFT("b64", uint64_t), SHIFT("u16", uint16_t), SHIFT("u32", uint32_t),
    SHIFT("u64", uint64_t), SHIFT("s16", int16_t), SHIFT("s32", int32_t), SHIFT("s64", int64_t),
    PREDICATE("and.pred", a& b), PREDICATE("or.pred", a | b), PREDICATE("xor.pred", a ^ b), PREDICATE("not.pred", ~a),
    FIELD("u32", uint32_t, uint32_t), FIELD("s32", int32_t, uint32_t), FIELD("u64", uint64_t, uint64_t),
    FIELD("s64", int64_t, uint64_t), {"bfi.b32", insert_field<uint32_t>}, {"bfi.b64", insert_field<uint64_t>},
    UN("popc.b32", uint32_t, uint32_t, __builtin_popcount(a)),
    UN("popc.b64", uint32_t, uint64_t, __builtin_popcountll(a)),
    UN("clz.b32", uint32_t, uint32_t, a ? __builtin_clz(a) : 32),
    UN("clz.b64", uint32_t, uint64_t, a ? __builtin_clzll(a) : 64), UN("brev.b32", uint32_t, uint32_t, reverse32(a)),
    UN("brev.b64", uint64_t, uint64_t, uint64_t(reverse32(uint32_t(a))) << 32 | reverse32(uint32_t(a >> 32))),
    TER("fns.b32", uint32_t, uint32_t, uint32_t, int32_t, find_nth_set(a, b, c)),
    {"szext", H{bool is_signed = in.imm[0], wrap = in.imm[1];
map2<uint32_t, uint32_t, uint32_t>(w, in, m, [=](uint32_t a, uint32_t n) {
  n = wrap ? n & 31 : std::min(n, 32u);
  if (n == 0) return 0u;
  if (n == 32) return a;
  uint32_t v = a & ((1u << n) - 1);
  return is_signed && v >> (n - 1) & 1 ? v | ~0u << n : v;
});
}
}
, {"bmsk", H{bool wrap = in.imm[0];
map2<uint32_t, uint32_t, uint32_t>(w, in, m, [=](uint32_t pos, uint32_t n) {
  pos = wrap ? pos & 31 : std::min(pos, 32u);
  n = wrap ? n & 31 : std::min(n, 32u);
  uint64_t ones = (uint64_t(1) << n) - 1;
  return uint32_t(ones << pos);
});
}
}
, {"shf", H{bool left = in.imm[0], wrap = in.imm[1];
map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, m, [=](uint32_t a, uint32_t b, uint32_t c) {
  return funnel(a, b, c, left, wrap);
});
}
}
, {"prmt", H{int mode = int(in.imm[0]);
map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, m, [=](uint32_t a, uint32_t b, uint32_t c) {
  return permute(a, b, c, mode);
});
}
}
, {"lop3", H{uint32_t lut = uint32_t(in.imm[0]);
map3<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, m,
                                             [=](uint32_t a, uint32_t b, uint32_t c) { return logic3(a, b, c, lut); });
}
}
,
    {"lop3.pred",  // d|p = lut(a, b, c); p = (d != 0) op q
     H{uint32_t lut = uint32_t(in.imm[0]);
const uint32_t *a = src<uint32_t>(w, in, 0), *b = src<uint32_t>(w, in, 1), *c = src<uint32_t>(w, in, 2);
Mask q = pred(w, in.ops[in.ndst + 3]);
if (in.imm[2]) q = ~q;
uint32_t* d = dst<uint32_t>(w, in, 0);
Mask nonzero = 0;
each_lane(m, [&](int i) {
  d[i] = logic3(a[i], b[i], c[i], lut);
  nonzero |= uint32_t(d[i] != 0) << i;
});
set_pred(w, in.ops[1], m, in.imm[1] ? nonzero & q : nonzero | q);
}
}
,
}
;

}  // namespace
}  // namespace ptx
