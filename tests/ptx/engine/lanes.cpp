// Races inside a warp, through shared memory. Lanes share a clock, and run in step here; on a GPU nothing but
// __syncwarp, a barrier of the block or an mbarrier orders what they write and read.
#include "memory.h"

namespace ptx {
namespace {

// Of a granule's last reader or writer: the warp and how often its lanes have met, above the lane.
constexpr int kLaneBits = 6;
constexpr uint32_t kLaneMask = (1u << kLaneBits) - 1, kSeveral = kLanes;

uint32_t now(const Warp& w) { return (uint32_t(w.index) << 20 | (w.meetings & 0xfffffu)) << kLaneBits; }

void check(const Warp& w, uint32_t last, int lane, const char* verb, const char* other, const Place& p, int bytes) {
  if ((last & ~kLaneMask) != now(w) || (last & kLaneMask) == uint32_t(lane)) return;
  uint32_t who = last & kLaneMask;
  throw Fault{
      "race between lanes",
      access_name(verb, bytes, *p.region, p.offset) +
          (who == kSeveral ? format(" and %s by other lanes", other) : format(" and %s by lane %u", other, who)) +
          " of the same warp, which have not met since (__syncwarp)",
      lane};
}

}  // namespace

void note_lane_read(Warp& w, int lane, const Place& p, int bytes) {
  Region* r = p.region;
  if (!r || !r->lane_writes) return;
  size_t first = p.offset >> r->shift, last = (p.offset + bytes - 1) >> r->shift;
  uint32_t here = now(w);
  for (size_t g = first; g <= last; g++) {
    check(w, r->lane_writes[g], lane, "read", "a write", p, bytes);
    uint32_t& reads = r->lane_reads[g];
    reads = (reads & ~kLaneMask) == here && (reads & kLaneMask) != uint32_t(lane) ? here | kSeveral : here | lane;
  }
}

void note_lane_write(Warp& w, int lane, const Place& p, int bytes) {
  Region* r = p.region;
  if (!r || !r->lane_writes) return;
  size_t first = p.offset >> r->shift, last = (p.offset + bytes - 1) >> r->shift;
  for (size_t g = first; g <= last; g++) {
    check(w, r->lane_reads[g], lane, "write", "a read", p, bytes);
    r->lane_writes[g] = now(w) | lane;
  }
}

}  // namespace ptx
