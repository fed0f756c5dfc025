// cp.async and mbarrier.
#include "async.h"

#include <algorithm>

namespace ptx {

uint32_t agent_index(const Warp& w, AgentKind kind) { return uint32_t(kind * w.launch->nwarps + w.index); }

Actor async_actor(const Warp& w, AgentKind kind) {
  Actor a;
  a.kind = kind;
  a.clock = w.sequence[kind];
  a.flags = kNodeAsync;
  a.proxy = kind >= kBulkAgent;
  return a;
}

void commit_group(Warp& w, AgentKind kind, std::vector<CommitGroup>& groups, Mask lanes) {
  groups.push_back({w.sequence[kind]++, lanes});
}

void wait_groups(Warp& w, AgentKind kind, std::vector<CommitGroup>& groups, Mask lanes, uint32_t allowed) {
  uint32_t done = 0;
  bool first = true;
  each_lane(lanes, [&](int lane) {
    uint32_t newer = 0, mine = 0;
    bool has = false;
    for (auto g = groups.rbegin(); g != groups.rend(); ++g) {
      if (!(g->lanes >> lane & 1)) continue;
      has = true;
      if (newer++ >= allowed) {
        mine = g->sequence;
        break;
      }
    }
    if (!has) return;
    done = first ? mine : std::min(done, mine);
    first = false;
  });
  if (first) return;
  uint32_t& seen = w.vc.local[agent_index(w, kind)];
  seen = std::max(seen, done);
  groups.erase(std::remove_if(groups.begin(), groups.end(), [&](const CommitGroup& g) { return g.sequence <= done; }),
               groups.end());
}

namespace {

// imm: destination offset, source offset, bytes | kind of the third operand << 8 (0 none, 1 source size, 2 ignore
// predicate), address bytes of destination | of source << 8
void cp_async(Warp& w, const Insn& in, Mask m) {
  int bytes = in.imm[2] & 0xff, third = in.imm[2] >> 8 & 0xff;
  Actor writer = async_actor(w, kCpAsyncAgent);
  Traffic traffic(w, bytes);
  uint32_t offsets[kLanes];
  int count = 0;
  each_lane(m, [&](int i) {
    auto base = [&](int op, int size) { return size == 4 ? src<uint32_t>(w, in, op)[i] : src<uint64_t>(w, in, op)[i]; };
    uint64_t to = base(0, in.imm[3] & 0xff) + in.imm[0], from = base(1, in.imm[3] >> 8 & 0xff) + in.imm[1];
    int read = bytes;
    if (third == 1) read = int(std::min<uint32_t>(src<uint32_t>(w, in, 2)[i], bytes));
    if (third == 2 && pred(w, in.ops[in.ndst + 2]) >> i & 1) read = 0;
    uint8_t data[16] = {};
    if (read) {
      // the alignment of a source is that of the whole copy
      Place p = locate(w, i, from, kGlobal, read, false, 1);
      if (from & (bytes - 1)) throw Fault{"misaligned", access_name("read", bytes, *p.region, p.offset), i};
      require_defined(i, p, read);
      note_read(w, i, p, read, Actor());
      traffic.global(p, false);
      std::memcpy(data, p.data, read);
    }
    Place p = locate(w, i, to, kShared, bytes, true, bytes);
    note_write(w, i, p, bytes, writer, nullptr);
    std::memcpy(p.data, data, bytes);
    std::memset(p.state, kDefined, bytes);
    offsets[count++] = uint32_t(p.offset);
    w.launch->counters[w.at].bytes += read;
  });
  w.launch->counters[w.at].wavefronts += wavefronts(offsets, count, bytes);
  int lanes_a_phase = kLanes / (bytes / 4);
  w.launch->counters[w.at].ideal_wavefronts += (count + lanes_a_phase - 1) / lanes_a_phase;
}
void cp_commit(Warp& w, const Insn&, Mask m) { commit_group(w, kCpAsyncAgent, w.cp_groups, m); }
void cp_wait(Warp& w, const Insn& in, Mask m) { wait_groups(w, kCpAsyncAgent, w.cp_groups, m, uint32_t(in.imm[0])); }
void cp_wait_all(Warp& w, const Insn&, Mask m) {
  commit_group(w, kCpAsyncAgent, w.cp_groups, m);
  wait_groups(w, kCpAsyncAgent, w.cp_groups, m, 0);
}

}  // namespace

// ---- mbarrier
// ----------------------------------------------------------------------------------------------------------

static uint32_t shared_offset(Warp& w, int lane, uint64_t addr, Space space) {
  Place p = locate(w, lane, addr, space, 8, true, 8);
  if (!p.region || p.region->space != kShared) throw Fault{"wrong space", "an mbarrier outside shared memory", lane};
  return uint32_t(p.offset);
}

Mbarrier& mbarrier_at(Warp& w, int lane, uint64_t addr, Space space) {
  uint32_t offset = shared_offset(w, lane, addr, space);
  auto it = w.block->mbarriers.find(offset);
  if (it == w.block->mbarriers.end() || !it->second.live)
    throw Fault{"invalid mbarrier", format("no mbarrier was initialised at byte %u of shared memory", offset), lane};
  return it->second;
}

// A phase ends when nobody is missing and no bytes are.
static void maybe_complete(Launch& l, Mbarrier& b) {
  if (b.pending || b.tx) return;
  b.phase++;
  b.pending = b.expected;
  b.done.join(b.arriving);
  b.done_proxy.join(b.arriving_proxy);
  b.arriving = b.arriving_proxy = VectorClock();
  uint32_t agent = kAgentKinds * l.nwarps + b.agent;
  if (b.done.local.size() <= agent) b.done.local.resize(agent + 1);
  b.done.local[agent] = b.phase;
  l.progress++;
}

void arrive(Warp& w, Mbarrier& b, int lane, uint32_t count, int64_t expect) {
  b.tx += expect;
  if (count > b.pending)
    throw Fault{"invalid mbarrier", format("%u arrivals where %u are still expected in this phase", count, b.pending),
                lane};
  b.arriving.join(w.vc);
  b.arriving_proxy.join(w.proxy);
  tick(w);
  b.pending -= count;
  maybe_complete(*w.launch, b);
}

void land_later(Warp& w, Mbarrier& b, int64_t bytes) { w.block->landing.push_back({&b, bytes}); }

bool land_copies(Block& block) {
  for (auto [b, bytes] : block.landing) {
    b->tx -= bytes;
    maybe_complete(*block.launch, *b);
  }
  bool any = !block.landing.empty();
  block.landing.clear();
  return any;
}

Actor mbarrier_actor(const Mbarrier& b) {
  Actor a;
  a.mbarrier = b.agent;
  a.clock = b.phase + 1;
  a.flags = kNodeAsync;
  return a;
}

namespace {

uint64_t lane_address(Warp& w, const Insn& in, int lane) {
  return in.imm[3] == 4 ? uint64_t(uint32_t(src<uint32_t>(w, in, 0)[lane] + uint32_t(in.imm[0])))
                        : src<uint64_t>(w, in, 0)[lane] + in.imm[0];
}

void mbarrier_init(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    uint64_t addr = lane_address(w, in, i);
    uint32_t offset = shared_offset(w, i, addr, space_of(in));
    uint32_t count = src<uint32_t>(w, in, 1)[i];
    if (count == 0 || count >= 1u << 20) throw Fault{"invalid operand", format("an mbarrier with count %u", count), i};
    bool known = w.block->mbarriers.count(offset);
    Mbarrier& b = w.block->mbarriers[offset];
    if (b.live)
      throw Fault{
          "invalid mbarrier",
          format("the mbarrier at byte %u of shared memory is initialised again without mbarrier.inval", offset), i};
    if (!known) {
      b.agent = w.block->mbarrier_agents++;
      if (b.agent >= kMaxMbarriers)
        throw Fault{"invalid mbarrier", format("more than %d mbarriers in a block", kMaxMbarriers), i};
    }
    b.live = true;
    b.expected = b.pending = count;
    b.first_phase = b.phase;
    b.tx = 0;
    Place p = locate(w, i, addr, space_of(in), 8, true, 8);
    note_write(w, i, p, 8, Actor(), nullptr);
    std::memset(p.state, kDefined, 8);
  });
}
void mbarrier_inval(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    uint64_t addr = lane_address(w, in, i);
    Mbarrier& b = mbarrier_at(w, i, addr, space_of(in));
    b.live = false;
    Place p = locate(w, i, addr, space_of(in), 8, true, 8);
    note_write(w, i, p, 8, Actor(), nullptr);
    std::memset(p.state, kUnwritten, 8);
  });
}

