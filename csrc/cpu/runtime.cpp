// Scratch memory and threads.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/job.h"

namespace ffkernels::cpu {
namespace {

struct Buffer {
  char* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

constexpr int64_t kLargePage = 1 << 21;

}  // namespace

void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

char* workspace(Scratch kind, int64_t bytes) {
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[static_cast<int>(kind)];
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer = {};
    const int64_t size = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    buffer.data = static_cast<char*>(std::aligned_alloc(kLargePage, size));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = size;
    advise_large_pages(buffer.data, size);
  }
  return buffer.data;
}

void run_threads(int64_t threads, Task task, const void* context) {
  if (threads == 1) return task(0, context);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) task(thread, context);
  });
}

}  // namespace ffkernels::cpu
