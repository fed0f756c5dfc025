// Runs the CPU kernels without torch, on arguments in blocks of memory of just their size, so that sanitizers see every
// access: all ops, both types, all precisions and instruction sets, and every way to cut the work. Threads are
// std::thread's, which ThreadSanitizer understands, and several callers run at once. Results must be the same bits for
// any number of threads.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#ifndef PORTABLE_ONLY
#include "cpu/isa.h"
#endif
#include "cpu/job.h"

namespace ffkernels::cpu {

// A fresh block for every call: what one call leaves is no memory of the next one's.
char* workspace(Scratch kind, int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> blocks[3];
  auto& block = blocks[static_cast<int>(kind)];
  block.reset();
  block.reset(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
  std::memset(block.get(), 0xff, bytes);  // NaN: what is read before it is written shows in the results
  return block.get();
}

void run_threads(int64_t threads, Task task, const void* context) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(task, i, context);
  task(0, context);
  for (std::thread& other : others) other.join();
}

namespace {

enum class Op { forward, grad, update, step, label_forward, label_step };
struct Case {
  Op op;
  int64_t rows, depth, cols;
  Type type;
  Activation activation;
  Optimizer optimizer;
};

class Memory {  // blocks of a case's arguments and results
 public:
  explicit Memory(unsigned seed) : random_(seed) {}

  void* values(int64_t count, Type type, float low = -1, float high = 1) {
    std::uniform_real_distribution<float> uniform(low, high);
    const int64_t width = type == Type::float32 ? 4 : 2;
    char* data = block(count * width);
    for (int64_t i = 0; i < count; ++i) {
      const float value = uniform(random_);
      // the upper half of a float is a bf16
      std::memcpy(data + i * width, reinterpret_cast<const char*>(&value) + (4 - width), width);
    }
    return data;
  }
  float* floats(int64_t count, float low = -1, float high = 1) {
    return static_cast<float*>(values(count, Type::float32, low, high));
  }
  int64_t* labels(int64_t count, int64_t classes) {
    auto* data = reinterpret_cast<int64_t*>(block(count * 8));
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<int64_t>(random_() % classes);
    return data;
  }
  // Sums up all bytes, arguments and results.
  uint64_t digest() const {
    uint64_t hash = 14695981039346656037u;
    for (const auto& [data, bytes] : blocks_) {
      for (int64_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<unsigned char>(data[i])) * 1099511628211u;
    }
    return hash;
  }
  bool finite(const float* data, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if (!(data[i] - data[i] == 0.f)) return false;
    }
    return true;
  }