// A use of the object must come after its initialisation by another warp: checked as a read of its bytes.
Mbarrier& use(Warp& w, const Insn& in, int lane) {
  uint64_t addr = lane_address(w, in, lane);
  Mbarrier& b = mbarrier_at(w, lane, addr, space_of(in));
  Place p = locate(w, lane, addr, space_of(in), 8, false, 8);
  note_read(w, lane, p, 8, Actor());
  return b;
}

uint64_t token(const Mbarrier& b) { return uint64_t(b.phase) << 1 | 1; }

// imm[1]: 0 arrive, 1 arrive.expect_tx, 2 expect_tx, 3 complete_tx, 4 arrive_drop, 5 arrive.noComplete;
// imm[2]: a count is given
void mbarrier_arrive(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    Mbarrier& b = use(w, in, i);
    uint32_t value = in.imm[2] ? src<uint32_t>(w, in, 1)[i] : 1;
    uint64_t before = token(b);
    switch (in.imm[1]) {
      case 0:
        arrive(w, b, i, value, 0);
        break;
      case 1:
        arrive(w, b, i, 1, value);
        break;
      case 2:
        b.tx += value;
        break;
      case 3:
        b.tx -= value;
        maybe_complete(*w.launch, b);
        break;
      case 4:
        if (b.expected < value) throw Fault{"invalid mbarrier", "more arrivals dropped than expected", i};
        b.expected -= value;
        arrive(w, b, i, value, 0);
        break;
      default:
        if (value >= b.pending) throw Fault{"invalid mbarrier", "arrive.noComplete completes the phase", i};
        arrive(w, b, i, value, 0);
    }
    if (in.ndst) dst<uint64_t>(w, in, 0)[i] = before;
  });
}

