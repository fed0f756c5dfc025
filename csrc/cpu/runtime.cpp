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

}  // namespace

char* workspace(Scratch kind, int64_t bytes) {
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[static_cast<int>(kind)];
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer = {};
    constexpr int64_t page = 1 << 21;  // a large one: fewer misses of the address cache
    const int64_t size = (bytes + page - 1) / page * page;
    buffer.data = static_cast<char*>(std::aligned_alloc(page, size));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = size;
#if defined(__linux__)
    madvise(buffer.data, size, MADV_HUGEPAGE);  // only advice: nothing depends on it
#endif
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
