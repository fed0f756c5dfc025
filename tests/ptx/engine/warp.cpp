// Operations between the lanes of a warp.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

// Splits the executing lanes by the member mask they name and, when all its lanes have met, calls f(lanes).
// `mask_operand` is the index of the source with the mask.
template <class F>
void by_members(Warp& w, const Insn& in, Mask m, int mask_operand, F f) {
  const uint32_t* masks = src<uint32_t>(w, in, mask_operand);
  for (Mask left = m; left;) {
    int first = __builtin_ctz(left);
    uint32_t members = masks[first];
    Mask same = 0;
    each_lane(left, [&](int i) { same |= Mask(masks[i] == members) << i; });
    Mask outside = same & ~members;
    if (outside) {
      throw Fault{"warp operation by part of a warp",
                  format("executed by lane %d, which the mask 0x%08x does not name", __builtin_ctz(outside), members),
                  __builtin_ctz(outside)};
    }
    if (!gather_lanes(w, m, members)) return;
    left &= ~same;
  }
  for (Mask left = m; left;) {
    uint32_t members = masks[__builtin_ctz(left)];
    f(members & m);
    left &= ~members;
  }
}

// imm[0]: 0 up, 1 down, 2 bfly, 3 idx; destinations d (and p); sources a, b, c, mask
void shfl(Warp& w, const Insn& in, Mask m) {
  by_members(w, in, m, 3, [&](Mask lanes) {
    const uint32_t *a = src<uint32_t>(w, in, 0), *b = src<uint32_t>(w, in, 1), *c = src<uint32_t>(w, in, 2);
    uint32_t out[kLanes];
    Mask valid = 0, ok = 0, source_ok = defined(w, in, 0);
    each_lane(lanes, [&](int i) {
      int bval = b[i] & 31, cval = c[i] & 31, seg = c[i] >> 8 & 31;
      int max_lane = (i & seg) | (cval & ~seg), min_lane = i & seg, j;
      bool p;
      switch (in.imm[0]) {
        case 0:
          j = i - bval;
          p = j >= max_lane;
          break;
        case 1:
          j = i + bval;
          p = j <= max_lane;
          break;
        case 2:
          j = i ^ bval;
          p = j <= max_lane;
          break;
        default:
          j = min_lane | (bval & ~seg);
          p = j <= max_lane;
      }
      if (!p) j = i;
      if (!(lanes >> j & 1))
        throw Fault{"warp operation by part of a warp", format("lane %d reads lane %d, which does not take part", i, j),
                    i};
      out[i] = a[j];
      ok |= (source_ok >> j & 1u) << i;
      valid |= Mask(p) << i;
    });
    uint32_t* d = dst<uint32_t>(w, in, 0);
    each_lane(lanes, [&](int i) { d[i] = out[i]; });
    mark_defined(w, in.ops[0], lanes, ok);
    if (in.ndst > 1) set_pred(w, in.ops[1], lanes, valid);
  });
}

// imm[0]: 0 all, 1 any, 2 uni, 3 ballot; imm[1]: predicate negated
void vote(Warp& w, const Insn& in, Mask m) {
  by_members(w, in, m, 1, [&](Mask lanes) {
    Mask p = pred(w, in.ops[in.ndst]);
    if (in.imm[1]) p = ~p;
    if (lanes & ~defined(w, in, 0))
      throw Fault{"uninitialised register", "the predicate of a vote is undefined",
                  __builtin_ctz(lanes & ~defined(w, in, 0))};
    p &= lanes;
    if (in.imm[0] == 3) {
      uint32_t* d = dst<uint32_t>(w, in, 0);
      each_lane(lanes, [&](int i) { d[i] = p; });
      return;
    }
    bool r = in.imm[0] == 0 ? p == lanes : in.imm[0] == 1 ? p != 0 : p == 0 || p == lanes;
    set_pred(w, in.ops[0], lanes, r ? kAll : 0);
  });
}

// imm[0]: all; imm[1]: bytes
void match(Warp& w, const Insn& in, Mask m) {
  by_members(w, in, m, 1, [&](Mask lanes) {
    auto value = [&](int i) { return in.imm[1] == 8 ? src<uint64_t>(w, in, 0)[i] : src<uint32_t>(w, in, 0)[i]; };
    Mask same[kLanes];
    each_lane(lanes, [&](int i) {
      same[i] = 0;
      each_lane(lanes, [&](int j) { same[i] |= Mask(value(i) == value(j)) << j; });
    });
    uint32_t* d = dst<uint32_t>(w, in, 0);
    bool all = same[__builtin_ctz(lanes)] == lanes;
    each_lane(lanes, [&](int i) { d[i] = in.imm[0] ? (all ? lanes : 0) : same[i]; });
    if (in.ndst > 1) set_pred(w, in.ops[1], lanes, all ? kAll : 0);
  });
}

// imm[0]: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; imm[1]: signed
void redux(Warp& w, const Insn& in, Mask m) {
  by_members(w, in, m, 1, [&](Mask lanes) {
    const uint32_t* a = src<uint32_t>(w, in, 0);
    uint32_t r = a[__builtin_ctz(lanes)];
    each_lane(lanes & (lanes - 1), [&](int i) {
      uint32_t x = a[i];
      bool less = in.imm[1] ? int32_t(x) < int32_t(r) : x < r;
      switch (in.imm[0]) {
        case 0:
          r += x;
          break;
        case 1:
          r = less ? x : r;
          break;
        case 2:
          r = less ? r : x;
          break;
        case 3:
          r &= x;
          break;
        case 4:
          r |= x;
          break;
        default:
          r ^= x;
      }
    });
    uint32_t* d = dst<uint32_t>(w, in, 0);
    each_lane(lanes, [&](int i) { d[i] = r; });
  });
}

// d|p: the leader's lane, and whether this is the leader
void elect(Warp& w, const Insn& in, Mask m) {
  by_members(w, in, m, 0, [&](Mask lanes) {
    int leader = __builtin_ctz(lanes);
    uint32_t* d = dst<uint32_t>(w, in, 0);
    each_lane(lanes, [&](int i) { d[i] = uint32_t(leader); });
    set_pred(w, in.ops[1], lanes, 1u << leader);
  });
}

void activemask(Warp& w, const Insn& in, Mask m) {
  uint32_t* d = dst<uint32_t>(w, in, 0);
  each_lane(m, [&](int i) { d[i] = m; });
}
void warp_sync(Warp& w, const Insn& in, Mask m) {
  by_members(w, in, m, 0, [&](Mask) { w.meetings++; });
}

const Register handlers{{"shfl", shfl},
                        {"vote", vote},
                        {"match", match},
                        {"redux", redux},
                        {"elect", elect},
                        {"activemask", activemask},
                        {"bar.warp.sync", warp_sync}};

}  // namespace
}  // namespace ptx
