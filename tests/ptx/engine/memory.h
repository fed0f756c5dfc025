// Checked access to memory: bounds, alignment, undefined bytes, races; and its counters.
#pragma once

#include "machine.h"

namespace ptx {

constexpr int kWindowShift = 36;  // an address window a region: nothing that leaves one lands in another
constexpr uint64_t kSharedWindow = uint64_t(1) << kWindowShift, kLocalWindow = uint64_t(2) << kWindowShift;
constexpr uint64_t kParamWindow = uint64_t(3) << kWindowShift;

const char* space_name(Space s);
std::string access_name(const char* verb, int bytes, const Region& r, uint64_t offset);

// Where an address leads.
struct Place {
  Region* region;  // null: local memory of the lane
  uint64_t offset;
  uint8_t* data;
  uint8_t* state;
};

// Finds `bytes` at `addr`; throws if out of range, misaligned or of another space.
Place locate(Warp& w, int lane, uint64_t addr, Space space, int bytes, bool write, int align);

// Who accesses, as race detection sees it.
struct Actor {
  AgentKind kind = kWarpAgent;
  int mbarrier = -1;   // agent of that mbarrier instead
  uint32_t clock = 0;  // of the asynchronous agent
  uint32_t flags = 0;  // node flags
  bool proxy = false;  // through the async proxy: needs fence.proxy.async after generic writes
};

// A checked read or write of a located place; `value` lets two writes of the same value be told apart.
void note_read(Warp& w, int lane, const Place& p, int bytes, const Actor& who);
void note_write(Warp& w, int lane, const Place& p, int bytes, const Actor& who, const void* value);
// A read of what must not change in this launch: ld.global.nc, whose cache no fence or barrier keeps coherent; and ldu.
void note_constant(Warp& w, int lane, const Place& p, int bytes);
// Of ordinary accesses to shared memory: what lanes of a warp do to one another (lanes.cpp).
void note_lane_read(Warp& w, int lane, const Place& p, int bytes);
void note_lane_write(Warp& w, int lane, const Place& p, int bytes);
void require_defined(int lane, const Place& p, int bytes);
[[noreturn]] void undefined_operand(const char* what, Mask lanes);

// Addresses of a warp's access -> sectors and bank conflicts.
class Traffic {
 public:
  Traffic(Warp& w, int bytes);
  void global(const Place& p, bool write);
  void add(const Place& p, bool write) {
    if (!p.region) return;
    if (p.region->space == kShared)
      shared(uint32_t(p.offset));
    else
      global(p, write);
  }
  void shared(uint32_t offset) { shared_[nshared_++] = offset; }
  ~Traffic();

 private:
  Warp& w_;
  int bytes_, nsectors_ = 0, nshared_ = 0;
  uint64_t last_ = ~uint64_t(0);
  uint64_t sectors_[2 * kLanes];
  uint32_t shared_[kLanes];
};
// The places of a warp's lanes for one access.
struct Places {
  Place lane[kLanes];
  bool contiguous;  // all lanes, in order, without a gap, in one region
};
// Locates the lanes of m at addr[lane] + offset.
void locate_lanes(Warp& w, Mask m, const uint64_t* addr, Space space, int bytes, bool write, Places& out);
// Applies note_read or note_write to all lanes, at once where they are contiguous.
void note_reads(Warp& w, Mask m, const Places& places, int bytes, const Actor& who);
// The address operand i plus the instruction's offset, of all lanes.
void addresses(Warp& w, const Insn& in, int i, int64_t offset, uint64_t* out);

// How the decoder packs the semantics of a memory operation into the flags.
inline Space space_of(const Insn& in) { return Space(in.flags >> 32 & 15); }
inline Order order_of(const Insn& in) { return Order(in.flags >> 36 & 15); }
inline Scope scope_of(const Insn& in) { return Scope(in.flags >> 40 & 15); }
inline bool reads_constant(const Insn& in) { return in.flags >> 44 & 1; }
inline Actor actor_of(const Insn& in) {
  Actor a;
  if (order_of(in) != kWeak) a.flags = kNodeStrong | (scope_of(in) == kCta ? uint32_t(kNodeCta) : 0u);
  return a;
}

// Wavefronts that shared memory needs for these accesses.
int wavefronts(const uint32_t* offsets, int count, int bytes);

// race.cpp
uint32_t global_agent(const Warp& w, AgentKind kind);
void tick(Warp& w);  // a release: what follows is later than what was released
void release_to(Warp& w, VectorClock& target);
void acquire_from(Warp& w, const VectorClock& source);
void strong_access(Warp& w, uint64_t addr, Region* r, Scope scope, Order order, bool reads, bool writes);
void fence(Warp& w, Scope scope, Order order);

}  // namespace ptx
