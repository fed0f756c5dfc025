// The product of two tiles, used in both directions: a block of 4 warps makes a (64, 64) tile of
//     forward   z (m, n)   = sum_k x[m, k] W[n, k]               both operands lie along k
//     update    dW (n, k)  = sum_m (u_m y[m, n]) x[m, k]         both operands lie across m, and y is scaled on the way
//
// mma.sync for bf16, fp16 and tf32; float32 tensors may be rounded to bf16 between shared memory and the product;
// Math::f32 multiplies and adds in float32. A fragment's k slots may hold any 16 (8) different k as long as both
// operands agree: for 4-byte elements slots are filled with k = t, t + 4, t + 8, t + 12 of lane t, which lie in the
// same place of neighbouring chunks.
#pragma once

#include "cuda/slabs.cuh"

namespace ffkernels::cuda {

// A warp makes a (32, 32) part of the tile. With mma: 2 x 4 products of (16, 8), 4 sums each; in float32: 8 x 4 sums.
constexpr int kSums = 32;
constexpr int kWarpTile = 32;

struct Lane {
  int lane, row, col;  // of the warp's part of the tile
};
__device__ inline Lane this_lane() {
  const int warp = threadIdx.x / 32;
  return {static_cast<int>(threadIdx.x % 32), warp / 2 * kWarpTile, warp % 2 * kWarpTile};
}

template <Math math>
__device__ inline void multiply(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float (&d)[4] = *reinterpret_cast<float (*)[4]>(sums);
  if constexpr (math == Math::fp16) {
    multiply_fp16(d, a, b0, b1);
  } else if constexpr (math == Math::tf32) {
    multiply_tf32(d, a, b0, b1);
  } else {
    multiply_bf16(d, a, b0, b1);
  }
}

// 8 floats of a row as fragment words: k = t, t + 4 for tf32 twice, or all four k of a lane for bf16.
template <Math math>
__device__ inline void forward_slab_mma(float (&sums)[kSums], uint32_t a_tile, uint32_t b_tile) {
  const Lane at = this_lane();
  const int lane = at.lane;
  const uint32_t own_a = a_tile + place<8>(at.row + lane % 16, lane / 16);
  const uint32_t own_b = b_tile + place<8>(at.col + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  if constexpr (element_bytes(math) == 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 elements: 2 chunks
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(a[i], (own_a ^ chunks(2 * k)) + 16 * i * 128);
        load_matrices(b[i], (own_b ^ chunks(2 * k)) + 16 * i * 128);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply<math>(sums + 16 * i + 4 * j, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // 16 elements: 4 chunks, two at a time
      uint32_t a[2][2][4], b[2][2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_matrices(a[i][half], (own_a ^ chunks(4 * k + 2 * half)) + 16 * i * 128);
          load_matrices(b[i][half], (own_b ^ chunks(4 * k + 2 * half)) + 16 * i * 128);
        }
      }
      if constexpr (math == Math::tf32) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              a[i][half][r] = round_tf32(__uint_as_float(a[i][half][r]));
              b[i][half][r] = round_tf32(__uint_as_float(b[i][half][r]));
            }
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const uint32_t (&from)[4] = b[j / 2][half];
              multiply<math>(sums + 16 * i + 4 * j, a[i][half], from[j % 2 * 2], from[j % 2 * 2 + 1]);
            }
          }
        }
      } else {
        const auto pair = [](uint32_t low, uint32_t high) {
          return pack_bf16(__uint_as_float(low), __uint_as_float(high));
        };
        uint32_t packed[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t (&from)[4] = b[j / 2][half];
            packed[j][half] = pair(from[j % 2 * 2], from[j % 2 * 2 + 1]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t own[4] = {pair(a[i][0][0], a[i][0][2]), pair(a[i][0][1], a[i][0][3]),
                                   pair(a[i][1][0], a[i][1][2]), pair(a[i][1][1], a[i][1][3])};
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply<math>(sums + 16 * i + 4 * j, own, packed[j][0], packed[j][1]);
        }
      }
    }
  }
}

