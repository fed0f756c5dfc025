// What a layer's kernel works on: plain pointers and numbers, the same for every instruction set.
#pragma once

#include <cstdint>

namespace ffkernels::cpu {

enum class Type : uint8_t { float32, bfloat16 };
enum class Precision : uint8_t { highest, high, medium };
enum class Normalize : uint8_t { none, l2, rms };
enum class Activation : uint8_t { relu, leaky_relu, gelu, silu, tanh };
enum class Optimizer : uint8_t { sgd, adam, adamw, hinton_sgd };

struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0, col_stride = 1;  // in elements
};

struct Floats {  // a vector in float32; null: not given
  const float* data = nullptr;
  int64_t stride = 0;
  explicit operator bool() const { return data != nullptr; }
  float operator[](int64_t i) const { return data[i * stride]; }
};

// One step of an optimizer, with everything that does not depend on the element already worked out.
struct OptimizerStep {
  Optimizer kind = Optimizer::sgd;
  bool nesterov = false, first = false;  // first: the momentum buffer is the gradient itself
  float lr = 0, weight_decay = 0;
  float momentum = 0, dampening = 0;
  float beta1 = 0, beta2 = 0, eps = 0;
  float rest1 = 0, rest2 = 0;                         // 1 - beta (or momentum), which float32 would round again
  float step_size = 0, inverse_root_correction2 = 0;  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  float* slot[2] = {nullptr, nullptr};                // of the weight: momentum_buffer, or exp_avg and exp_avg_sq
  float* bias_slot[2] = {nullptr, nullptr};
};

// Labels written over x's first columns: each row of x under `candidates` labels.
struct Labels {
  int64_t candidates = 1;
  int64_t num_classes = 0;  // 0: no labels
  float strength = 0;
  bool separate = false;  // one array a candidate, and the results of one candidate together; else those of one row
  const int64_t* label[2] = {nullptr, nullptr};
  int64_t row_stride[2] = {0, 0}, candidate_stride = 0;
};

// Of x's values (ffkernels/dropout.py).
struct Dropout {
  bool on = false;
  float scale = 1;     // 1 / (1 - p)
  uint32_t below = 0;  // random bits below it drop a value
  uint32_t layer = 0;
  uint64_t seed = 0;
};

struct Job {
  int64_t rows = 0, cols = 0, depth = 0;  // of x (rows, depth), weight (cols, depth)
  Type type = Type::float32;              // of x, weight, bias, y, p and the gradients
  Matrix x, weight;
  const void* bias = nullptr;
  int64_t bias_stride = 0;
  Floats x_sqnorm;
  Normalize normalize = Normalize::l2;
  float eps = 0;
  Activation activation = Activation::relu;
  Labels labels;
  Dropout dropout;           // not together with labels
  int64_t neutral_cols = 0;  // of x, the first ones, which are read as `neutral`
  float neutral = 0;

  // forward: results (rows * candidates, cols), contiguous
  bool forward = false;
  void* y = nullptr;
  void* p = nullptr;          // y act'(z); null where not wanted
  float* goodness = nullptr;  // (rows * candidates,)

  // loss: coefficients from the goodness, where `loss` is given
  Floats sign;  // (rows,); with labels candidate 0 is positive and 1 negative
  float threshold = 0, temperature = 1, divisor = 1;
  float* loss = nullptr;  // ()

  // gradient, where wanted
  bool gradient = false;
  Matrix gradient_y;  // y (or p) where the forward pass did not make it here
  Floats coef;        // (rows,) where the loss does not give it
  Floats row_term, col_term;
  float* positive_sum = nullptr;  // (cols,), zeros: y of the positive rows is added; null: not wanted
  void* grad_weight = nullptr;    // (cols, depth), contiguous: store the gradient; null: run the optimizer
  void* grad_bias = nullptr;
  void* new_weight = nullptr;  // = weight.data, contiguous, where the optimizer runs
  void* new_bias = nullptr;
  OptimizerStep optimizer;
  const float* given_weight = nullptr;  // (cols, depth): a gradient from elsewhere, with rows = 0
  const float* given_bias = nullptr;    // (cols,)
};

// A layer of the net as a softmax head sees it, and the head's weight for it.
struct HeadLayer {
  const float* y = nullptr;  // (rows, cols)
  int64_t row_stride = 0, cols = 0;
  Floats sqnorm;            // (rows,)
  float* weight = nullptr;  // (classes, cols), contiguous
  OptimizerStep optimizer;
};

struct HeadJob {
  int64_t rows = 0, classes = 0;
  float eps = 0;
  const int64_t* labels = nullptr;  // (rows,)
  int64_t label_stride = 0;
  const HeadLayer* layers = nullptr;
  int64_t layer_count = 0;
  float* logits = nullptr;  // (rows, classes), contiguous
  float* loss = nullptr;    // ()
};

// Asks for large pages under memory that is about to be written for the first time: fewer page faults. Only advice.
void advise_large_pages(void* data, int64_t bytes);

// At least `bytes` of scratch memory, aligned to a page; throws std::bad_alloc. It belongs to the calling thread, which
// keeps it for its next call; the content is undefined. A network has its own beside that of the layer it runs, so has
// a head.
enum class Scratch { layer, network, head };
char* workspace(Scratch kind, int64_t bytes);

using Task = void (*)(int64_t thread, const void* context);
// Runs task(0..threads-1) on torch's pool and waits.
void run_threads(int64_t threads, Task task, const void* context);

// Runs the job, or with reserve_only makes sure of the memory for it: after that it cannot fail.
using Kernel = void (*)(const Job& job, int64_t threads, bool reserve_only);

using HeadKernel = void (*)(const HeadJob& job, int64_t threads);

// The kernels of one instruction set; a precision it cannot do better than another points to the same one.
struct Kernels {
  const char* name;
  Kernel by_precision[3];  // indexed by Precision
  HeadKernel head;
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx;

}  // namespace ffkernels::cpu
