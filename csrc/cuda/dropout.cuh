// Dropout by a counter-based generator: the same mask on every backend (ffkernels/dropout.py has the formula).
#pragma once

#include "cuda/values.cuh"

namespace ffkernels::cuda {

// Philox4x32-10 (Salmon et al. 2011, section 4.3).
__device__ inline uint4 philox(uint2 key, uint4 c) {
#pragma unroll 2
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ key.x, low1, high0 ^ c.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return c;
}

struct Dropout {
  uint2 key;
  uint32_t layer, below;  // an input is dropped where its bits are below this number
  float scale;            // 1 / (1 - p)
};

__device__ inline Dropout begin_dropout(const Params& params, const Layer& layer, int minibatch) {
  const int64_t seed = params.dropout_seed[minibatch * params.minibatches.dropout_seed];
  return {make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)),
          static_cast<uint32_t>(layer.layer_index), static_cast<uint32_t>(layer.dropout * 4294967296.0),
          static_cast<float>(1.0 / (1.0 - layer.dropout))};
}

// Writes columns col .. col + 3 of row m of the next layer's input x, made of y; returns the sum of its squares.
template <typename T>
__device__ inline float drop_four(const Dropout& dropout, const Matrix& x, int m, int col, const float (&y)[4],
                                  int count) {
  const uint4 words = philox(dropout.key, make_uint4(col / 4, m, dropout.layer, 0));
  const uint32_t bits[4] = {words.x, words.y, words.z, words.w};
  float v[4], squares = 0.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float kept = to_float(from_float<T>(y[j])) * dropout.scale;
    v[j] = bits[j] < dropout.below ? 0.f : to_float(from_float<T>(kept));
    if (j < count) squares = fmaf(v[j], v[j], squares);
  }
  T* to = static_cast<T*>(const_cast<void*>(x.data)) + m * x.row_stride + col;
  store_four(to, v, count, count == 4 && aligned_for_four(x.data, x.row_stride, sizeof(T)));
  return squares;
}

}  // namespace ffkernels::cuda