 private:
  char* block(int64_t bytes) {
    blocks_.emplace_back(std::make_unique<char[]>(bytes), bytes);
    return blocks_.back().first.get();
  }
  std::mt19937 random_;
  std::vector<std::pair<std::unique_ptr<char[]>, int64_t>> blocks_;
};

void set_labels(Job& job, Memory& memory, const Case& c) {
  Labels& labels = job.labels;
  labels.num_classes = std::min<int64_t>(10, c.depth);
  labels.strength = 1.5f;
  labels.separate = c.op == Op::label_step;
  labels.candidates = labels.separate ? 2 : labels.num_classes;
  labels.candidate_stride = labels.separate ? 0 : 1;
  for (int i = 0; i < (labels.separate ? 2 : 1); ++i) {
    labels.row_stride[i] = labels.separate ? 1 : labels.candidates;
    labels.label[i] = memory.labels(c.rows * labels.row_stride[i], labels.num_classes);
  }
}

OptimizerStep optimizer_of(Memory& memory, Optimizer kind, int64_t cols, int64_t depth) {
  OptimizerStep o;
  o.kind = kind;
  o.lr = o.step_size = 0.01f;
  o.weight_decay = 0.1f;
  o.momentum = o.beta1 = 0.9f;
  o.rest1 = 0.1f;
  o.beta2 = 0.99f;
  o.rest2 = 0.01f;
  o.eps = 1e-8f;
  o.inverse_root_correction2 = 1.f;
  for (int i = 0; i < (kind == Optimizer::adam || kind == Optimizer::adamw ? 2 : 1); ++i) {
    o.slot[i] = memory.floats(cols * depth, 0, 1);
    o.bias_slot[i] = memory.floats(cols, 0, 1);
  }
  return o;
}

void set_optimizer(Job& job, Memory& memory, const Case& c) {
  job.optimizer = optimizer_of(memory, c.optimizer, c.cols, c.depth);
  job.new_weight = const_cast<void*>(job.weight.data);
  job.new_bias = const_cast<void*>(job.bias);
}

// Runs the case; the digest of all its memory.
uint64_t run(const Case& c, const Kernels& kernels, Precision precision, int64_t threads) {
  Memory memory(1);
  Job job;
  job.rows = c.rows, job.depth = c.depth, job.cols = c.cols, job.type = c.type, job.activation = c.activation;
  job.x = {memory.values(c.rows * c.depth, c.type), c.depth, 1};
  job.weight = {memory.values(c.cols * c.depth, c.type), c.depth, 1};
  job.bias = memory.values(c.cols, c.type);
  job.bias_stride = 1;
  job.eps = 1e-4f;
  if (c.op == Op::label_forward || c.op == Op::label_step) set_labels(job, memory, c);
  const int64_t results = c.rows * job.labels.candidates;
  const bool step = c.op == Op::step || c.op == Op::label_step;
  float* goodness = nullptr;
  if (step || c.op == Op::forward || c.op == Op::label_forward) {
    job.forward = true;
    job.y = memory.values(results * c.cols, c.type);
    job.p = step ? nullptr : memory.values(results * c.cols, c.type);
    job.goodness = goodness = memory.floats(results);
  }
  if (step) {
    job.loss = memory.floats(1);
    job.divisor = static_cast<float>(c.cols);
    job.sign = {memory.floats(c.rows, 1, 1), 1};
    job.row_term = {memory.floats(results), 1};
    job.col_term = {memory.floats(c.cols), 1};
    job.positive_sum = memory.floats(c.cols, 0, 0);
  }
  if (c.rows % 2 == 1) {  // x is read as something else
    if (c.op == Op::step) job.dropout = {true, 2.f, 1u << 31, 1, 42};
    if (c.op == Op::forward) job.neutral_cols = 1, job.neutral = 0.1f;
  }
  if (c.op == Op::grad || c.op == Op::update) {  // y lies transposed: its rows must be gathered
    job.gradient_y = {memory.values(c.rows * c.cols, c.type), 1, c.rows};
    job.coef = {memory.floats(c.rows), 1};
    job.x_sqnorm = {memory.floats(c.rows, 1, 2), 1};
  }
  job.gradient = step || c.op == Op::grad || c.op == Op::update;
  if (c.op == Op::grad) {
    job.grad_weight = memory.values(c.cols * c.depth, c.type);
    job.grad_bias = memory.values(c.cols, c.type);
  } else if (job.gradient) {
    set_optimizer(job, memory, c);
  }
  kernels.by_precision[static_cast<int>(precision)](job, threads, true);
  kernels.by_precision[static_cast<int>(precision)](job, threads, false);
  if (goodness != nullptr && !memory.finite(goodness, results)) {
    std::fprintf(stderr, "goodness is not finite\n");
    std::exit(1);
  }
  return memory.digest();
}

std::vector<Case> cases() {
  // few rows; few columns of x; columns in several blocks; many rows; several blocks of rows
  const int64_t shapes[][3] = {{1, 1, 1}, {40, 2, 300}, {33, 31, 50}, {130, 300, 400}, {1100, 40, 300}, {2100, 17, 50}};
  std::vector<Case> found;
  int turn = 0;
  for (const auto& [rows, depth, cols] : shapes) {
    for (int op = 0; op < 6; ++op) {
      for (Type type : {Type::float32, Type::bfloat16}) {
        found.push_back({static_cast<Op>(op), rows, depth, cols, type, static_cast<Activation>(turn % 5),
                         static_cast<Optimizer>(turn % 4)});
        ++turn;
      }
    }
  }
  return found;
}

void check(const Kernels& kernels) {
  for (const Case& c : cases()) {
    for (Precision precision : {Precision::highest, Precision::high, Precision::medium}) {
      if (c.type == Type::bfloat16 && precision != Precision::medium) continue;
      if (precision != Precision::highest && c.type == Type::float32 &&
          kernels.by_precision[static_cast<int>(precision)] == kernels.by_precision[0]) {
        continue;
      }
      const uint64_t alone = run(c, kernels, precision, 1);
      for (int64_t threads : {2, 3}) {
        if (run(c, kernels, precision, threads) != alone) {
          std::fprintf(stderr, "%s: other bits with %d threads\n", kernels.name, static_cast<int>(threads));
          std::exit(1);
        }
      }
    }
  }
}

// A head on two layers, enough work for three threads; the digest of all its memory.
uint64_t run_head(const Kernels& kernels, Optimizer optimizer, int64_t threads) {
  Memory memory(2);
  HeadJob job;
  job.rows = 203, job.classes = 11, job.eps = 1e-4f;
  job.labels = memory.labels(job.rows, job.classes);
  job.label_stride = 1;
  HeadLayer layers[2];
  for (int i = 0; i < 2; ++i) {
    HeadLayer& layer = layers[i];
    layer.cols = i == 0 ? 300 : 1100;
    layer.row_stride = layer.cols;
    layer.y = memory.floats(job.rows * layer.cols);
    layer.sqnorm = {memory.floats(job.rows, 1, 2), 1};
    layer.weight = memory.floats(job.classes * layer.cols);
    layer.optimizer = optimizer_of(memory, optimizer, job.classes, layer.cols);
  }
  job.layers = layers;
  job.layer_count = 2;
  job.logits = memory.floats(job.rows * job.classes);
  job.loss = memory.floats(1);
  kernels.head(job, threads);
  return memory.digest();
}

void check_head(const Kernels& kernels) {
  for (Optimizer optimizer : {Optimizer::sgd, Optimizer::adam}) {
    const uint64_t alone = run_head(kernels, optimizer, 1);
    for (int64_t threads : {2, 3}) {
      if (run_head(kernels, optimizer, threads) != alone) {
        std::fprintf(stderr, "%s: other bits of the head with %d threads\n", kernels.name, static_cast<int>(threads));
        std::exit(1);
      }
    }
  }
}

void check_several_callers(const Kernels& kernels) {
  const Case c = {Op::step, 130, 300, 400, Type::float32, Activation::gelu, Optimizer::adam};
  uint64_t digests[3];
  std::vector<std::thread> callers;
  for (uint64_t& digest : digests) {
    callers.emplace_back([&digest, &kernels, &c] { digest = run(c, kernels, Precision::medium, 2); });
  }
  for (std::thread& caller : callers) caller.join();
  if (digests[0] != digests[1] || digests[0] != digests[2]) {
    std::fprintf(stderr, "%s: other bits for several callers at once\n", kernels.name);
    std::exit(1);
  }
}

}  // namespace
}  // namespace ffkernels::cpu

// Takes names of instruction sets; with none, prints which there are.
int main(int count, char** names) {
#ifdef PORTABLE_ONLY  // linked with no other kernels
  const auto chosen = []() -> const ffkernels::cpu::Kernels& { return ffkernels::cpu::kernels_portable; };
#else
  if (count == 1) std::printf("%s\n", ffkernels::cpu::available_isas().c_str());
  const auto chosen = ffkernels::cpu::kernels;
#endif
  for (int i = 1; i < count; ++i) {
    setenv("FFKERNELS_CPU_ISA", names[i], 1);
    const auto& kernels = chosen();
    ffkernels::cpu::check(kernels);
    ffkernels::cpu::check_head(kernels);
    ffkernels::cpu::check_several_callers(kernels);
    std::printf("%s clean\n", kernels.name);
  }
}
