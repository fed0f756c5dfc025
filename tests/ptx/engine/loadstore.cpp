// ld, st, atom, red and address conversion.
#include <algorithm>
#include <cmath>

#include "memory.h"
#include "numeric.h"

namespace ptx {
namespace {

struct Shape {
  int element, count;
  bool is_signed;
  int reg;
};
// imm[1] of loads and stores: element bytes | signed << 8 | register bytes << 16; the element count is that of the
// operands
Shape shape(const Insn& in, int count) {
  return {int(in.imm[1] & 0xff), count, bool(in.imm[1] >> 8 & 1), int(in.imm[1] >> 16 & 0xff)};
}

void to_register(const Warp& w, Operand o, int lane, const uint8_t* data, const Shape& s) {
  char* p = at(w, o) + lane * s.reg;
  if (s.element >= s.reg) {
    std::memcpy(p, data, s.reg);
    return;
  }
  uint64_t v = 0;
  std::memcpy(&v, data, s.element);
  if (s.is_signed && v >> (8 * s.element - 1) & 1) v |= ~uint64_t(0) << (8 * s.element);
  std::memcpy(p, &v, s.reg);
}

void check_address(Warp& w, const Insn& in, Mask m) {
  Mask ok = defined(w, in, 0);
  if (m & ~ok) undefined_operand("the address", m & ~ok);
}

void load(Warp& w, const Insn& in, Mask m) {
  check_address(w, in, m);
  Shape s = shape(in, in.ndst);
  int bytes = s.element * s.count;
  uint64_t addr[kLanes];
  Space space = space_of(in);
  addresses(w, in, 0, in.imm[0], addr);
  Places places;
  locate_lanes(w, m, addr, space, bytes, false, places);
  Order order = order_of(in);
  note_reads(w, m, places, bytes, actor_of(in));
  if (order == kWeak) each_lane(m, [&](int i) { note_lane_read(w, i, places.lane[i], bytes); });
  if (reads_constant(in)) each_lane(m, [&](int i) { note_constant(w, i, places.lane[i], bytes); });
  Traffic traffic(w, bytes);
  Mask undefined = 0;
  each_lane(m, [&](int i) {
    const Place& p = places.lane[i];
    traffic.add(p, false);
    uint8_t any = 0;
    for (int b = 0; b < bytes; b++) any |= p.state[b];
    if (any) {
      // padding of structures is copied through local memory, and undefined values may rest in shared memory
      if (p.region && any != kUndefinedValue) require_defined(i, p, bytes);
      undefined |= 1u << i;
    }
    for (int k = 0; k < s.count; k++) to_register(w, in.ops[k], i, p.data + k * s.element, s);
  });
  if (undefined) {
    each_lane(undefined & m, [&](int i) {
      for (int k = 0; k < s.count; k++) {
        const uint8_t* st = places.lane[i].state + k * s.element;
        if (std::any_of(st, st + s.element, [](uint8_t x) { return x != 0; })) w.init[in.ops[k].reg] &= ~(1u << i);
      }
    });
  }
  if (order != kWeak) {
    each_lane(m, [&](int i) {
      if (places.lane[i].region)
        strong_access(w, places.lane[i].region->base + places.lane[i].offset, places.lane[i].region, scope_of(in),
                      order, true, false);
    });
    yield(w);  // maybe a spin: let others run
  }
  w.launch->counters[w.at].bytes += uint64_t(bytes) * __builtin_popcount(m);
}

void load_param(Warp& w, const Insn& in, Mask m) {
  Shape s = shape(in, in.ndst);
  each_lane(m, [&](int i) {
    Place p = locate(w, i, kParamWindow + in.imm[0], kParam, s.element * s.count, false, s.element);
    for (int k = 0; k < s.count; k++) to_register(w, in.ops[k], i, p.data + k * s.element, s);
  });
}

void store(Warp& w, const Insn& in, Mask m) {
  check_address(w, in, m);
  Shape s = shape(in, in.nsrc - 1);
  int bytes = s.element * s.count;
  uint64_t addr[kLanes];
  Space space = space_of(in);
  addresses(w, in, 0, in.imm[0], addr);
  Places places;
  locate_lanes(w, m, addr, space, bytes, true, places);
  Actor who = actor_of(in);
  Traffic traffic(w, bytes);
  Mask ok = m;
  for (int k = 0; k < s.count; k++) ok &= defined(w, in, k + 1);
  alignas(16) uint8_t values[kLanes][32];
  each_lane(m, [&](int i) {
    const Place& p = places.lane[i];
    traffic.add(p, true);
    for (int k = 0; k < s.count; k++)
      std::memcpy(values[i] + k * s.element, at(w, in.ops[k + 1]) + i * s.reg, s.element);
    if (p.region && p.region->space == kGlobal && !(ok >> i & 1))
      throw Fault{"uninitialised register",
                  access_name("write", bytes, *p.region, p.offset) + ": the value is undefined", i};
    note_write(w, i, p, bytes, who, values[i]);
    if (!who.flags) note_lane_write(w, i, p, bytes);
    std::memcpy(p.data, values[i], bytes);
    if (ok >> i & 1) {
      std::memset(p.state, kDefined, bytes);
    } else {
      for (int k = 0; k < s.count; k++)
        std::memset(p.state + k * s.element, defined(w, in, k + 1) >> i & 1 ? kDefined : kUndefinedValue, s.element);
    }
  });
  // one of them wins, and the ISA does not say which: no race, but worth knowing
  bool conflict = false;
  each_lane(
      m, [&](int i) { conflict |= places.lane[i].region && std::memcmp(places.lane[i].data, values[i], bytes) != 0; });
  if (conflict) w.launch->lane_conflicts[w.at]++;
  if (who.flags) {
    each_lane(m, [&](int i) {
      if (places.lane[i].region)
        strong_access(w, places.lane[i].region->base + places.lane[i].offset, places.lane[i].region, scope_of(in),
                      order_of(in), false, true);
    });
  }
  w.launch->counters[w.at].bytes += uint64_t(bytes) * __builtin_popcount(m);
}

enum AtomOp { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };
enum AtomType { kU32, kS32, kU64, kS64, kF32, kF64, kF16, kBf16, kF16x2, kBf16x2 };

template <class T>
T integer_atom(AtomOp op, T old, T b, T c) {
  switch (op) {
    case kAdd:
      return T(uint64_t(old) + uint64_t(b));
    case kMin:
      return std::min(old, b);
    case kMax:
      return std::max(old, b);
    case kInc:
      return old >= b ? T(0) : old + 1;
    case kDec:
      return old == 0 || old > b ? b : old - 1;
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kExch:
      return b;
    default:
      return old == b ? c : old;
  }
}
template <class T>
uint64_t as_bits(T x) {
  uint64_t u = 0;
  std::memcpy(&u, &x, sizeof x);
  return u;
}
template <class Format16>
uint16_t narrow_atom(AtomOp op, uint16_t old, uint16_t b) {
  float x = Format16::load(old), y = Format16::load(b);
  return Format16::store(op == kMin ? std::fmin(x, y) : op == kMax ? std::fmax(x, y) : x + y);
}
uint64_t atom_result(AtomOp op, AtomType type, uint64_t old, uint64_t b, uint64_t c) {
  switch (type) {
    case kU32:
      return integer_atom<uint32_t>(op, uint32_t(old), uint32_t(b), uint32_t(c));
    case kS32:
      return uint32_t(integer_atom<int32_t>(op, int32_t(old), int32_t(b), int32_t(c)));
    case kU64:
      return integer_atom<uint64_t>(op, old, b, c);
    case kS64:
      return uint64_t(integer_atom<int64_t>(op, int64_t(old), int64_t(b), int64_t(c)));
    case kF32: {  // atom.global.add.f32 flushes subnormals on some paths; the ISA leaves it to the space, here they are
                  // kept
      float x = bits<float>(uint32_t(old)), y = bits<float>(uint32_t(b));
      return as_bits(canonical(x + y));
    }
    case kF64:
      return as_bits(bits<double>(old) + bits<double>(b));
    case kF16:
      return narrow_atom<Half>(op, uint16_t(old), uint16_t(b));
    case kBf16:
      return narrow_atom<Brain>(op, uint16_t(old), uint16_t(b));
    case kF16x2:
      return narrow_atom<Half>(op, uint16_t(old), uint16_t(b)) |
             uint64_t(narrow_atom<Half>(op, uint16_t(old >> 16), uint16_t(b >> 16))) << 16;
    default:
      return narrow_atom<Brain>(op, uint16_t(old), uint16_t(b)) |
             uint64_t(narrow_atom<Brain>(op, uint16_t(old >> 16), uint16_t(b >> 16))) << 16;
  }
}

// atom and red, scalar and vector. imm[1]: bytes | op << 8 | type << 16 | elements << 24; results first if there are
// any
void atomic(Warp& w, const Insn& in, Mask m) {
  Mask ok = m;
  for (int k = 0; k < in.nsrc; k++) ok &= defined(w, in, k);
  if (ok != m) undefined_operand("an operand of the atomic", m & ~ok);
  int element = in.imm[1] & 0xff, count = in.imm[1] >> 24 & 0xff, bytes = element * count;
  AtomOp op = AtomOp(in.imm[1] >> 8 & 0xff);
  AtomType type = AtomType(in.imm[1] >> 16 & 0xff);
  uint64_t addr[kLanes];
  Space space = space_of(in);
  addresses(w, in, 0, in.imm[0], addr);
  Places places;
  locate_lanes(w, m, addr, space, bytes, true, places);
  Actor who = actor_of(in);
  Traffic traffic(w, bytes);
  uint64_t before = w.launch->progress, changed = 0;
  each_lane(m, [&](int i) {
    Place& p = places.lane[i];
    if (!p.region) throw Fault{"wrong space", "atomic on local memory", i};
    traffic.add(p, true);
    require_defined(i, p, bytes);
    note_write(w, i, p, bytes, who, nullptr);
    if (p.region->writes) strong_access(w, p.region->base + p.offset, p.region, scope_of(in), order_of(in), true, true);
    for (int k = 0; k < count; k++) {
      uint64_t old = 0, b = 0, c = 0;
      std::memcpy(&old, p.data + k * element, element);
      std::memcpy(&b, at(w, in.ops[in.ndst + 1 + k]) + i * element, element);
      if (op == kCas) std::memcpy(&c, at(w, in.ops[in.ndst + 2]) + i * element, element);
      uint64_t v = atom_result(op, type, old, b, c);
      std::memcpy(p.data + k * element, &v, element);
      if (in.ndst) std::memcpy(at(w, in.ops[k]) + i * element, &old, element);
      changed += v != old;
    }
  });
  w.launch->progress = before + changed;
  if (in.ndst) yield(w);  // maybe a spin on a lock
  w.launch->counters[w.at].bytes += uint64_t(bytes) * __builtin_popcount(m);
}

// atom.{exch,cas}.b128
void atomic128(Warp& w, const Insn& in, Mask m) {
  uint64_t addr[kLanes];
  addresses(w, in, 0, in.imm[0], addr);
  bool cas = in.nsrc == 3;
  each_lane(m, [&](int i) {
    Place p = locate(w, i, addr[i], space_of(in), 16, true, 16);
    require_defined(i, p, 16);
    note_write(w, i, p, 16, actor_of(in), nullptr);
    if (p.region->writes) strong_access(w, p.region->base + p.offset, p.region, scope_of(in), order_of(in), true, true);
    char old[16];
    std::memcpy(old, p.data, 16);
    if (!cas || std::memcmp(old, at(w, in.ops[in.ndst + 1]) + i * 16, 16) == 0)
      std::memcpy(p.data, at(w, in.ops[in.ndst + (cas ? 2 : 1)]) + i * 16, 16);
    std::memcpy(at(w, in.ops[0]) + i * 16, old, 16);
  });
  yield(w);
}

// cvta: imm[0] is what to add
void convert_address(Warp& w, const Insn& in, Mask m) {
  uint64_t delta = uint64_t(in.imm[0]);
  map1<uint64_t, uint64_t>(w, in, m, [delta](uint64_t a) { return a + delta; });
}
// isspacep: imm[0] is the space
void is_space(Warp& w, const Insn& in, Mask m) {
  const uint64_t* a = src<uint64_t>(w, in, 0);
  Mask r = 0;
  each_lane(m, [&](int i) {
    uint64_t window = a[i] >> kWindowShift;
    const auto& windows = w.launch->windows;
    Space s = kGlobal;
    if (window == kSharedWindow >> kWindowShift)
      s = kShared;
    else if (window == kLocalWindow >> kWindowShift)
      s = kLocal;
    else if (window < windows.size() && windows[window])
      s = windows[window]->space;
    r |= Mask(s == Space(in.imm[0])) << i;
  });
  set_pred(w, in.ops[0], m, r);
}
// prefetch and its like only have to be addressable
void prefetch(Warp& w, const Insn& in, Mask m) { check_address(w, in, m); }

const Register handlers{{"ld", load},           {"ld.param", load_param}, {"st", store},
                        {"atom", atomic},       {"atom.128", atomic128},  {"cvta", convert_address},
                        {"isspacep", is_space}, {"prefetch", prefetch}};

}  // namespace
}  // namespace ptx
