// cvt, cvt.pack: conversions between integers and floating-point formats.
#include <algorithm>

#include "machine.h"
#include "numeric.h"

namespace ptx {
namespace {

// imm[0]: rounding to an integer, one of Round; imm[1]: bits of the source and signedness; see decode_convert in Python
struct IntType {
  int bits;
  bool is_signed;
};
IntType int_type(int64_t code) { return {int(code & 0xff), bool(code >> 8 & 1)}; }

uint64_t read_int(const Warp& w, const Insn& in, int i, int lane, int reg_bytes) {
  switch (reg_bytes) {
    case 2:
      return src<uint16_t>(w, in, i)[lane];
    case 4:
      return src<uint32_t>(w, in, i)[lane];
    default:
      return src<uint64_t>(w, in, i)[lane];
  }
}
void write_int(const Warp& w, const Insn& in, int lane, int reg_bytes, uint64_t v) {
  switch (reg_bytes) {
    case 2:
      dst<uint16_t>(w, in, 0)[lane] = uint16_t(v);
      break;
    case 4:
      dst<uint32_t>(w, in, 0)[lane] = uint32_t(v);
      break;
    default:
      dst<uint64_t>(w, in, 0)[lane] = v;
  }
}
__int128 extend(uint64_t v, IntType t) {
  if (t.bits < 64) v &= (uint64_t(1) << t.bits) - 1;
  if (t.is_signed && v >> (t.bits - 1) & 1) return t.bits < 64 ? int64_t(v | ~uint64_t(0) << t.bits) : int64_t(v);
  return v;
}
__int128 lowest(IntType t) { return t.is_signed ? -(__int128(1) << (t.bits - 1)) : 0; }
__int128 highest(IntType t) { return (__int128(1) << (t.bits - t.is_signed)) - 1; }

// imm: source type, destination type, source register bytes | destination register bytes << 8
void int_to_int(Warp& w, const Insn& in, Mask m) {
  IntType from = int_type(in.imm[0]), to = int_type(in.imm[1]);
  int rs = in.imm[2] & 0xff, rd = in.imm[2] >> 8 & 0xff;
  bool sat = in.flags & kSat;
  each_lane(m, [&](int i) {
    __int128 v = extend(read_int(w, in, 0, i, rs), from);
    if (sat) v = std::min(std::max(v, lowest(to)), highest(to));
    v = extend(uint64_t(v), to);
    write_int(w, in, i, rd, uint64_t(v));
  });
}

double round_integral(double x, int mode) {
  switch (mode) {
    case kNearestEven:
      return std::nearbyint(x);
    case kToZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    default:
      return std::ceil(x);
  }
}

enum FloatCode { kCodeF16, kCodeBf16, kCodeF32, kCodeF64, kCodeTf32 };
double read_float(const Warp& w, const Insn& in, int op, int lane, int code) {
  switch (code) {
    case kCodeF16:
      return f16_to_float(src<uint16_t>(w, in, op)[lane]);
    case kCodeBf16:
      return bf16_to_float(src<uint16_t>(w, in, op)[lane]);
    case kCodeF32:
      return src<float>(w, in, op)[lane];
    default:
      return src<double>(w, in, op)[lane];
  }
}
// Rounds a double to the format in the mode of the flags; `x` is exact or rounded to odd.
uint64_t pack_float(double x, int code, uint64_t flags) {
  int mode = flags & kRoundAway ? int(kNearestAway) : int(flags & kRoundMask);
  if (flags & kRelu && x < 0) x = 0;
  if (flags & kRelu && x == 0) x = 0.0;
  if (flags & kSat && code != kCodeTf32) x = saturate(x);
  switch (code) {
    case kCodeF16:
      return encode(x, kF16, mode);
    case kCodeBf16:
      return encode(x, kBf16, mode);
    case kCodeTf32:
      return x != x ? 0x7fffffffu : encode(x, kTf32, mode, flags & kSat) << 13;
    case kCodeF32: {
      Rounding rounding(mode);
      volatile double exact = x;
      float f = float(exact);
      return bits<uint32_t>(canonical(flags & kFtz ? flush(f) : f));
    }
    default:
      return bits<uint64_t>(x);
  }
}

// imm: source code, destination code, rounding to an integer (Round + 1, or 0)
void float_to_float(Warp& w, const Insn& in, Mask m) {
  int from = int(in.imm[0]), to = int(in.imm[1]), integral = int(in.imm[2]);
  bool ftz = in.flags & kFtz;
  int bytes = to == kCodeF64 ? 8 : to == kCodeF32 || to == kCodeTf32 ? 4 : 2;
  if (from == kCodeF32 && to == kCodeBf16 && in.flags == 0) {
    map1<uint16_t, float>(w, in, m, float_to_bf16);
    return;
  }
  if (from == kCodeBf16 && to == kCodeF32 && in.flags == 0) {
    map1<float, uint16_t>(w, in, m, [](uint16_t a) { return canonical(bf16_to_float(a)); });
    return;
  }
  each_lane(m, [&](int i) {
    double x = read_float(w, in, 0, i, from);
    if (ftz && from == kCodeF32) x = flush(float(x));
    if (integral) x = round_integral(x, integral - 1);
    write_int(w, in, i, bytes, pack_float(x, to, in.flags));
  });
}

// imm: source code, destination integer type, rounding, destination register bytes
void float_to_int(Warp& w, const Insn& in, Mask m) {
  int from = int(in.imm[0]), mode = int(in.imm[2]);
  IntType to = int_type(in.imm[1]);
  double low = double(lowest(to)), top = std::ldexp(1.0, to.bits - to.is_signed);
  each_lane(m, [&](int i) {
    double x = read_float(w, in, 0, i, from);
    if (in.flags & kFtz && from == kCodeF32) x = flush(float(x));
    uint64_t r;
    if (x != x) {
      r = from != kCodeF64 && to.bits != 64 ? 0 : uint64_t(1) << (to.bits - 1);
    } else {
      x = round_integral(x, mode);
      r = x >= top   ? uint64_t(highest(to))
          : x <= low ? uint64_t(lowest(to))
          : x < 0    ? uint64_t(int64_t(x))
                     : uint64_t(x);
    }
    write_int(w, in, i, int(in.imm[3]), r);
  });
}

// imm: source integer type, destination code, source register bytes
void int_to_float(Warp& w, const Insn& in, Mask m) {
  IntType from = int_type(in.imm[0]);
  int to = int(in.imm[1]), rs = int(in.imm[2]);
  int mode = int(in.flags & kRoundMask);
  each_lane(m, [&](int i) {
    __int128 v = extend(read_int(w, in, 0, i, rs), from);
    uint64_t mag = uint64_t(v < 0 ? -v : v);
    if (to == kCodeF64 || to == kCodeF32) {
      Rounding rounding(mode);
      volatile uint64_t u = mag;
      volatile bool negative = v < 0;
      // negated before rounding, for the directed modes
      if (to == kCodeF64) {
        double d = negative && mag <= uint64_t(1) << 63 ? double(int64_t(0 - u)) : double(u);
        write_int(w, in, i, 8, bits<uint64_t>(d));
      } else {
        float f = negative && mag <= uint64_t(1) << 63 ? float(int64_t(0 - u)) : float(u);
        if (in.flags & kSat) f = saturate(f);
        write_int(w, in, i, 4, bits<uint32_t>(f));
      }
    } else {
      double odd = double(mag);  // 64-bit integers lose bits here: restore stickiness
      if (uint64_t(odd) != mag || odd >= 18446744073709551616.0) {
        Rounding rounding(kToZero);
        volatile uint64_t u = mag;
        odd = double(u);
        if (!(bits<uint64_t>(odd) & 1)) odd = bits<double>(bits<uint64_t>(odd) | 1);
      }
      write_int(w, in, i, 2, pack_float(v < 0 ? -odd : odd, to, in.flags));
    }
  });
}

// d = {a, b} in a packed format, a in the upper half. imm: destination code
void pack_pair(Warp& w, const Insn& in, Mask m) {
  int to = int(in.imm[0]);
  const float *a = src<float>(w, in, 0), *b = src<float>(w, in, 1);
  if (to == kCodeBf16 && in.flags == 0) {
    map_lanes(
        m, dst<uint32_t>(w, in, 0),
        [](float x, float y) { return uint32_t(float_to_bf16(x)) << 16 | float_to_bf16(y); }, a, b);
    return;
  }
  uint32_t* d = dst<uint32_t>(w, in, 0);
  each_lane(m, [&](int i) { d[i] = uint32_t(pack_float(a[i], to, in.flags) << 16 | pack_float(b[i], to, in.flags)); });
}

// 8-bit formats. imm: 0 e4m3, 1 e5m2
const Format& format8(int64_t code) {
  static const Format formats[] = {kE4m3, kE5m2};
  return formats[code];
}
uint32_t encode8(double x, const Insn& in) {
  if (in.flags & kRelu && !(x > 0)) x = x != x ? x : 0.0;
  return encode(x, format8(in.imm[0]), kNearestEven, true);  // .satfinite is mandatory
}
void float_to_fp8x2(Warp& w, const Insn& in, Mask m) {
  const float *a = src<float>(w, in, 0), *b = src<float>(w, in, 1);
  map_lanes(
      m, dst<uint16_t>(w, in, 0), [&](float x, float y) { return uint16_t(encode8(x, in) << 8 | encode8(y, in)); }, a,
      b);
}
void f16x2_to_fp8x2(Warp& w, const Insn& in, Mask m) {
  map1<uint16_t, uint32_t>(w, in, m, [&](uint32_t a) {
    return uint16_t(encode8(f16_to_float(uint16_t(a >> 16)), in) << 8 | encode8(f16_to_float(uint16_t(a)), in));
  });
}
void fp8x2_to_f16x2(Warp& w, const Insn& in, Mask m) {
  Format f = format8(in.imm[0]);
  bool relu = in.flags & kRelu;
  map1<uint32_t, uint16_t>(w, in, m, [=](uint16_t a) {
    auto one = [&](uint32_t v) {
      double x = decode(v, f);
      return uint32_t(float_to_f16(float(relu && x < 0 ? 0 : x)));
    };
    return one(a >> 8) << 16 | one(a & 0xff);
  });
}

// cvt.pack.sat.{u16,s16}.s32 d, a, b and the 8-, 4- and 2-bit forms with c. imm: destination type, elements
void pack_int(Warp& w, const Insn& in, Mask m) {
  IntType to = int_type(in.imm[0]);
  const int32_t *a = src<int32_t>(w, in, 0), *b = src<int32_t>(w, in, 1);
  const uint32_t* c = in.nsrc > 2 ? src<uint32_t>(w, in, 2) : nullptr;
  uint32_t* d = dst<uint32_t>(w, in, 0);
  auto clamp = [&](int32_t v) {
    __int128 x = std::min(std::max(__int128(v), lowest(to)), highest(to));
    return uint32_t(x) & uint32_t((uint64_t(1) << to.bits) - 1);
  };
  each_lane(m, [&](int i) {
    uint32_t pair = clamp(a[i]) << to.bits | clamp(b[i]);
    d[i] = c ? c[i] << (2 * to.bits) | pair : pair;
  });
}

const Register conversions{
    {"cvt.int.int", int_to_int},
    {"cvt.float.float", float_to_float},
    {"cvt.float.int", float_to_int},
    {"cvt.int.float", int_to_float},
    {"cvt.pair", pack_pair},
    {"cvt.fp8x2.f32", float_to_fp8x2},
    {"cvt.fp8x2.f16x2", f16x2_to_fp8x2},
    {"cvt.f16x2.fp8x2", fp8x2_to_f16x2},
    {"cvt.pack", pack_int},
};

}  // namespace
}  // namespace ptx
