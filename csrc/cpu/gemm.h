// One block of x W^T in float32, portable: packed panels and a register tile that compilers vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/tensor.h"

namespace ffkernels {

// Rows and columns of a block of the result, and how much of K is packed at once: both panels stay in the L2 cache.
constexpr int64_t block_rows = 96, block_cols = 96, block_depth = 256;
// The register tile: 4 x 3 vectors of 4 floats and their operands fill the 16 registers of SSE2.
constexpr int64_t tile_rows = 4, tile_cols = 12;
static_assert(block_rows % tile_rows == 0 && block_cols % tile_cols == 0);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Copies `rows` rows from (row0, k0) on as tiles of `tile` rows, k after k; the last tile is filled up with zeros.
template <int64_t tile, typename T>
void pack(const Matrix<const T>& source, int64_t row0, int64_t rows, int64_t k0, int64_t depth, float* packed) {
  for (int64_t row = 0; row < rows; row += tile, packed += tile * depth) {
    const int64_t used = std::min(tile, rows - row);
    for (int64_t i = 0; i < tile; ++i) {
      if (i >= used) {
        for (int64_t k = 0; k < depth; ++k) packed[k * tile + i] = 0.f;
        continue;
      }
      const T* from = &source(row0 + row + i, k0);
      const int64_t stride = source.col_stride;
      for (int64_t k = 0; k < depth; ++k) packed[k * tile + i] = static_cast<float>(from[k * stride]);
    }
  }
}

// result[i][j] += sum over k of a[k][i] * b[k][j], one register tile.
inline void multiply_tile(int64_t depth, const float* a, const float* b, float* result, int64_t result_stride) {
  using Float4 = float __attribute__((vector_size(16), aligned(4), may_alias));
  constexpr int64_t vectors = tile_cols / 4;
  Float4 sum[tile_rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += tile_rows, b += tile_cols) {
    for (int64_t i = 0; i < tile_rows; ++i) {
      for (int64_t j = 0; j < vectors; ++j) sum[i][j] += a[i] * reinterpret_cast<const Float4*>(b)[j];
    }
  }
  for (int64_t i = 0; i < tile_rows; ++i) {
    for (int64_t j = 0; j < vectors; ++j) reinterpret_cast<Float4*>(result + i * result_stride)[j] += sum[i][j];
  }
}

// Scratch memory for blocks of at most the given size, and the block that was computed last.
class BlockGemm {
 public:
  BlockGemm(int64_t rows, int64_t cols, int64_t depth)
      : max_rows_(round_up(std::min(rows, block_rows), tile_rows)),
        stride_(round_up(std::min(cols, block_cols), tile_cols)),
        depth_(std::min(depth, block_depth)),
        // Not value-initialised: everything is written before it is read.
        memory_(new float[max_rows_ * stride_ + (max_rows_ + stride_) * depth_]) {}

  // Computes x[row0 : row0 + rows] W[col0 : col0 + cols]^T. The order of summation depends on nothing but K.
  template <typename T>
  void compute(const Matrix<const T>& x, int64_t row0, int64_t rows, const Matrix<const T>& weight, int64_t col0,
               int64_t cols) {
    float* packed_x = memory_.get() + max_rows_ * stride_;
    float* packed_weight = packed_x + max_rows_ * depth_;
    std::fill_n(memory_.get(), round_up(rows, tile_rows) * stride_, 0.f);
    for (int64_t k0 = 0; k0 < x.cols; k0 += depth_) {
      const int64_t depth = std::min(depth_, x.cols - k0);
      pack<tile_rows>(x, row0, rows, k0, depth, packed_x);
      pack<tile_cols>(weight, col0, cols, k0, depth, packed_weight);
      for (int64_t j = 0; j < cols; j += tile_cols) {
        for (int64_t i = 0; i < rows; i += tile_rows) {
          multiply_tile(depth, packed_x + i * depth, packed_weight + j * depth, memory_.get() + i * stride_ + j,
                        stride_);
        }
      }
    }
  }

  float* row(int64_t i) const { return memory_.get() + i * stride_; }

 private:
  int64_t max_rows_, stride_, depth_;
  std::unique_ptr<float[]> memory_;
};

}  // namespace ffkernels
