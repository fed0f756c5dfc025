// Sums of a tile: those that are made of a slab beside the product, in float32 and before anything is rounded for it;
// and the product's own, brought from the warps' registers to shared memory row by row.
#pragma once

#include "cuda/products.cuh"

namespace ffkernels::cuda {

template <typename T>
__device__ inline float2 two_values(uint32_t word, uint32_t next) {
  if constexpr (sizeof(T) == 4) {
    return {__uint_as_float(word), __uint_as_float(next)};
  } else {
    return unpack<T>(word);
  }
}

// Of x that lies along k: the squares of half a row, row threadIdx.x / 2.
template <typename T>
__device__ inline float half_row_squares(uint32_t tile) {
  const int row = threadIdx.x / 2;
  const uint32_t own = tile + place<8>(row, threadIdx.x % 2 * 4);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 words = load_shared16(own ^ chunks(i));
    const uint32_t w[5] = {words.x, words.y, words.z, words.w, 0};
#pragma unroll
    for (int j = 0; j < 4; j += sizeof(T) / 2) {
      const float2 v = two_values<T>(w[j], w[j + 1]);
      sum = fmaf(v.x, v.x, fmaf(v.y, v.y, sum));
    }
  }
  return sum;
}

// Of an operand that lies across m: adds weight(m) times row m to the sums of columns 2 l and 2 l + 1 of lane l, over
// the warp's share of the slab's rows.
template <Math math, typename Weight>
__device__ inline void add_columns(float2& sum, uint32_t tile, const Weight& weight) {
  constexpr int kBytes = 2 * element_bytes(math), kChunks = kAcrossChunks<math>, kRows = kSlab<math> / (kThreads / 32);
  const int byte = threadIdx.x % 32 * kBytes, first = threadIdx.x / 32 * kRows;
#pragma unroll 4
  for (int i = 0; i < kRows; ++i) {
    const uint32_t from = tile + place<kChunks>(first + i, byte / 16) + byte % 16;
    float2 v;
    if constexpr (element_bytes(math) == 4) {
      v = load_shared_pair(from);
    } else {
      v = unpack<Element<math>>(__float_as_uint(load_shared_float(from)));
    }
    const float w = weight(first + i);
    sum.x = fmaf(w, v.x, sum.x);
    sum.y = fmaf(w, v.y, sum.y);
  }
}

// Leaves the warps' sums of columns in shared memory, to be added by whoever needs column i.
__device__ inline void leave_columns(float* sums, float2 own) {
  *reinterpret_cast<float2*>(sums + threadIdx.x / 32 * kTile + threadIdx.x % 32 * 2) = own;
}
__device__ inline float column_sum(const float* sums, int i) {
  return ((sums[i] + sums[kTile + i]) + sums[2 * kTile + i]) + sums[3 * kTile + i];
}

// -- the product, row by row

constexpr int kStagePitch = 72;  // floats
constexpr int kStageBytes = kTile * kStagePitch * 4;
static_assert(kStageBytes + 8192 <= kPipeline * 2 * kTileBytes,
              "the sums and the epilogue's vectors take the slabs' place");

template <Math math, bool update>
__device__ inline void stage_sums(float* stage, const float (&sums)[kSums]) {
  const Lane at = this_lane();
  const int lane = at.lane;
  const uint32_t to = shared_address(stage + at.row * kStagePitch + at.col);
  if constexpr (math != Math::f32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* own = sums + i / 2 * 16 + 4 * j + i % 2 * 2;
        const int place = (lane / 4 + 8 * i) * kStagePitch + 8 * j + lane % 4 * 2;
        store_shared8(to + 4 * place, __float_as_uint(own[0]), __float_as_uint(own[1]));
      }
    }
  } else if constexpr (update) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* own = sums + 4 * i;
      store_shared16(to + 4 * ((lane / 8 * 4 + i / 4 * 16 + i % 4) * kStagePitch + lane % 8 * 4),
                     make_uint4(__float_as_uint(own[0]), __float_as_uint(own[1]), __float_as_uint(own[2]),
                                __float_as_uint(own[3])));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        stage[(at.row + lane / 8 + 4 * i) * kStagePitch + at.col + lane % 8 + 8 * j] = sums[4 * i + j];
      }
    }
  }
}

// A thread's part of the staged tile in the epilogues: columns 4 c .. 4 c + 3 of rows r + 8 i.
constexpr int kEpilogueRows = kThreads / 16;
__device__ inline float4 staged_four(const float* stage, int row, int four) {
  return *reinterpret_cast<const float4*>(stage + row * kStagePitch + 4 * four);
}

}  // namespace ffkernels::cuda
