// The C interface that Python calls through ctypes.
#include <algorithm>
#include <numeric>
#include <random>

#include "memory.h"

namespace ptx {

static std::unordered_map<std::string, Handler>& handlers() {
  static std::unordered_map<std::string, Handler> table;
  return table;
}
static std::vector<Handler>& by_number() {
  static std::vector<Handler> list;
  return list;
}
Register::Register(std::initializer_list<Entry> entries) {
  for (const Entry& e : entries) handlers()[e.name] = e.fn;
}
Handler find_handler(const std::string& key) {
  auto it = handlers().find(key);
  return it == handlers().end() ? nullptr : it->second;
}

}  // namespace ptx

using namespace ptx;

extern "C" {

// An instruction as the decoder writes it.
struct RawInsn {
  int32_t handler;
  uint32_t guard_off, guard_reg, line, first_op;
  uint16_t ndst, nsrc;
  uint8_t guard_negated, policy;
  uint8_t unused[6];
  uint64_t flags;
  int64_t imm[4];
};
struct RawRegion {
  uint64_t base, size;
  uint8_t* data;
  const uint8_t* initial_state;  // null: defined
  uint32_t space, writable, track;
  const char* name;
};
struct RawLaunch {
  uint32_t grid[3], block[3];
  uint32_t file_bytes, nregs, local_bytes, static_shared, total_shared, shift_shared, shift_global;
  uint32_t sms, resident, cooperative, uses_wgmma, uses_async;
  uint32_t envreg1, envreg2;
  uint64_t seed;  // 0: blocks in order
};
struct RawFault {
  uint32_t pc, block[3], thread[3];
  char kind[64];
  char text[4000];
};

int ptx_handler(const char* name) {
  Handler fn = find_handler(name);
  if (!fn) return -1;
  by_number().push_back(fn);
  return int(by_number().size()) - 1;
}

Launch* ptx_create(const RawLaunch* raw, const RawInsn* insns, uint32_t ninsns, const Operand* operands,
                   uint32_t noperands, const char* consts, uint32_t const_bytes, const uint32_t* specials,
                   uint32_t nspecials) {
  auto* l = new Launch;
  l->operands.assign(operands, operands + noperands);
  l->consts.assign(const_bytes + 64, 0);
  std::copy(consts, consts + const_bytes, l->consts.data());
  Handler barrier = find_handler("barrier");
  for (uint32_t i = 0; i < ninsns; i++) {
    const RawInsn& r = insns[i];
    Insn in{};
    in.fn = by_number()[r.handler];
    in.ops = l->operands.data() + r.first_op;
    std::copy(r.imm, r.imm + 4, in.imm);
    in.flags = r.flags;
    in.guard_off = r.guard_off;
    in.guard_reg = r.guard_reg;
    in.line = r.line;
    in.ndst = r.ndst;
    in.nsrc = r.nsrc;
    in.guard_negated = r.guard_negated;
    in.is_barrier = in.fn == barrier;
    in.policy = Policy(r.policy);
    l->code.push_back(in);
  }
  for (uint32_t i = 0; i < nspecials; i++)
    l->specials.push_back({int(specials[3 * i]), specials[3 * i + 1], specials[3 * i + 2]});
  std::copy(raw->grid, raw->grid + 3, l->grid);
  std::copy(raw->block, raw->block + 3, l->block);
  l->file_bytes = (raw->file_bytes + 63) & ~63u;
  l->nregs = raw->nregs;
  l->local_bytes = raw->local_bytes;
  l->static_shared = raw->static_shared;
  l->total_shared = raw->total_shared;
  l->granule_shift_shared = raw->shift_shared;
  l->granule_shift_global = raw->shift_global;
  l->sms = int(raw->sms);
  l->resident = int(raw->resident);
  l->cooperative = raw->cooperative;
  l->uses_wgmma = raw->uses_wgmma;
  l->uses_async = raw->uses_async;
  l->envreg[1] = raw->envreg1;
  l->envreg[2] = raw->envreg2;
  l->threads = int(raw->block[0] * raw->block[1] * raw->block[2]);
  l->nwarps = (l->threads + kLanes - 1) / kLanes;
  l->counters.resize(ninsns);
  l->order.resize(size_t(raw->grid[0]) * raw->grid[1] * raw->grid[2]);
  std::iota(l->order.begin(), l->order.end(), 0u);
  if (raw->seed) {
    std::mt19937_64 rng(raw->seed);
    std::shuffle(l->order.begin(), l->order.end(), rng);
  }
  return l;
}

void ptx_region(Launch* l, const RawRegion* raw) {
  auto r = std::make_unique<Region>();
  r->base = raw->base;
  r->size = raw->size;
  r->data = raw->data;
  r->space = Space(raw->space);
  r->writable = raw->writable;
  r->name = raw->name;
  r->pool = &l->pool;
  r->make_shadow(kDefined, raw->track, l->granule_shift_global);
  if (raw->initial_state) std::copy(raw->initial_state, raw->initial_state + raw->size, r->state);
  size_t window = raw->base >> kWindowShift;
  if (l->windows.size() <= window) l->windows.resize(window + 1);
  l->windows[window] = std::move(r);
}

// 0: finished; 1: stopped by a fault
int ptx_run(Launch* l, RawFault* fault) {
  try {
    run_launch(*l);
  } catch (const Fault& f) {  // outside any warp
    l->failed = true;
    l->fault = f;
  }
  if (!l->failed) return 0;
  fault->pc = l->fault_pc;
  std::copy(l->fault_block, l->fault_block + 3, fault->block);
  std::copy(l->fault_thread, l->fault_thread + 3, fault->thread);
  std::snprintf(fault->kind, sizeof fault->kind, "%s", l->fault.kind.c_str());
  std::snprintf(fault->text, sizeof fault->text, "%s", l->fault.text.c_str());
  return 1;
}

// seven counters an instruction, in the order of Counters
void ptx_counters(const Launch* l, uint64_t* out) {
  for (const Counters& c : l->counters) {
    const uint64_t values[] = {c.warps, c.threads, c.bytes, c.sectors, c.wavefronts, c.ideal_wavefronts, c.divergent};
    out = std::copy(std::begin(values), std::end(values), out);
  }
}

// sectors of a region that were read, written, touched; bytes that were never written
void ptx_region_counters(const Launch* l, uint64_t base, uint64_t* out) {
  const Region& r = *l->windows[base >> kWindowShift];
  out[0] = out[1] = out[2] = out[3] = 0;
  for (uint64_t s = 0; s * 32 < r.size; s++) {
    out[0] += r.sectors[s] & 1;
    out[1] += r.sectors[s] >> 1 & 1;
    out[2] += r.sectors[s] != 0;
  }
  for (uint64_t i = 0; i < r.size; i++) out[3] += r.state[i] == kUnwritten;
}

// of every byte: defined, never written, undefined or outside
void ptx_region_state(const Launch* l, uint64_t base, uint8_t* out) {
  const Region& r = *l->windows[base >> kWindowShift];
  std::copy(r.state, r.state + r.size, out);
}

uint32_t ptx_same_value_writes(const Launch* l, uint64_t* out, uint32_t room) {
  uint32_t n = 0;
  for (const auto& [pcs, count] : l->same_value_writes) {
    if (n == room) break;
    out[3 * n] = pcs.first;
    out[3 * n + 1] = pcs.second;
    out[3 * n++ + 2] = count;
  }
  return n;
}

uint32_t ptx_lane_conflicts(const Launch* l, uint64_t* out, uint32_t room) {
  uint32_t n = 0;
  for (const auto& [pc, count] : l->lane_conflicts) {
    if (n == room) break;
    out[2 * n] = pc;
    out[2 * n++ + 1] = count;
  }
  return n;
}

void ptx_destroy(Launch* l) { delete l; }
}
