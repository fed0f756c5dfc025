#include "cpu/peaks.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "cpu/isa.h"

#if defined(__x86_64__)
// gcc 12 warns of its own intrinsics, which leave an unused operand undefined on purpose (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace ffkernels::cpu {
namespace {

// `rounds` times the same arithmetic. The result depends on all of it, so that the compiler leaves none out.
using Loop = float (*)(int64_t rounds);

struct Arithmetic {
  Loop loop;
  double flops;  // of a round
};

// Independent sums, to hide an addition's latency; with the factors they fit into 16 registers. They start different:
// equal ones the compiler would make one.
constexpr int kSums = 12;

typedef float Vector __attribute__((vector_size(16)));

float multiply_add_portable(int64_t rounds) {
  Vector sum[kSums], one = {1, 1, 1, 1}, half = one * 0.5f, total = {};
  for (int j = 0; j < kSums; ++j) sum[j] = one * static_cast<float>(j);
  for (int64_t i = 0; i < rounds; ++i) {
    for (int j = 0; j < kSums; ++j) sum[j] = sum[j] * half + one;
  }
  for (const Vector& s : sum) total += s;
  return total[0] + total[1] + total[2] + total[3];
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) float multiply_add_avx2(int64_t rounds) {
  __m256 sum[kSums], one = _mm256_set1_ps(1), half = _mm256_set1_ps(0.5f), total = one;
  for (int j = 0; j < kSums; ++j) sum[j] = _mm256_set1_ps(j);
  for (int64_t i = 0; i < rounds; ++i) {
    for (int j = 0; j < kSums; ++j) sum[j] = _mm256_fmadd_ps(sum[j], half, one);
  }
  for (int j = 0; j < kSums; ++j) total = _mm256_add_ps(total, sum[j]);
  return _mm256_cvtss_f32(total);
}

__attribute__((target("avx512f"))) float multiply_add_avx512(int64_t rounds) {
  __m512 sum[kSums], one = _mm512_set1_ps(1), half = _mm512_set1_ps(0.5f), total = one;
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_set1_ps(j);
  for (int64_t i = 0; i < rounds; ++i) {
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_fmadd_ps(sum[j], half, one);
  }
  for (int j = 0; j < kSums; ++j) total = _mm512_add_ps(total, sum[j]);
  return _mm512_cvtss_f32(total);
}

__attribute__((target("avx512f,avx512bf16"))) float pairs_avx512(int64_t rounds) {
  __m512 sum[kSums], total = _mm512_set1_ps(1);
  const __m512bh one = _mm512_cvtne2ps_pbh(total, total);
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_set1_ps(j);
  for (int64_t i = 0; i < rounds; ++i) {
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], one, one);
  }
  for (int j = 0; j < kSums; ++j) total = _mm512_add_ps(total, sum[j]);
  return _mm512_cvtss_f32(total);
}

// Loading the operands of 2 x 2 results from the first cache beside it costs nothing (measured), so neither does it
// make this limit too high.
__attribute__((target("amx-tile,amx-bf16"))) float tiles(int64_t rounds) {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Config config;  // static: gcc drops stores to a configuration on the stack
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);  // configured tiles start as zeros
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float sums[256];
  _tile_stored(0, sums, 64);
  _tile_release();
  return sums[0];
}
#endif

Arithmetic arithmetic(const Kernels& kernels, const std::string& precision) {
  const Arithmetic portable = {multiply_add_portable, 2.0 * 4 * kSums};
#if defined(__x86_64__)
  if (&kernels == &kernels_portable) return portable;
  if (&kernels == &kernels_avx2) return {multiply_add_avx2, 2.0 * 8 * kSums};
  const double tile_flops = 4 * 2.0 * 16 * 16 * 32;
  if (&kernels == &kernels_amx && precision == "medium") return {tiles, tile_flops};
  if (&kernels == &kernels_amx && precision == "high") return {tiles, tile_flops / 3};  // three products for one
  if (&kernels == &kernels_avx512_bf16 && precision == "medium") return {pairs_avx512, 2.0 * 32 * kSums};
  return {multiply_add_avx512, 2.0 * 16 * kSums};
#else
  (void)kernels;
  (void)precision;
  return portable;
#endif
}

