// Address resolution, shadow state, sector and bank counting.
#include "memory.h"

#include <algorithm>
#include <cstdarg>
#include <cstdlib>

namespace ptx {

std::string format(const char* fmt, ...) {
  char buffer[1024];
  va_list args;
  va_start(args, fmt);
  std::vsnprintf(buffer, sizeof buffer, fmt, args);
  va_end(args);
  return buffer;
}

// calloc leaves untouched pages unmapped, which keeps shadows of large tensors cheap
void Region::make_shadow(uint8_t initial_state, bool track, uint32_t granule_shift) {
  shift = granule_shift;
  state = static_cast<uint8_t*>(std::calloc(size + 16, 1));
  if (initial_state) std::memset(state, initial_state, size);
  size_t granules = (size >> shift) + 2;
  if (track) {
    writes = static_cast<uint32_t*>(std::calloc(granules, 4));
    reads = static_cast<uint32_t*>(std::calloc(granules, 4));
  }
  if (space == kShared) {
    lane_writes = static_cast<uint32_t*>(std::calloc(granules, 4));
    lane_reads = static_cast<uint32_t*>(std::calloc(granules, 4));
  }
  sectors = static_cast<uint8_t*>(std::calloc(size / 32 + 2, 1));
}
Region::~Region() {
  std::free(state);
  std::free(writes);
  std::free(reads);
  std::free(lane_writes);
  std::free(lane_reads);
  std::free(sectors);
}

const char* space_name(Space s) {
  static const char* names[] = {"generic", "global", "shared", "local", "constant", "parameter"};
  return names[s];
}

std::string access_name(const char* verb, int bytes, const Region& r, uint64_t offset) {
  return format("%s of %d bytes at byte %lld of %s", verb, bytes, static_cast<long long>(offset), r.name.c_str());
}

static Place locate_local(Warp& w, int lane, uint64_t addr, int bytes, bool write, int align) {
  uint64_t size = w.launch->local_bytes;
  const char* verb = write ? "write" : "read";
  if (addr >= size || size - addr < uint64_t(bytes))
    throw Fault{"out of range",
                format("%s of %d bytes at byte %lld of local memory, which has %llu bytes a thread", verb, bytes,
                       static_cast<long long>(addr), static_cast<unsigned long long>(size)),
                lane};
  if (addr & (align - 1))
    throw Fault{
        "misaligned",
        format("%s of %d bytes at byte %llu of local memory", verb, bytes, static_cast<unsigned long long>(addr)),
        lane};
  uint64_t at = lane * size + addr;
  return {nullptr, addr, &w.local[at], &w.local_state[at]};
}

Place locate(Warp& w, int lane, uint64_t addr, Space space, int bytes, bool write, int align) {
  // shared, local and parameter addresses are offsets in their windows; all others are generic
  if (space == kShared) {
    if (addr >> 32)
      throw Fault{"out of range",
                  format("shared address 0x%llx (a generic address?)", static_cast<unsigned long long>(addr)), lane};
    addr += kSharedWindow;
  } else if (space == kParam && addr >> kWindowShift == 0) {
    addr += kParamWindow;
  } else if (space == kLocal) {
    return locate_local(w, lane, addr, bytes, write, align);
  }
  uint64_t window = addr >> kWindowShift;
  if (window == kLocalWindow >> kWindowShift && space == kGeneric)
    return locate_local(w, lane, addr - kLocalWindow, bytes, write, align);
  Region* r = nullptr;
  if (window == kSharedWindow >> kWindowShift)
    r = &w.block->shared;
  else if (window < w.launch->windows.size())
    r = w.launch->windows[window].get();
  const char* verb = write ? "write" : "read";
  if (!r) {
    throw Fault{"out of range",
                format("%s of %d bytes at %s 0x%llx, which is in no argument or variable", verb, bytes,
                       addr ? "address" : "null pointer", static_cast<unsigned long long>(addr)),
                lane};
  }
  if (space != kGeneric && r->space != space)
    throw Fault{"wrong space",
                format("%s at a %s address: 0x%llx is in %s", access_name(verb, bytes, *r, 0).c_str(),
                       space_name(space), static_cast<unsigned long long>(addr), r->name.c_str()),
                lane};
  uint64_t off = addr - r->base;
  if (addr < r->base || off >= r->size || r->size - off < uint64_t(bytes)) {
    long long signed_off = static_cast<long long>(addr) - static_cast<long long>(r->base);
    throw Fault{"out of range",
                format("%s of %d bytes at byte %lld of %s, which has %llu bytes", verb, bytes, signed_off,
                       r->name.c_str(), static_cast<unsigned long long>(r->size)),
                lane};
  }
  if (addr & (align - 1))
    throw Fault{"misaligned", access_name(verb, bytes, *r, off) + format(" (alignment %d)", align), lane};
  if (write && !r->writable) throw Fault{"write to read-only memory", access_name(verb, bytes, *r, off), lane};
  return {r, off, r->data + off, r->state + off};
}

static bool all_defined(const uint8_t* state, int bytes) {
  if (bytes <= 8) {
    uint64_t s = 0;
    std::memcpy(&s, state, bytes);
    return s == 0;
  }
  return std::all_of(state, state + bytes, [](uint8_t s) { return s == kDefined; });
}

void require_defined(int lane, const Place& p, int bytes) {
  if (all_defined(p.state, bytes)) return;
  int first = int(std::find_if(p.state, p.state + bytes, [](uint8_t s) { return s != kDefined; }) - p.state);
  const Region& r = *p.region;
  std::string what = access_name("read", bytes, r, p.offset);
  if (p.state[first] == kOutside) throw Fault{"out of range", what + ": between the rows of a strided view", lane};
  throw Fault{"uninitialised read",
              what + format(": byte %llu %s", static_cast<unsigned long long>(p.offset + first),
                            p.state[first] == kUnwritten ? "was never written" : "holds an undefined value"),
              lane};
}

void undefined_operand(const char* what, Mask lanes) {
  throw Fault{"uninitialised register", std::string(what) + " is undefined", __builtin_ctz(lanes)};
}

// ---- happens-before of one access against the history of its granules
// --------------------------------------------------

static uint32_t local_agent(const Warp& w, const Actor& who) {
  int n = w.launch->nwarps;
  return who.mbarrier >= 0 ? uint32_t(kAgentKinds * n + who.mbarrier) : uint32_t(who.kind * n + w.index);
}

// agents of mbarriers are known only to those who waited on one
static bool seen(const VectorClock& vc, const Node& node) {
  return node.agent < vc.local.size() && vc.local[node.agent] >= node.clock;
}

static bool happens_before(const Warp& w, const Node& node, bool global) {
  if (!global) return seen(w.vc, node);
  uint32_t n = w.launch->nwarps, warp = node.agent / 2, bulk = node.agent & 1;
  if (warp / n == w.block->linear) return w.vc.local[(bulk ? kBulkAgent : kWarpAgent) * n + warp % n] >= node.clock;
  return w.vc.remote && (*w.vc.remote)[node.agent] >= node.clock;
}

static bool same_block(const Warp& w, const Node& node, bool global) {
  return !global || node.agent / 2 / w.launch->nwarps == w.block->linear;
}

// strong accesses whose scopes include each other do not race
static bool exempt(const Warp& w, const Node& node, bool global, const Actor& who) {
  if (!(node.flags & who.flags & kNodeStrong)) return false;
  return !((node.flags | who.flags) & kNodeCta) || same_block(w, node, global);
}

// A generic write reaches the async proxy through fence.proxy.async only.
static bool proxy_fenced(const Warp& w, const Node& node) { return seen(w.proxy, node); }

static std::string describe(const Warp& w, const Node& node, bool global) {
  int n = w.launch->nwarps;
  if (global) {
    uint32_t block = node.agent / 2 / n, x = block % w.launch->grid[0], y = block / w.launch->grid[0];
    return format("%sblock (%u,%u,%u) warp %u at PTX line %u", node.agent & 1 ? "bulk copy of " : "", x,
                  y % w.launch->grid[1], y / w.launch->grid[1], node.agent / 2 % n, w.launch->code[node.pc].line);
  }
  static const char* kinds[] = {"", "cp.async of ", "bulk copy of ", "bulk copy of ", "wgmma of "};
  uint32_t kind = node.agent / n;
  if (kind >= kAgentKinds)
    return format("bulk copy to an mbarrier, issued at PTX line %u", w.launch->code[node.pc].line);
  return format("%swarp %u at PTX line %u", kinds[kind], node.agent % n, w.launch->code[node.pc].line);
}

[[noreturn]] static void race(Warp& w, int lane, const char* verb, int bytes, const Place& p, const char* other,
                              const Node& node, bool global) {
  bool in_flight = node.flags & kNodeAsync;
  const char* kind = in_flight ? "asynchronous operation not waited for" : "race";
  const char* order = in_flight ? "which this thread has not waited for" : "with no ordering between them";
  throw Fault{kind,
              access_name(verb, bytes, *p.region, p.offset) +
                  format(" and %s by %s, %s", other, describe(w, node, global).c_str(), order),
              lane};
}

static uint32_t make_node(Warp& w, Warp::Cached& c, Pool* pool, uint32_t parent, uint32_t agent, uint32_t clock,
                          uint32_t flags, uint32_t root) {
  if (c.pool == pool && c.parent == parent && c.agent == agent && c.clock == clock && c.pc == w.at && c.flags == flags)
    return c.id;
  pool->nodes.push_back({parent, agent, clock, w.at, flags, root});
  c = {pool, parent, agent, clock, w.at, flags, uint32_t(pool->nodes.size() - 1)};
  return c.id;
}

static bool is_wide(const Actor& who) { return (who.flags & (kNodeStrong | kNodeCta)) == kNodeStrong; }

// The first write of the list that is unordered with this access and races with it; 0 if there is none.
static uint32_t racing_write(Warp& w, Pool* pool, uint32_t id, bool global, const Actor& who) {
  Warp::Known& known = w.known_write[id & 63];
  if (known.id == id && known.pool == pool) return 0;
  const Node* node = &pool->nodes[id];
  if (node->flags & kNodeWide && is_wide(who)) {
    if (!node->root) return 0;
    return racing_write(w, pool, node->root, global, who);
  }
  bool ordered = true;
  for (uint32_t i = id; i; i = node->flags & kNodeStrong ? node->parent : 0) {
    node = &pool->nodes[i];
    if (happens_before(w, *node, global)) continue;
    if (!exempt(w, *node, global, who)) return i;
    ordered = false;
  }
  if (ordered) known = {pool, id};
  return 0;
}

static uint32_t racing_read(Warp& w, Pool* pool, uint32_t id, bool global, const Actor& who) {
  Warp::Known* memo = is_wide(who) ? w.known_strong_read : w.known_read;
  for (uint32_t i = id; i;) {
    const Warp::Known& known = memo[i & 63];
    if (known.id == i && known.pool == pool) break;
    const Node& node = pool->nodes[i];
    if (!happens_before(w, node, global) && !exempt(w, node, global, who)) return i;
    i = node.parent;
  }
  if (is_wide(who) || !(who.flags & kNodeStrong)) memo[id & 63] = {pool, id};
  return 0;
}

void note_read(Warp& w, int lane, const Place& p, int bytes, const Actor& who) {
  Region* r = p.region;
  if (!r || !r->writes) return;
  bool global = r->space == kGlobal;
  uint32_t agent = global ? global_agent(w, who.kind) : local_agent(w, who);
  uint32_t clock = who.clock ? who.clock : w.clock();
  Pool* pool = r->pool;
  size_t first = p.offset >> r->shift, last = (p.offset + bytes - 1) >> r->shift;
  for (size_t g = first; g <= last; g++) {
    if (uint32_t wn = r->writes[g]) {
      if (uint32_t bad = racing_write(w, pool, wn, global, who))
        race(w, lane, "read", bytes, p, "a write", pool->nodes[bad], global);
      const Node& node = pool->nodes[wn];
      if (who.proxy && !global && node.agent < uint32_t(kBulkAgent * w.launch->nwarps) && !proxy_fenced(w, node))
        throw Fault{"missing fence.proxy.async",
                    access_name("asynchronous read", bytes, *r, p.offset) + " after an ordinary write by " +
                        describe(w, node, global),
                    lane};
    }
    uint32_t rn = r->reads[g];
    if (rn) {
      const Node& top = pool->nodes[rn];
      if (top.agent == agent && top.clock == clock && (top.flags & kNodeStrong) <= (who.flags & kNodeStrong)) continue;
      if (who.flags & kNodeStrong) {  // polling warps in turn would make the list grow without end
        Warp::Polled& polled = w.polled[g & 15];
        if (polled.region == r && polled.granule == g && polled.clock == clock) continue;
        polled = {r, g, clock};
      }
    }
    r->reads[g] = make_node(w, w.read_cache[rn & 63], pool, rn, agent, clock, who.flags, 0);
  }
}

void note_constant(Warp& w, int lane, const Place& p, int bytes) {
  Region* r = p.region;
  if (!r || !r->writes) return;
  size_t first = p.offset >> r->shift, last = (p.offset + bytes - 1) >> r->shift;
  if (r->constant.empty()) r->constant.resize((r->size >> r->shift) + 1);
  for (size_t g = first; g <= last; g++) {
    if (uint32_t wn = r->writes[g])
      throw Fault{"not constant",
                  access_name("read through the non-coherent cache", bytes, *r, p.offset) + " of what " +
                      describe(w, r->pool->nodes[wn], r->space == kGlobal) + " has written in this launch",
                  lane};
    r->constant[g] = true;
  }
}

void note_write(Warp& w, int lane, const Place& p, int bytes, const Actor& who, const void* value) {
  w.launch->progress++;
  Region* r = p.region;
  if (!r) return;
  if (*std::max_element(p.state, p.state + bytes) & kOutside)
    throw Fault{"out of range", access_name("write", bytes, *r, p.offset) + ": between the rows of a strided view",
                lane};
  if (!r->writes) return;
  bool global = r->space == kGlobal, strong = who.flags & kNodeStrong;
  uint32_t agent = global ? global_agent(w, who.kind) : local_agent(w, who);
  uint32_t clock = who.clock ? who.clock : w.clock();
  Pool* pool = r->pool;
  size_t first = p.offset >> r->shift, last = (p.offset + bytes - 1) >> r->shift;
  for (size_t g = first; g <= last; g++) {
    if (!r->constant.empty() && r->constant[g])
      throw Fault{
          "not constant",
          access_name("write", bytes, *r, p.offset) + ": read through the non-coherent cache before, in this launch",
          lane};
    uint32_t wn = r->writes[g], rn = r->reads[g];
    if (wn) {
      if (uint32_t bad = racing_write(w, pool, wn, global, who)) {
        const Node node = pool->nodes[bad];
        if (!value || (node.flags & kNodeAsync) || std::memcmp(value, p.data, bytes) != 0)
          race(w, lane, "write", bytes, p, "a write", node, global);
        auto pair = std::minmax(w.at, node.pc);
        w.launch->same_value_writes[{pair.first, pair.second}]++;
      }
    }
    if (rn) {
      if (uint32_t bad = racing_read(w, pool, rn, global, who))
        race(w, lane, "write", bytes, p, "a read", pool->nodes[bad], global);
    }
    if (!strong) {
      r->writes[g] = make_node(w, w.write_cache[w.at & 15], pool, 0, agent, clock, who.flags, 0);
      r->reads[g] = 0;
      continue;
    }
    const Node top = pool->nodes[wn];
    if (wn && top.agent == agent && top.clock == clock && (top.flags & ~kNodeWide) == who.flags) continue;
    uint32_t root = wn && top.flags & kNodeStrong ? top.root : wn;
    bool wide = is_wide(who) && (!wn || !(top.flags & kNodeStrong) || top.flags & kNodeWide);
    r->writes[g] = make_node(w, w.write_cache[(w.at ^ wn) & 15], pool, wn, agent, clock,
                             who.flags | (wide ? kNodeWide : 0u), root);
  }
}

// ---- whole warps
// ---------------------------------------------------------------------------------------------------------

void addresses(Warp& w, const Insn& in, int i, int64_t offset, uint64_t* out) {
  // imm[3]: bytes of the address register
  if (in.imm[3] == 4) {
    const uint32_t* a = src<uint32_t>(w, in, i);
    for (int k = 0; k < kLanes; k++) out[k] = uint32_t(a[k] + uint32_t(offset));
  } else {
    const uint64_t* a = src<uint64_t>(w, in, i);
    for (int k = 0; k < kLanes; k++) out[k] = a[k] + uint64_t(offset);
  }
}

void locate_lanes(Warp& w, Mask m, const uint64_t* addr, Space space, int bytes, bool write, Places& out) {
  int first = __builtin_ctz(m);
  Place p = out.lane[first] = locate(w, first, addr[first], space, bytes, write, bytes);
  out.contiguous = false;
  uint64_t lowest = ~uint64_t(0), highest = 0, all = 0;
  bool steps = m == kAll;
  if (m == kAll) {
    for (int i = 0; i < kLanes; i++) {
      lowest = std::min(lowest, addr[i]);
      highest = std::max(highest, addr[i]);
      all |= addr[i];
      steps &= addr[i] == addr[0] + uint64_t(i) * bytes;
    }
  } else {
    each_lane(m, [&](int i) {
      lowest = std::min(lowest, addr[i]);
      highest = std::max(highest, addr[i]);
      all |= addr[i];
    });
  }
  Region* r = p.region;
  uint64_t base = r ? addr[first] - p.offset : 0;
  if (r && lowest >= base && highest - base <= r->size - bytes && r->size >= uint64_t(bytes) && !(all & (bytes - 1))) {
    each_lane(m, [&](int i) {
      uint64_t off = addr[i] - base;
      out.lane[i] = {r, off, r->data + off, r->state + off};
    });
    out.contiguous = steps;
    return;
  }
  each_lane(m, [&](int i) { out.lane[i] = locate(w, i, addr[i], space, bytes, write, bytes); });
}

void note_reads(Warp& w, Mask m, const Places& places, int bytes, const Actor& who) {
  if (places.contiguous) {
    try {
      note_read(w, 0, places.lane[0], bytes * kLanes, who);
      return;
    } catch (const Fault&) {  // again by lane, to name the one at fault
    }
  }
  each_lane(m, [&](int i) { note_read(w, i, places.lane[i], bytes, who); });
}

// ---- counters
// ----------------------------------------------------------------------------------------------------------

Traffic::Traffic(Warp& w, int bytes) : w_(w), bytes_(bytes) {}

void Traffic::global(const Place& p, bool write) {
  if (!p.region || !p.region->sectors) return;
  uint64_t first = p.offset >> 5, last = (p.offset + bytes_ - 1) >> 5;
  for (uint64_t s = first; s <= last; s++) {
    p.region->sectors[s] |= write ? 2 : 1;
    uint64_t key = (p.region->base >> 5) + s;
    if (key == last_) continue;
    last_ = key;
    bool seen = false;
    for (int i = nsectors_ - 1; i >= 0 && !seen; i--) seen = sectors_[i] == key;
    if (!seen && nsectors_ < 2 * kLanes) sectors_[nsectors_++] = key;
  }
}

int wavefronts(const uint32_t* offsets, int count, int bytes) {
  // accesses of 8 and 16 bytes are served half and quarter warps at a time
  int words = std::max(bytes / 4, 1), lanes_a_phase = kLanes / words, total = 0;
  for (int begin = 0; begin < count; begin += lanes_a_phase) {
    int end = std::min(begin + lanes_a_phase, count);
    uint32_t first[kLanes], degree[kLanes] = {};
    uint32_t seen[4 * kLanes];
    int nseen = 0, most = 0;
    for (int i = begin; i < end; i++) {
      for (int k = 0; k < words; k++) {
        uint32_t word = offsets[i] / 4 + k, bank = word % 32;
        if (degree[bank] && first[bank] == word) continue;
        bool again = false;
        if (degree[bank])
          for (int j = 0; j < nseen && !again; j++) again = seen[j] == word;
        if (again) continue;
        if (!degree[bank]) first[bank] = word;
        seen[nseen++] = word;
        most = std::max<int>(most, int(++degree[bank]));
      }
    }
    total += most;
  }
  return total;
}

Traffic::~Traffic() {
  Counters& c = w_.launch->counters[w_.at];
  c.sectors += nsectors_;
  if (nshared_) {
    c.wavefronts += wavefronts(shared_, nshared_, bytes_);
    int words = std::max(bytes_ / 4, 1), lanes_a_phase = kLanes / words;
    c.ideal_wavefronts += (nshared_ + lanes_a_phase - 1) / lanes_a_phase;
  }
}

}  // namespace ptx
