#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffkernels::cpu {
namespace {

#if defined(__x86_64__)
bool bit(unsigned value, int index) { return (value >> index) & 1; }

// Linux gives a process the tile registers only when it asks.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> found = {&kernels_portable};
#if defined(__x86_64__)
  unsigned a, b, c, d, b7, c7, d7, a71 = 0, ignored;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return found;  // bit 27: the system saves extended registers
  const bool fma = bit(c, 12);
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return found;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &ignored, &ignored, &ignored);
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!fma || !bit(b7, 5) || (saved & 0x6) != 0x6) return found;
  found.push_back(&kernels_avx2);
  const bool avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F, DQ, BW, VL
  if (!avx512 || (saved & 0xe6) != 0xe6) return found;
  const bool bf16 = bit(a71, 5);
  found.push_back(bf16 ? &kernels_avx512_bf16 : &kernels_avx512);
  const bool amx = bit(d7, 22) && bit(d7, 24);  // AMX-BF16, AMX-TILE
  if (!bf16 || !amx || (saved & 0x60000) != 0x60000 || !tiles_permitted()) return found;
  found.push_back(&kernels_amx);
#endif
  return found;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = find_available();
  return found;
}

}  // namespace

const Kernels& kernels() {
  const char* wanted = std::getenv("FFKERNELS_CPU_ISA");  // looked at on every call, so that tests can change it
  if (wanted == nullptr || *wanted == '\0') return *available().back();
  for (const Kernels* kernels : available()) {
    if (std::string(kernels->name) == wanted) return *kernels;
  }
  STD_TORCH_CHECK(false, "FFKERNELS_CPU_ISA must be one of ", available_isas(), " on this machine, got ", wanted);
}

std::string available_isas() {
  std::string names;
  for (const Kernels* kernels : available()) names += (names.empty() ? "" : ",") + std::string(kernels->name);
  return names;
}

}  // namespace ffkernels::cpu
