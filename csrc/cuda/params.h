// What the CUDA kernels are given: plain structs that the host fills and the device reads. Shared by host code, device
// code and tests; nothing here needs the CUDA headers.
//
// There is one kernel, compiled once for each kind of arithmetic (Math). It runs the stages [stage_begin, stage_end) of
// a network of `layers` layers; stage t is
//     the forward tiles of layer t, where its `forward` is set, or the row terms of layer t, where its `coef` is given;
//     the update tiles of layer t - 1, where its `update` is set; from its `given_weight`, where that is given,
// with a barrier over the grid between two stages. So
//     ff_forward, ff_label_forward     1 layer,  stages [0, 1): forward                    any launch
//     ff_grad, ff_update_              1 layer,  stages [0, 2): coef and update            cooperative
//     apply_gradient_                  1 layer,  stages [1, 2): update                     any launch
//     ff_step_, ff_label_step_         1 layer,  stages [0, 2): forward, loss and update   cooperative
//     ff_network_step_                 L layers, stages [0, L + 1): the same               cooperative
// Of S minibatches one starts kBehind stages after the other, and each has the stages above: layer l's weight is
// updated in the stage before the next minibatch needs it. So S steps of a network are L + 1 + (S - 1) kBehind stages,
// in which several minibatches are on their way, each in another layer. A launch of more than one stage must be
// cooperative. Where that is not possible, one ordinary launch a stage, with the same parameters but for stage_begin
// and stage_end, gives the same bits. Any grid gives the same bits.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FFKERNELS_EVERYWHERE __host__ __device__
#else
#define FFKERNELS_EVERYWHERE
#endif

namespace ffkernels::cuda {

constexpr int kTile = 64;         // a tile of y is (64 rows m, 64 columns n), of a weight (64 rows n, 64 columns k)
constexpr int kThreads = 128;     // a block
constexpr int kPipeline = 3;      // loads in flight: stages of shared memory
constexpr int kMaxLayers = 8;     // a launch; a deeper network takes several, each with the y before it as its x
constexpr int kRowPad = 16;       // y between layers has a row stride that is a multiple of this many elements
constexpr int kCandidateMax = 2;  // label arrays (positive and negative)
constexpr int kBehind = 2;        // stages from one minibatch to the next
constexpr int kInTurn = 2;  // buffers for what a layer hands on: one is read while the next minibatch's is written

// How products are made. The kernel of each is named in kernel_name().
enum class Math : int32_t { bf16, fp16, f32, tf32, f32_bf16 };
enum class Normalize : int32_t { none, l2, rms };
enum class Activation : int32_t { relu, leaky_relu, gelu, silu, tanh };
enum class OptimizerKind : int32_t { store, sgd, adam, adamw, hinton_sgd };  // store: write the gradient itself

constexpr int kMathKinds = 5;

// extern "C", void (Params): in csrc/cuda/stages_<math>.cu.
constexpr const char* kernel_name(Math math) {
  constexpr const char* names[kMathKinds] = {"ff_stages_bf16", "ff_stages_fp16", "ff_stages_f32", "ff_stages_tf32",
                                             "ff_stages_f32_bf16"};
  return names[static_cast<int>(math)];
}

FFKERNELS_EVERYWHERE constexpr int element_bytes(Math math) { return math == Math::bf16 || math == Math::fp16 ? 2 : 4; }

// Dynamic shared memory of a block: per pipeline stage two operand tiles of 8 KiB and one vector of kTile floats (two
// with fp16), then one word.
constexpr int kTileBytes = 8192;
FFKERNELS_EVERYWHERE constexpr int shared_bytes(Math math) {
  return kPipeline * (2 * kTileBytes + kTile * 4 * (math == Math::fp16 ? 2 : 1)) + 16;
}

struct Matrix {  // elements of the layer's type
  const void* data;
  int64_t row_stride, col_stride;  // in elements
};

struct Vector {  // float32; null: not given
  const float* data;
  int64_t stride;
};

struct Optimizer {
  OptimizerKind kind;
  int32_t nesterov;
  const float* lr_tensor;  // (); null: lr
  float* step;             // (): read by the update, raised by 1 a minibatch when the launch with the last stage ends
  float* slot[2];          // (N, K) contiguous: momentum_buffer (may be null), or exp_avg and exp_avg_sq
  float* bias_slot[2];     // (N,)
  float lr, weight_decay;
  float momentum, dampening;   // sgd, hinton_sgd
  float beta1, beta2, eps;     // adam, adamw
  float rest1, rest2;          // 1 - beta1, 1 - beta2, computed in double
  float log_beta1, log_beta2;  // log(beta), computed in double; -infinity for beta = 0
};

// Labels written over x's first columns: each row of the first layer's x under `candidates` labels.
struct Labels {
  int32_t candidates;   // 1 without labels
  int32_t num_classes;  // 0: no labels
  int32_t separate;     // 1: results of one candidate together, row c * B + b, label[c][b * row_stride[c]];
                        // 0: results of one row together, row b * candidates + c, label[0][b * row_stride[0] + c *
                        // candidate_stride]
  float strength;       // rounded to x's type
  const int64_t* label[kCandidateMax];
  int64_t row_stride[kCandidateMax], candidate_stride, minibatch_stride[kCandidateMax];
};

// One layer. M is Params::rows, B = M / candidates the rows of the first layer's x; K = depth, N = cols.
struct Layer {
  int32_t cols, depth;
  Matrix x;          // (M, K); (B, K) in a labelled first layer
  Matrix weight;     // (N, K); contiguous where the optimizer runs, which updates it in place
  const void* bias;  // (N,), null: none; updated in place
  int64_t bias_stride;
  Vector x_sqnorm;  // (M,); where not given and needed it is computed. Layer l > 0: goodness of layer l - 1
  // from one minibatch to the next; of x, where it is not the network's own, to the other buffer
  int64_t x_minibatch, x_sqnorm_minibatch;
  Normalize normalize;
  Activation activation;
  float eps;