template <class Function>
double seconds(const Function& function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The shortest of calls that take `enough` seconds together, at least five: another program only makes one longer.
template <class Function>
double shortest(double enough, const Function& function) {
  double best = seconds(function), all = best;
  for (int calls = 1; calls < 5 || all < enough; ++calls) {
    const double time = seconds(function);
    best = std::min(best, time);
    all += time;
  }
  return best;
}

struct Run {
  Loop loop;
  int64_t rounds;
  std::vector<float>& sink;
};

using Word = uint64_t;

struct Sweep {
  Word* data;
  int64_t words, times, threads;
  std::vector<Word>& sink;
};

template <bool write>
__attribute__((always_inline)) inline void sweep_words(Word* begin, const Word* end, Word& sink) {
  Word sum = 0;
  for (Word* word = begin; word < end; ++word) {
    if constexpr (write) {
      *word += 1;
    } else {
      sum += *word;
    }
  }
  if constexpr (!write) sink = sum;
}

template <bool write>
void sweep_portable(Word* begin, const Word* end, Word& sink) {
  sweep_words<write>(begin, end, sink);
}

#if defined(__x86_64__)
template <bool write>
__attribute__((target("avx512f,prefer-vector-width=512"))) void sweep_avx512(Word* begin, const Word* end, Word& sink) {
  sweep_words<write>(begin, end, sink);
}
#endif

template <bool write>
void sweep_share(int64_t thread, const void* context) {
  const Sweep& sweep = *static_cast<const Sweep*>(context);
  Word* begin = sweep.data + sweep.words * thread / sweep.threads;
  const Word* end = sweep.data + sweep.words * (thread + 1) / sweep.threads;
#if defined(__x86_64__)
  const auto one = __builtin_cpu_supports("avx512f") ? sweep_avx512<write> : sweep_portable<write>;
#else
  const auto one = sweep_portable<write>;
#endif
  for (int64_t i = 0; i < sweep.times; ++i) one(begin, end, sweep.sink[thread]);
}

void check_threads(int64_t threads) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 4096, "threads must be in [1, 4096], got ", threads);
}

}  // namespace

double cpu_peak(const std::string& precision, int64_t threads) {
  STD_TORCH_CHECK(precision == "highest" || precision == "high" || precision == "medium",
                  "precision must be highest, high or medium, got ", precision);
  check_threads(threads);
  const Arithmetic found = arithmetic(kernels(), precision);
  std::vector<float> sink(threads);
  Run run = {found.loop, 1 << 12, sink};
  const auto call = [&] {
    run_threads(
        threads,
        [](int64_t thread, const void* context) {
          const Run& run = *static_cast<const Run*>(context);
          run.sink[thread] = run.loop(run.rounds);
        },
        &run);
  };
  // long enough that starting the threads is nothing beside it
  while (shortest(0, [&] { sink[0] = found.loop(run.rounds); }) < 4e-3) run.rounds *= 2;
  return found.flops * run.rounds * threads / shortest(0.3, call);
}

double cpu_bandwidth(int64_t bytes, int64_t threads) {
  STD_TORCH_CHECK(bytes >= 1 << 12, "bytes must be at least 4096, got ", bytes);
  check_threads(threads);
  const int64_t words = bytes / sizeof(Word);
  const std::unique_ptr<Word[]> data(new Word[words]());
  std::vector<Word> sink(threads);
  const int64_t times = std::max<int64_t>(1, (1 << 27) / bytes);  // beside which starting the threads is nothing
  const Sweep sweep = {data.get(), words, times, threads, sink};
  const auto rate = [&](Task task, double moved) {
    return times * moved / shortest(0.3, [&] { run_threads(threads, task, &sweep); });
  };
  return std::max(rate(sweep_share<false>, bytes), rate(sweep_share<true>, 2.0 * bytes));
}

}  // namespace ffkernels::cpu
