// Runs blocks, warps and the groups of diverged lanes; finds out when nothing can go on.
#include <algorithm>

#include "memory.h"

namespace ptx {

namespace {

constexpr int kQuantum = 4096;                      // instructions a turn
constexpr int kIdleSweeps = 512;                    // sweeps of polling in which no memory changed: a deadlock
constexpr uint64_t kIdleInstructions = 40'000'000;  // warp instructions without any store: an endless loop

void find_reconvergence(Warp& w) {
  w.reconverge_pc = kNoPc;
  for (const Group& g : w.groups)
    if (g.state != GroupState::kBarrier && g.pc > w.pc) w.reconverge_pc = std::min(w.reconverge_pc, g.pc);
}

void merge_here(Warp& w) {
  for (size_t i = 0; i < w.groups.size();) {
    if (w.groups[i].state != GroupState::kBarrier && w.groups[i].pc == w.pc) {
      w.active |= w.groups[i].mask;
      w.groups.erase(w.groups.begin() + i);
    } else {
      i++;
    }
  }
}

int smallest_ready(const Warp& w) {
  int best = -1;
  for (size_t i = 0; i < w.groups.size(); i++)
    if (w.groups[i].state == GroupState::kReady && (best < 0 || w.groups[i].pc < w.groups[best].pc)) best = int(i);
  return best;
}

void make_current(Warp& w, int i) {
  w.pc = w.groups[i].pc;
  w.active = w.groups[i].mask;
  w.groups.erase(w.groups.begin() + i);
  merge_here(w);
  find_reconvergence(w);
}

// The lanes behind run first, so that lanes that took different ways meet again at the earliest instruction they share.
void select_group(Warp& w) {
  int i = smallest_ready(w);
  if (i < 0) {
    w.active = 0;
    w.budget = 0;
    w.reconverge_pc = kNoPc;
    return;
  }
  make_current(w, i);
}

void reconverge(Warp& w) {
  merge_here(w);
  int i = smallest_ready(w);
  if (i >= 0 && w.groups[i].pc < w.pc) {
    w.groups.push_back({w.pc, w.active, GroupState::kReady, 0});
    make_current(w, i);
  } else {
    find_reconvergence(w);
  }
}

// A group that may be spinning gives way to the others of its warp, whatever their position.
void rotate(Warp& w) {
  for (size_t i = 0; i < w.groups.size(); i++) {
    if (w.groups[i].state != GroupState::kReady) continue;
    Group current{w.pc, w.active, GroupState::kReady, 0};
    make_current(w, int(i));
    w.groups.push_back(current);
    find_reconvergence(w);
    return;
  }
}

// Registers of a wgmma belong to it until wgmma.wait_group.
void check_in_flight(Warp& w, const Insn& in) {
  auto fail = [](const char* what) {
    throw Fault{"asynchronous operation not waited for",
                std::string(what) + " a wgmma that wgmma.wait_group has not waited for"};
  };
  for (int k = 0; k < in.ndst + in.nsrc; k++) {
    if (w.accumulator_of[in.ops[k].reg] > w.wgmma_done) fail(k < in.ndst ? "writes a result of" : "reads a result of");
    if (k < in.ndst && w.source_of[in.ops[k].reg] > w.wgmma_done) fail("writes a source of");
  }
}

void run_warp(Warp& w) {
  Launch& l = *w.launch;
  if (w.yielded && w.active && !w.groups.empty()) rotate(w);
  w.yielded = false;
  w.budget = kQuantum;
  if (!w.active) select_group(w);
  const Insn* code = l.code.data();
  Counters* counters = l.counters.data();
  while (w.budget-- > 0) {
    if (w.pc >= w.reconverge_pc) reconverge(w);
    const Insn& in = code[w.pc];
    w.at = w.pc++;
    Mask m = w.active;
    l.executed++;
    if (in.guard_off != kNoPc) {
      Mask undefined = m & ~w.init[in.guard_reg];
      if (undefined)
        throw Fault{"uninitialised register", "the guard predicate is undefined", __builtin_ctz(undefined)};
      Mask p = *reinterpret_cast<const uint32_t*>(w.regs + in.guard_off);
      m &= in.guard_negated ? ~p : p;
    }
    Counters& c = counters[w.at];
    c.warps++;
    if (!m) continue;
    c.threads += __builtin_popcount(m);
    const Operand* ops = in.ops;
    const int nd = in.ndst, n = nd + in.nsrc;
    if (l.uses_wgmma && !(in.flags & kAsync)) {
      check_in_flight(w, in);
      for (int k = 0; k < nd; k++) w.written_after[ops[k].reg] = w.fences;
    }
    Mask ok = m;
    if (in.policy != kCustom) {
      for (int k = nd; k < n; k++) ok &= w.init[ops[k].reg];
      if (in.policy == kStrict && ok != m)
        throw Fault{"uninitialised register", "a source operand is undefined", __builtin_ctz(m & ~ok)};
    }
    for (int k = 0; k < nd; k++) w.init[ops[k].reg] = (w.init[ops[k].reg] & ~m) | ok;
    in.fn(w, in, m);
  }
  l.now += 100;
}

bool can_run(const Warp& w) { return !w.done && (w.active || smallest_ready(w) >= 0); }

void fill_special(Warp& w, int which, uint32_t* out) {
  const Launch& l = *w.launch;
  const Block& b = *w.block;
  for (int i = 0; i < kLanes; i++) {
    uint32_t thread = w.index * kLanes + i, lane_bit = 1u << i;
    switch (which) {
      case kTidX:
        out[i] = thread % l.block[0];
        break;
      case kTidY:
        out[i] = thread / l.block[0] % l.block[1];
        break;
      case kTidZ:
        out[i] = thread / l.block[0] / l.block[1];
        break;
      case kNtidX:
      case kNtidY:
      case kNtidZ:
        out[i] = l.block[which - kNtidX];
        break;
      case kCtaidX:
      case kCtaidY:
      case kCtaidZ:
        out[i] = b.id[which - kCtaidX];
        break;
      case kNctaidX:
      case kNctaidY:
      case kNctaidZ:
        out[i] = l.grid[which - kNctaidX];
        break;
      case kLaneid:
        out[i] = i;
        break;
      case kWarpid:
        out[i] = w.index;
        break;
      case kNwarpid:
        out[i] = l.nwarps;
        break;
      case kSmid:
        out[i] = b.linear % l.sms;
        break;
      case kNsmid:
        out[i] = l.sms;
        break;
      case kGridid:
      case kZero:
        out[i] = 0;
        break;
      case kOne:
        out[i] = 1;
        break;
      case kLanemaskEq:
        out[i] = lane_bit;
        break;
      case kLanemaskLe:
        out[i] = lane_bit | (lane_bit - 1);
        break;
      case kLanemaskLt:
        out[i] = lane_bit - 1;
        break;
      case kLanemaskGe:
        out[i] = ~(lane_bit - 1);
        break;
      case kLanemaskGt:
        out[i] = ~(lane_bit | (lane_bit - 1));
        break;
      case kDynamicSmem:
        out[i] = l.total_shared - l.static_shared;
        break;
      case kTotalSmem:
        out[i] = l.total_shared;
        break;
      case kEnvreg1:
        out[i] = l.envreg[1];
        break;
      case kEnvreg2:
        out[i] = l.envreg[2];
        break;
    }
  }
}

std::unique_ptr<Block> start_block(Launch& l, uint32_t linear) {
  auto b = std::make_unique<Block>();
  b->launch = &l;
  b->linear = linear;
  b->id[0] = linear % l.grid[0];
  b->id[1] = linear / l.grid[0] % l.grid[1];
  b->id[2] = linear / l.grid[0] / l.grid[1];
  Region& s = b->shared;
  s.base = kSharedWindow;
  s.size = l.total_shared;
  s.owned.assign(s.size + 16, 0);
  s.data = s.owned.data();
  s.space = kShared;
  s.name = "shared memory";
  s.pool = &b->pool;
  s.make_shadow(kUnwritten, l.nwarps > 1 || l.uses_async, l.granule_shift_shared);
  b->files.assign(size_t(l.file_bytes) * l.nwarps + 64, 0);
  b->inits.assign(size_t(l.nregs) * l.nwarps, 0);
  b->warps.resize(l.nwarps);
  char* files = b->files.data() + (64 - reinterpret_cast<uintptr_t>(b->files.data()) % 64) % 64;
  for (int i = 0; i < l.nwarps; i++) {
    Warp& w = b->warps[i];
    w.regs = files + size_t(l.file_bytes) * i;
    w.consts = l.consts.data();
    w.init = b->inits.data() + size_t(l.nregs) * i;
    w.init[0] = kAll;
    w.block = b.get();
    w.launch = &l;
    w.index = i;
    int lanes = std::min(kLanes, l.threads - i * kLanes);
    w.exists = w.active = lanes == kLanes ? kAll : (1u << lanes) - 1;
    for (auto [which, reg_index, off] : l.specials) {
      fill_special(w, which, reinterpret_cast<uint32_t*>(w.regs + off));
      w.init[reg_index] = kAll;
    }
    w.vc.local.assign(kAgentKinds * l.nwarps, 0);
    w.vc.local[i] = 1;
    w.proxy.local.assign(kAgentKinds * l.nwarps, 0);
    std::fill(std::begin(w.sequence), std::end(w.sequence), 1);
    w.local.assign(size_t(l.local_bytes) * kLanes, 0);
    w.local_state.assign(size_t(l.local_bytes) * kLanes, kUnwritten);
    if (l.uses_wgmma) {
      w.accumulator_of.assign(l.nregs, 0);
      w.source_of.assign(l.nregs, 0);
      w.written_after.assign(l.nregs, 0);
    }
  }
  return b;
}

std::string where(const Warp& w, uint32_t pc) {
  const Block& b = *w.block;
  return format("block (%u,%u,%u) warp %d at PTX line %u", b.id[0], b.id[1], b.id[2], w.index, w.launch->code[pc].line);
}

// Names what everything waits for. Throws the fault, at the place of the first that waits.
void deadlock(Launch& l, std::vector<std::unique_ptr<Block>>& resident, bool endless) {
  std::string text;
  std::string kind = "deadlock";
  int listed = 0;
  Warp* first = nullptr;
  bool running = false;
  for (auto& b : resident)
    for (Warp& w : b->warps) running |= can_run(w);
  for (auto& b : resident) {
    for (Warp& w : b->warps) {
      if (w.done) continue;
      auto list = [&](uint32_t pc, const std::string& why) {
        if (!first) {
          first = &w;
          w.at = pc;
        }
        if (listed++ < 6) text += "\n  " + where(w, pc) + ": " + why;
      };
      for (const Group& g : w.groups) {
        if (g.state == GroupState::kBarrier) {
          const BarrierState& s = b->barriers[g.barrier];
          if (b->exited_threads && !running) kind = "barrier reached by part of the block";
          list(g.pc - 1, format("waits at barrier %d, %d of %d threads arrived, %d of the block exited", g.barrier,
                                s.arrived, s.expected, b->exited_threads));
        } else if (g.state == GroupState::kWarpSync) {
          if (!running)
            kind = l.code[g.pc].is_barrier ? "barrier reached by part of a warp" : "warp operation by part of a warp";
          list(g.pc, format("lanes 0x%08x wait for the other lanes that the mask names", g.mask));
        } else if (!w.active) {
          list(g.pc, "can run");
        }
      }
      if (w.active) list(w.at, endless ? "loops without any store" : "polls memory that nothing changes");
    }
  }
  if (listed > 6) text += format("\n  and %d more", listed - 6);
  for (int i = 0; i < 3; i++) l.fault_block[i] = first->block->id[i];
  l.fault_pc = first->at;
  l.failed = true;
  uint32_t t = first->index * kLanes;
  l.fault_thread[0] = t % l.block[0];
  l.fault_thread[1] = t / l.block[0] % l.block[1];
  l.fault_thread[2] = t / l.block[0] / l.block[1];
  l.fault = {kind, "nothing can go on:" + text, -1};
}

void record_fault(Launch& l, const Warp& w, const Fault& f) {
  l.failed = true;
  l.fault = f;
  l.fault_pc = w.at;
  int lane = f.lane >= 0 ? f.lane : w.active ? __builtin_ctz(w.active) : 0;
  uint32_t t = w.index * kLanes + lane;
  for (int i = 0; i < 3; i++) l.fault_block[i] = w.block->id[i];
  l.fault_thread[0] = t % l.block[0];
  l.fault_thread[1] = t / l.block[0] % l.block[1];
  l.fault_thread[2] = t / l.block[0] / l.block[1];
}

}  // namespace

void park(Warp& w, GroupState state, int barrier) {
  w.groups.push_back({state == GroupState::kWarpSync ? w.at : w.pc, w.active, state, barrier});
  select_group(w);
}

void release_group(Warp& w, Mask lanes) {
  for (Group& g : w.groups)
    if (g.state == GroupState::kBarrier && g.mask & lanes) g.state = GroupState::kReady;
}

void branch(Warp& w, Mask taken, uint32_t target) {
  if (taken == w.active) {
    w.pc = target;
  } else {
    Mask rest = w.active & ~taken;
    w.launch->counters[w.at].divergent++;
    if (target < w.pc) {
      w.groups.push_back({w.pc, rest, GroupState::kReady, 0});
      w.pc = target;
      w.active = taken;
    } else {
      w.groups.push_back({target, taken, GroupState::kReady, 0});
      w.active = rest;
    }
  }
  if (!w.groups.empty()) reconverge(w);
}

void exit_lanes(Warp& w, Mask lanes) {
  w.exited |= lanes;
  w.active &= ~lanes;
  w.block->exited_threads += __builtin_popcount(lanes);
  w.launch->progress++;
  for (const Group& g : w.groups)
    if (g.state == GroupState::kWarpSync && !w.active) {
      // a lane that waits for one that has exited is found when its instruction runs again
      for (Group& other : w.groups)
        if (other.state == GroupState::kWarpSync) other.state = GroupState::kReady;
      break;
    }
  if (w.active) return;
  if (w.groups.empty()) {
    w.done = true;
    w.budget = 0;
    w.block->finished_warps++;
    return;
  }
  select_group(w);
}

bool gather_lanes(Warp& w, Mask executing, Mask members) {
  Mask missing = members & ~executing;
  if (!missing) return true;
  Mask gone = missing & ~live_lanes(w);
  if (gone) {
    throw Fault{"warp operation by part of a warp",
                format("the mask 0x%08x names lane %d, which %s", members, __builtin_ctz(gone),
                       w.exists >> __builtin_ctz(gone) & 1 ? "has exited" : "does not exist"),
                -1};
  }
  if (executing != w.active)
    throw Fault{
        "warp operation by part of a warp",
        format("the mask 0x%08x names lane %d, whose guard is false", members, __builtin_ctz(missing & w.active)), -1};
  // undo what the main loop did before calling: the instruction runs again when the lanes have met
  park(w, GroupState::kWarpSync, 0);
  return false;
}

void run_launch(Launch& l) {
  std::vector<std::unique_ptr<Block>> resident;
  size_t next = 0;
  size_t limit = std::max(l.resident, 1);
  if (l.cooperative)
    while (next < l.order.size()) resident.push_back(start_block(l, l.order[next++]));
  int idle_sweeps = 0;
  uint64_t progress_seen = l.progress, executed_then = 0;
  while (!resident.empty() || next < l.order.size()) {
    if (resident.empty()) resident.push_back(start_block(l, l.order[next++]));
    bool ran = false, polling = true;
    for (size_t k = 0; k < resident.size();) {
      Block& b = *resident[k];
      // a block goes on until it waits for others
      for (bool again = true; again;) {
        again = false;
        uint64_t before = l.progress;
        for (Warp& w : b.warps) {
          if (!can_run(w)) continue;
          try {
            run_warp(w);
          } catch (const Fault& f) {
            record_fault(l, w, f);
            return;
          }
          ran = true;
          if (!w.yielded) {
            again = true;
            polling = false;
          }
        }
        again |= l.progress != before;
        if (!again) again = land_copies(b);
        if (l.progress != progress_seen) {
          progress_seen = l.progress;
          executed_then = l.executed;
          idle_sweeps = 0;
        }
        if (l.executed - executed_then > kIdleInstructions) {
          deadlock(l, resident, true);
          return;
        }
      }
      if (b.finished_warps == l.nwarps) {
        resident.erase(resident.begin() + k);
      } else {
        k++;
      }
    }
    if (resident.empty()) continue;
    if (ran && !polling) continue;
    if (resident.size() < limit && next < l.order.size()) {
      resident.push_back(start_block(l, l.order[next++]));
    } else if (!ran || ++idle_sweeps > kIdleSweeps) {
      deadlock(l, resident, false);
      return;
    }
  }
}

}  // namespace ptx