  // forward
  int32_t forward;
  void* y;  // (M, N), rows y_stride apart
  void* p;  // (M, N), likewise: y act'(z); null: not wanted
  int64_t y_stride;
  int64_t y_minibatch;  // to the other buffer of y; p has one
  float* goodness;      // (M,) contiguous

  // loss, where `loss` is given: it makes the update's coefficients
  float* loss;                            // ()
  Vector sign;                            // (M,); not given: see Params::positive_rows
  float threshold, temperature, divisor;  // divisor: E

  // update
  int32_t update;
  int32_t splits;             // of the rows, each a work item; >= 1, and at most ceil(M / kTile)
  int64_t split_offset;       // where the sums of its parts begin in Workspace::split
  Vector coef;                // (M,): c, where the loss does not make it
  Matrix gradient_y;          // (M, N): y, or p for activations other than relu
  Vector row_term;            // (M,): a
  Vector col_term;            // (N,): d
  void* grad_weight;          // (N, K) contiguous, of the layer's type, with OptimizerKind::store
  void* grad_bias;            // (N,); null: none
  const float* given_weight;  // (N, K) contiguous: a gradient from elsewhere, and no rows; null: none
  const float* given_bias;    // (N,), where there is a bias
  Optimizer optimizer;

  // peer normalisation in ff_network_step_ (instead of row_term and col_term); null: none
  float* peer_mean;  // (N,), updated
  float peer;        // lambda

  // dropout of this layer's input (layer > 0): the forward of layer l - 1 writes `x` of this layer beside its own y,
  // and its squared norms to `x_sqnorm`: both buffers of the launch's own
  double dropout;       // p; 0: none
  int32_t layer_index;  // in the network, for the random numbers
};

// Scratch memory. `words` must be zero before its first use and is left ready for the next launch; the rest may hold
// anything. One launch at a time may use a workspace. Every layer has its own part of each, since several may be at
// work on different minibatches. Sizes: see below.
struct Workspace {
  uint32_t* words;                          // word_count
  float* partial;                           // partial_count: goodness of a row over the columns of a tile
  float* loss_partial;                      // loss_partial_count
  float* rows;                              // row_vector_count
  float* split;                             // split_count
  float* columns;                           // column_count
  int32_t row_tiles, weight_tiles, widest;  // the most of any layer: tiles of rows, tiles of the weight; columns
};

// The minibatches of a launch, and the way from one to the next, in elements.
struct Minibatches {
  int32_t begin, end;
  int64_t sign, goodness, loss, dropout_seed;
};

struct Params {
  int32_t layers, stage_begin, stage_end;
  int32_t rows;           // M: rows of y; B * candidates with labels
  int32_t positive_rows;  // where a layer has no sign, these come first and the others are negative
  Minibatches minibatches;
  Labels labels;
  const int64_t* dropout_seed;  // (1,) a minibatch
  Workspace workspace;
  Layer layer[kMaxLayers];
};
static_assert(sizeof(Params) <= 4096, "kernel arguments");

FFKERNELS_EVERYWHERE constexpr int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// Work items of a stage, each for one block at a time: a grid larger than their number is waste.
FFKERNELS_EVERYWHERE constexpr int64_t forward_items(int64_t base_rows, int64_t cols) {
  return tiles(base_rows) * tiles(cols);
}
FFKERNELS_EVERYWHERE constexpr int64_t update_items(int64_t cols, int64_t depth, int64_t splits) {
  return tiles(cols) * tiles(depth) * splits;
}

// Of a layer:
// words: counters for row tiles, weight tiles, and column tiles, of which there are no more than weight tiles.
FFKERNELS_EVERYWHERE constexpr int64_t counter_count(int64_t row_tiles, int64_t weight_tiles) {
  return row_tiles + 2 * weight_tiles;
}
// Of y, and with dropout of the next layer's x.
FFKERNELS_EVERYWHERE constexpr int64_t partial_count(int64_t rows, int64_t widest) { return 2 * rows * tiles(widest); }
constexpr int kRowVectors = 4;  // of M floats
// The sums of a split weight tile and of its bias; only layers with splits > 1 count.
constexpr int kSplitFloats = kTile * kTile + kTile;
// Peer normalisation: the column terms d and the new means; then the sums of y's columns over the positive rows of each
// row tile. Not there without peers.
FFKERNELS_EVERYWHERE constexpr int64_t column_count(int64_t row_tiles, int64_t widest) {
  return (2 + row_tiles) * widest;
}

// Of all layers:
// words: two of the barrier, the blocks that left, for each layer the row tiles done and a word for the range of fp16
// of one minibatch and of the next; then the layers' counters.
constexpr int kBarrierWords = 0, kLeftWord = 2, kDoneWords = 3, kRangeWords = kDoneWords + kMaxLayers,
              kRowWords = kRangeWords + kInTurn * kMaxLayers;
constexpr int64_t word_count(int64_t layers, int64_t row_tiles, int64_t weight_tiles) {
  return kRowWords + layers * counter_count(row_tiles, weight_tiles);
}
// The layers' vectors; then the computed x_sqnorm of the first layer.
constexpr int64_t row_vector_count(int64_t layers, int64_t rows) { return (layers * kRowVectors + 1) * rows; }

}  // namespace ffkernels::cuda