// The arrival counts once the cp.async of this thread have landed: they belong to the phase. imm[1]: .noinc
void cp_mbarrier_arrive(Warp& w, const Insn& in, Mask m) {
  uint32_t& seen = w.vc.local[agent_index(w, kCpAsyncAgent)];
  uint32_t before = seen, now = w.sequence[kCpAsyncAgent];
  each_lane(m, [&](int i) {
    Mbarrier& b = use(w, in, i);
    seen = now;  // for those who wait on the mbarrier, not for this thread
    if (!in.imm[1]) b.pending++;
    arrive(w, b, i, 1, 0);
    seen = before;
  });
  // copies issued from here on are not covered
  w.sequence[kCpAsyncAgent]++;
}

// imm[1]: parity form. test_wait and try_wait differ in how long the hardware may take
void mbarrier_wait(Warp& w, const Insn& in, Mask m) {
  Mask done = 0;
  each_lane(m, [&](int i) {
    Mbarrier& b = use(w, in, i);
    bool ready;
    if (in.imm[1]) {
      uint32_t parity = src<uint32_t>(w, in, 1)[i];
      ready = ((b.phase - b.first_phase) & 1) != (parity & 1);
    } else {
      ready = src<uint64_t>(w, in, 1)[i] >> 1 < b.phase;
    }
    if (!ready) return;
    done |= 1u << i;
    w.meetings++;
    acquire_from(w, b.done);
    w.proxy.join(b.done_proxy);
  });
  set_pred(w, in.ops[0], m, done);
  if (done != m) yield(w);
}

const Register handlers{
    {"cp.async", cp_async},
    {"cp.async.commit", cp_commit},
    {"cp.async.wait", cp_wait},
    {"cp.async.wait_all", cp_wait_all},
    {"cp.async.mbarrier.arrive", cp_mbarrier_arrive},
    {"mbarrier.init", mbarrier_init},
    {"mbarrier.inval", mbarrier_inval},
    {"mbarrier.arrive", mbarrier_arrive},
    {"mbarrier.wait", mbarrier_wait},
};

}  // namespace
}  // namespace ptx
