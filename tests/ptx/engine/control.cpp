// Branches, exits, block barriers and fences.
#include <algorithm>

#include "memory.h"

namespace ptx {
namespace {

// imm[0]: target
void bra(Warp& w, const Insn& in, Mask m) { branch(w, m, uint32_t(in.imm[0])); }

// Unlike others, an indexed branch may split a group into many: each target is one more split.
// imm[0]: index of the first of imm[1] targets, which the decoder stores as `bra` instructions
void brx(Warp& w, const Insn& in, Mask m) {
  const uint32_t* index = src<uint32_t>(w, in, 0);
  each_lane(m, [&](int i) {
    if (index[i] >= uint64_t(in.imm[1]))
      throw Fault{"out of range",
                  format("branch index %u of %lld targets", index[i], static_cast<long long>(in.imm[1])), i};
  });
  uint32_t first = index[__builtin_ctz(m)];
  Mask same = 0;
  each_lane(m, [&](int i) { same |= Mask(index[i] == first) << i; });
  uint32_t target = uint32_t(w.launch->code[in.imm[0] + first].imm[0]);
  if (same == m) {
    branch(w, m, target);
    return;
  }
  // the lanes with another index run this instruction again
  w.groups.push_back({w.at, m & ~same, GroupState::kReady, 0});
  w.active &= ~(m & ~same);
  branch(w, same, target);
}

void exit_threads(Warp& w, const Insn&, Mask m) { exit_lanes(w, m); }
void trap(Warp&, const Insn&, Mask m) { throw Fault{"trap", "the kernel executed trap", __builtin_ctz(m)}; }
void assert_fail(Warp&, const Insn&, Mask m) {
  throw Fault{"device assertion", "assert() failed in the kernel", __builtin_ctz(m)};
}
void sleep(Warp& w, const Insn&, Mask) { yield(w); }
void nothing(Warp&, const Insn&, Mask) {}

enum BarrierKind { kSync, kArrive, kRedPopc, kRedAnd, kRedOr };

// imm[0]: BarrierKind; imm[1]: aligned; imm[2]: a thread count is given; imm[3]: the predicate of .red is negated
void barrier(Warp& w, const Insn& in, Mask m) {
  auto kind = BarrierKind(in.imm[0]);
  bool aligned = in.imm[1], counted = in.imm[2];
  uint32_t id = src<uint32_t>(w, in, 0)[__builtin_ctz(m)];
  if (id > 15) throw Fault{"out of range", format("barrier %u of 16", id), __builtin_ctz(m)};
  if (aligned && !gather_lanes(w, m, live_lanes(w))) return;
  if (m != w.active)
    throw Fault{"barrier reached by part of a warp", "a barrier under a guard that differs between lanes",
                __builtin_ctz(m)};
  const Launch& l = *w.launch;
  int expected = l.threads, arriving = __builtin_popcount(m);
  if (counted) {
    expected = int(src<uint32_t>(w, in, 1)[__builtin_ctz(m)]);
    if (expected % kLanes || expected == 0 || expected > l.nwarps * kLanes)
      throw Fault{"invalid operand", format("barrier count %d in a block of %d threads", expected, l.threads),
                  __builtin_ctz(m)};
    arriving = kLanes;
    // a barrier counts warps: lanes that do not exist count as arrived, lanes that have exited do not
    if (m != w.exists) arriving = __builtin_popcount(m);
  }
  BarrierState& b = w.block->barriers[id];
  if (b.arrived && b.expected != expected)
    throw Fault{"invalid operand",
                format("barrier %u with count %d, others arrived with count %d", id, expected, b.expected),
                __builtin_ctz(m)};
  b.expected = expected;
  b.arrived += arriving;
  if (b.arrived > expected)
    throw Fault{"invalid operand", format("more than %d threads at barrier %u", expected, id), __builtin_ctz(m)};
  if (kind >= kRedPopc) {
    Mask p = pred(w, in.ops[in.ndst + in.nsrc - 1]);
    if (in.imm[3]) p = ~p;
    p &= m;
    b.reduce_count += __builtin_popcount(p);
    b.reduce_and = b.reduce_and && p == m;
    b.reduce_or = b.reduce_or || p;
    b.deliveries.push_back({&w, m, &in});
  }
  b.acc.join(w.vc);
  if (l.uses_async) b.acc_proxy.join(w.proxy);
  tick(w);
  if (kind != kArrive) {
    b.waiting.push_back({&w, m});
    park(w, GroupState::kBarrier, int(id));
  }
  if (b.arrived < expected) return;
  for (auto& [waiter, lanes] : b.waiting) {
    acquire_from(*waiter, b.acc);
    waiter->meetings++;
    if (l.uses_async) waiter->proxy.join(b.acc_proxy);
    release_group(*waiter, lanes);
  }
  for (auto& d : b.deliveries) {
    Operand o = d.insn->ops[0];
    if (d.insn->imm[0] == kRedPopc)
      each_lane(d.lanes, [&](int i) { reg<uint32_t>(*d.warp, o)[i] = b.reduce_count; });
    else
      set_pred(*d.warp, o, d.lanes, d.insn->imm[0] == kRedAnd ? (b.reduce_and ? kAll : 0) : (b.reduce_or ? kAll : 0));
  }
  b = BarrierState();
  w.launch->progress++;
}

void memory_fence(Warp& w, const Insn& in, Mask) { fence(w, scope_of(in), order_of(in)); }
// fence.proxy.async: what happened before now is visible to the async proxy
void proxy_fence(Warp& w, const Insn&, Mask) { w.proxy.join(w.vc); }

const Register handlers{
    {"bra", bra},
    {"brx", brx},
    {"exit", exit_threads},
    {"trap", trap},
    {"assertfail", assert_fail},
    {"nanosleep", sleep},
    {"nop", nothing},
    {"barrier", barrier},
    {"fence", memory_fence},
    {"fence.proxy.async", proxy_fence},
};

}  // namespace
}  // namespace ptx
