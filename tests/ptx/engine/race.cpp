// Happens-before between warps: vector clocks through releases, acquires and fences.
#include <algorithm>

#include "memory.h"

namespace ptx {

static void join(Clock& a, const Clock& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}

void VectorClock::join(const VectorClock& other) {
  ptx::join(local, other.local);
  if (!other.remote || remote == other.remote) return;
  if (!remote) {
    remote = other.remote;
    return;
  }
  if (std::equal(other.remote->begin(), other.remote->end(), remote->begin(),
                 [](uint32_t b, uint32_t a) { return b <= a; }))
    return;
  auto merged = std::make_shared<Clock>(*remote);
  ptx::join(*merged, *other.remote);
  remote = std::move(merged);
}

uint32_t global_agent(const Warp& w, AgentKind kind) {
  return 2 * (w.block->linear * w.launch->nwarps + w.index) + (kind == kBulkAgent);
}

void tick(Warp& w) { w.vc.local[w.index]++; }
void release_to(Warp& w, VectorClock& target) {
  target.join(w.vc);
  tick(w);
}
void acquire_from(Warp& w, const VectorClock& source) { w.vc.join(source); }

// A clock over the agents of the whole grid, for variables that blocks share.
static Clock to_global(const Warp& w, const VectorClock& vc) {
  const Launch& l = *w.launch;
  uint32_t n = l.nwarps, base = 2 * w.block->linear * n;
  size_t size = 2 * size_t(l.grid[0]) * l.grid[1] * l.grid[2] * n;
  Clock out = vc.remote ? *vc.remote : Clock(size);
  for (uint32_t i = 0; i < n && i < vc.local.size(); i++) {
    out[base + 2 * i] = std::max(out[base + 2 * i], vc.local[kWarpAgent * n + i]);
    out[base + 2 * i + 1] = std::max(out[base + 2 * i + 1], vc.local[kBulkAgent * n + i]);
  }
  return out;
}
static VectorClock from_global(const Warp& w, const Clock& clock) {
  uint32_t n = w.launch->nwarps, base = 2 * w.block->linear * n;
  VectorClock vc;
  if (clock.empty()) return vc;
  vc.local.resize(kAgentKinds * n);
  for (uint32_t i = 0; i < n; i++) {
    vc.local[kWarpAgent * n + i] = clock[base + 2 * i];
    vc.local[kBulkAgent * n + i] = clock[base + 2 * i + 1];
  }
  vc.remote = std::make_shared<Clock>(clock);
  return vc;
}

static bool acquires(Order o) { return o == kAcquire || o == kAcqRel || o == kSeqCst; }
static bool releases(Order o) { return o == kRelease || o == kAcqRel || o == kSeqCst; }

// Synchronisation through a variable. A release at gpu scope also serves cta-scope acquires of its own block, which are
// kept under their own key: address | block + 1 in the bits above the window.
void strong_access(Warp& w, uint64_t addr, Region* r, Scope scope, Order order, bool reads, bool writes) {
  bool shared = r->space == kShared, wide = scope >= kGpu;
  uint64_t cta_key = addr ^ (uint64_t(w.block->linear + 1) << 44);
  bool ticked = false;
  auto acquire = [&](const VectorClock& source) {
    if (acquires(order)) {
      acquire_from(w, source);
    } else {
      w.pending_acquire.join(source);
      w.has_pending_acquire = true;
    }
  };
  if (reads) {
    if (shared) {
      auto it = w.block->sync_vars.find(addr);
      if (it != w.block->sync_vars.end()) acquire(it->second);
    } else {
      auto& vars = w.launch->sync_vars;
      auto it = vars.find(cta_key);
      if (it != vars.end()) acquire(from_global(w, it->second));
      if (wide && (it = vars.find(addr)) != vars.end()) acquire(from_global(w, it->second));
    }
  }
  if (!writes) return;
  bool full = releases(order);
  auto publish = [&](Clock& var, const VectorClock* what) {
    // a write that is no read-modify-write starts a new release sequence
    if (!reads) var.clear();
    if (what) join(var, to_global(w, *what));
    ticked = true;
  };
  if (shared) {
    const VectorClock* what = full ? &w.vc : w.has_released_cta ? &w.released_cta : nullptr;
    if (what || w.block->sync_vars.count(addr)) {
      VectorClock& var = w.block->sync_vars[addr];
      if (!reads) var = VectorClock();
      if (what) var.join(*what);
      ticked = true;
    }
  } else {
    auto& vars = w.launch->sync_vars;
    const VectorClock* cta = full ? &w.vc : w.has_released_cta ? &w.released_cta : nullptr;
    const VectorClock* gpu = !wide ? nullptr : full ? &w.vc : w.has_released_gpu ? &w.released_gpu : nullptr;
    if (cta || vars.count(cta_key)) publish(vars[cta_key], cta);
    if (gpu || vars.count(addr)) publish(vars[addr], gpu);
  }
  if (ticked) tick(w);
}

void fence(Warp& w, Scope scope, Order order) {
  if (acquires(order) && w.has_pending_acquire) {
    w.vc.join(w.pending_acquire);
    w.has_pending_acquire = false;
    w.pending_acquire = VectorClock();
  }
  if (!releases(order)) return;
  w.released_cta = w.vc;
  w.has_released_cta = true;
  if (scope >= kGpu) {
    w.released_gpu = w.vc;
    w.has_released_gpu = true;
  }
  tick(w);
}

}  // namespace ptx
