// Work that threads take item by item: each its own share, and then what is left of the others'.
#pragma once

#include <atomic>
#include <cstdint>

namespace ffkernels::cpu {

// A thread's share, [next, end); each on a cache line of its own. Shares keep a thread with the memory that it worked
// on before. Helping pays where cores differ: by design, for other work, or from moment to moment.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls function(owner, item) for items nobody else has taken, each share's in order. What an item computes must not
// depend on the thread.
template <typename F>
void for_items(Share* shares, int64_t threads, int64_t thread, F&& function) {
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t owner = (thread + t) % threads;
    Share& share = shares[owner];
    for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) function(owner, i);
  }
}

}  // namespace ffkernels::cpu