__device__ inline float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Lane (p, q) of 4 x 8 sums rows p + 4 i and columns q + 8 j.
__device__ inline void forward_slab_f32(float (&sums)[kSums], uint32_t a_tile, uint32_t b_tile) {
  const Lane at = this_lane();
  const int p = at.lane / 8, q = at.lane % 8;
  const uint32_t own_a = a_tile + place<8>(at.row + p, 0), own_b = b_tile + place<8>(at.col + q, 0);
#pragma unroll 2
  for (int chunk = 0; chunk < 8; ++chunk) {
    float4 b[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = as_floats(load_shared16((own_b ^ chunks(chunk)) + 8 * j * 128));
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // row p + 4 i has 4 more than row p in its low bits where i is odd
      const float4 a = as_floats(load_shared16((own_a ^ chunks(chunk ^ i % 2 * 4)) + 4 * i * 128));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& sum = sums[4 * i + j];
        sum = fmaf(a.x, b[j].x, sum);
        sum = fmaf(a.y, b[j].y, sum);
        sum = fmaf(a.z, b[j].z, sum);
        sum = fmaf(a.w, b[j].w, sum);
      }
    }
  }
}

template <Math math>
__device__ inline void forward_slab(float (&sums)[kSums], uint32_t a_tile, uint32_t b_tile) {
  if constexpr (math == Math::f32) {
    forward_slab_f32(sums, a_tile, b_tile);
  } else {
    forward_slab_mma<math>(sums, a_tile, b_tile);
  }
}

// What the update multiplies y's rows by, in shared memory, a float a row of the slab: u; with fp16 2 c, and r follows.
struct RowScales {
  uint32_t scale;
  float range;  // fp16: a power of two that brings the coefficients into range
  bool paired;  // the slab's second half of y belongs to the same rows of x as its first, and is added to it
};

template <Math math>
__device__ inline void update_slab_mma(float (&sums)[kSums], uint32_t a_tile, uint32_t b_tile, const RowScales& rows) {
  using T = Element<math>;
  const Lane at = this_lane();
  const int lane = at.lane, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
    const uint32_t own_a = a_tile + place<8>(lane % 8 + lane / 16 * 8, at.row / 8 + lane / 8 % 2);
    const uint32_t own_b = b_tile + place<8>(lane % 16, at.col / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 rows
      if (k == 2 && rows.paired) return;
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices_transposed(a[i], (own_a ^ chunks(2 * i)) + 16 * k * 128);
        load_matrices_transposed(b[i], (own_b ^ chunks(2 * i)) + 16 * k * 128);
      }
      float u[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair = load_shared_pair(rows.scale + 4 * (16 * k + 2 * t + 8 * i));
        u[2 * i] = pair.x * rows.range;
        u[2 * i + 1] = pair.y * rows.range;
      }
      if constexpr (math == Math::fp16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // r x instead of r y: it is in range whatever the row's norm
          const float2 r = load_shared_pair(rows.scale + kVectorBytes + 4 * (16 * k + 2 * t + 8 * i));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t& word = b[j / 2][j % 2 * 2 + i];
            const float2 x = unpack<T>(word);
            word = pack<T>(x.x * r.x, x.y * r.y);
          }
        }
      }
      if (k < 2 && rows.paired) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 pair = load_shared_pair(rows.scale + 4 * (kSlab<math> / 2 + 16 * k + 2 * t + 8 * i));
          v[2 * i] = pair.x * rows.range;
          v[2 * i + 1] = pair.y * rows.range;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t other[4];
          load_matrices_transposed(other, (own_a ^ chunks(2 * i)) + (kSlab<math> / 2 + 16 * k) * 128);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float2 y = unpack<T>(a[i][r]), z = unpack<T>(other[r]);
            const int m = r / 2 * 2;
            a[i][r] = pack<T>(fmaf(z.x, v[m], y.x * u[m]), fmaf(z.y, v[m + 1], y.y * u[m + 1]));
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float2 y = unpack<T>(a[i][r]);
            a[i][r] = pack<T>(y.x * u[r / 2 * 2], y.y * u[r / 2 * 2 + 1]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply<math>(sums + 16 * i + 4 * j, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  } else {
    const int g = lane / 4;
    const uint32_t own_a = a_tile + place<16>(t, at.row / 4 + g / 4) + g % 4 * 4;
    const uint32_t own_b = b_tile + place<16>(t, at.col / 4 + g / 4) + g % 4 * 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // 16 rows: m = t, t + 4, t + 8, t + 12
      if (k == 1 && rows.paired) return;
      float a[2][2][4], b[4][4];  // [product][row g or g + 8][m], [product][m]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = 16 * k + t + 4 * i;
        const float u = load_shared_float(rows.scale + 4 * m);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          b[j][i] = load_shared_float((own_b ^ chunks(2 * j)) + (16 * k + 4 * i) * 256);
          float& own = a[j / 2][j % 2][i];
          own = load_shared_float((own_a ^ chunks(2 * j)) + (16 * k + 4 * i) * 256) * u;
        }
      }
      if (k == 0 && rows.paired) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = kSlab<math> / 2 + 4 * i;
          const float v = load_shared_float(rows.scale + 4 * (m + t));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float& own = a[j / 2][j % 2][i];
            own = fmaf(load_shared_float((own_a ^ chunks(2 * j)) + m * 256), v, own);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (math == Math::tf32) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t own[4] = {round_tf32(a[i][0][2 * half]), round_tf32(a[i][1][2 * half]),
                                     round_tf32(a[i][0][2 * half + 1]), round_tf32(a[i][1][2 * half + 1])};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              multiply<math>(sums + 16 * i + 4 * j, own, round_tf32(b[j][2 * half]), round_tf32(b[j][2 * half + 1]));
            }
          }
        } else {
          const uint32_t own[4] = {pack_bf16(a[i][0][0], a[i][0][1]), pack_bf16(a[i][1][0], a[i][1][1]),
                                   pack_bf16(a[i][0][2], a[i][0][3]), pack_bf16(a[i][1][2], a[i][1][3])};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply<math>(sums + 16 * i + 4 * j, own, pack_bf16(b[j][0], b[j][1]), pack_bf16(b[j][2], b[j][3]));
          }
        }
      }
    }
  }
}

// Lane (p, q) of 4 x 8 sums rows 4 p + i, 4 p + 16 + i and columns 4 q + j.
__device__ inline void update_slab_f32(float (&sums)[kSums], uint32_t a_tile, uint32_t b_tile, const RowScales& rows) {
  const Lane at = this_lane();
  const int p = at.lane / 8, q = at.lane % 8;
  const uint32_t own_a = a_tile + place<16>(0, at.row / 4 + p), own_b = b_tile + place<16>(0, at.col / 4 + q);
  const int count = rows.paired ? kSlab<Math::f32> / 2 : kSlab<Math::f32>;
#pragma unroll 4
  for (int m = 0; m < count; ++m) {
    const float u = load_shared_float(rows.scale + 4 * m);
    const uint32_t moved = chunks(m % 4 * 2), row = m * 256;
    const float4 x = as_floats(load_shared16((own_b ^ moved) + row));
    const float4 y0 = as_floats(load_shared16((own_a ^ moved) + row));
    const float4 y1 = as_floats(load_shared16((own_a ^ moved ^ chunks(4)) + row));
    const float b[4] = {x.x, x.y, x.z, x.w};
    float a[8] = {y0.x * u, y0.y * u, y0.z * u, y0.w * u, y1.x * u, y1.y * u, y1.z * u, y1.w * u};
    if (rows.paired) {
      constexpr int kHalf = kSlab<Math::f32> / 2;
      const float v = load_shared_float(rows.scale + 4 * (m + kHalf));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 z = as_floats(load_shared16((own_a ^ moved ^ chunks(4 * i)) + row + kHalf * 256));
        a[4 * i] = fmaf(z.x, v, a[4 * i]);
        a[4 * i + 1] = fmaf(z.y, v, a[4 * i + 1]);
        a[4 * i + 2] = fmaf(z.z, v, a[4 * i + 2]);
        a[4 * i + 3] = fmaf(z.w, v, a[4 * i + 3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[4 * i + j] = fmaf(a[i], b[j], sums[4 * i + j]);
    }
  }
}

template <Math math>
__device__ inline void update_slab(float (&sums)[kSums], uint32_t a_tile, uint32_t b_tile, const RowScales& rows) {
  if constexpr (math == Math::f32) {
    update_slab_f32(sums, a_tile, b_tile, rows);
  } else {
    update_slab_mma<math>(sums, a_tile, b_tile, rows);
  }
}

}  // namespace ffkernels::cuda
