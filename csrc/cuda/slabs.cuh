// A tile of an operand in shared memory, and the pipeline that brings one after the other there.
//
// Operands go through shared memory in slabs of 128 bytes of the summed dimension (64 elements of 2 bytes, 32 of 4),
// kPipeline slabs in flight. A slab is a row of 16-byte chunks for each row of the tile in memory; chunks change places
// within their row so that neither ldmatrix nor 32-bit reads of columns meet in a bank.
#pragma once

#include "cuda/values.cuh"

namespace ffkernels::cuda {

template <Math math>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Math::bf16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<Math::fp16> {
  using type = __half;
};
template <Math math>
using Element = typename ElementOf<math>::type;

template <Math math>
constexpr int kSlab = 128 / element_bytes(math);  // elements of the summed dimension in flight together
template <Math math>
constexpr int kAcrossChunks = kTile * element_bytes(math) / 16;  // of a row of an operand that lies across m
constexpr int kAlongChunks = 8;
constexpr int kVectorBytes = kTile * 4;  // room for the rows' scales in a pipeline stage

// Where 16-byte chunk `chunk` of row `row` stands, in bytes.
template <int chunks>
__device__ inline uint32_t place(int row, int chunk) {
  return (row * chunks + (chunks == 8 ? chunk ^ (row & 7) : chunk ^ ((row & 3) << 1))) * 16;
}

// Chunks further on in the same row: an exclusive or with the address, where the bits of both numbers differ.
__device__ constexpr uint32_t chunks(int count) { return 16 * count; }

// -- from global to shared memory

template <typename T>
struct Operand {
  const T* data;
  int row_bytes, col_stride;
  int rows, cols;
  int bytes;     // of one access, which is inside the matrix or outside: 16, 8, 4; 0: single elements
  int wrap = 0;  // rows from here on are those from 0 on once more; 0: none
  // A tile of row pairs: its second half holds the rows that lie `apart` rows behind those of the first half; nothing
  // where that is 0.
  bool paired = false;
  int apart = 0;
};

template <typename T>
__device__ inline Operand<T> operand(const Matrix& m, int rows, int cols) {
  const int row_bytes = static_cast<int>(m.row_stride) * static_cast<int>(sizeof(T));
  Operand<T> o = {static_cast<const T*>(m.data), row_bytes, static_cast<int>(m.col_stride), rows, cols, 0};
  if (m.col_stride == 1) {
    const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(m.data)) | row_bytes | cols * sizeof(T);
    o.bytes = bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
  }
  return o;
}

// A tile of kTileBytes with `chunks` chunks a row, `unit` bytes at a time; what lies outside the matrix becomes 0.
template <int chunks, int unit, typename T>
__device__ inline void load_units(uint32_t to, const Operand<T>& from, int first_row, int first_col) {
  constexpr int kUnits = chunks * 16 / unit, kRows = kThreads / kUnits, kTileRows = kTileBytes / (chunks * 16);
  const int own = threadIdx.x % kUnits, own_row = threadIdx.x / kUnits, row = first_row + own_row;
  const int col = first_col + own * static_cast<int>(unit / sizeof(T));
  const int rows = col < from.cols ? from.rows - row : 0;  // from the thread's first on
  const char* data = reinterpret_cast<const char*>(
      from.data + (unit == sizeof(T) ? static_cast<int64_t>(col) * from.col_stride : col));
  data += static_cast<int64_t>(row) * from.row_bytes;
#pragma unroll(unit < 8 ? 1 : sizeof(T) == 4 ? 2 : kTileRows / kRows)
  for (int i = 0; i < kTileRows / kRows; ++i, data += static_cast<int64_t>(kRows) * from.row_bytes) {
    if (from.paired && i * kRows == kTileRows / 2) {
      data += static_cast<int64_t>(from.apart - kTileRows / 2) * from.row_bytes;
    }
    const bool second = from.paired && i * kRows >= kTileRows / 2;
    const int at = second ? i * kRows - kTileRows / 2 : i * kRows;
    const bool absent = at >= rows || (second && from.apart == 0);
    const char* source = data;
    if (from.wrap > 0 && row + at >= from.wrap) source -= static_cast<int64_t>(from.wrap) * from.row_bytes;
    const uint32_t place_of_unit = to + place<chunks>(own_row + i * kRows, own * unit / 16) + own * unit % 16;
    if constexpr (unit >= 4) {
      copy<unit>(place_of_unit, source, absent);
    } else {
      store_shared2(place_of_unit, absent ? uint16_t{0} : *reinterpret_cast<const uint16_t*>(source));
    }
  }
}

template <int chunks, typename T>
__device__ inline void load_tile(uint32_t to, const Operand<T>& from, int first_row, int first_col) {
  if (from.bytes == 16) {
    load_units<chunks, 16>(to, from, first_row, first_col);
  } else if (from.bytes == 8) {
    load_units<chunks, 8>(to, from, first_row, first_col);
  } else if (sizeof(T) == 4 || from.bytes == 4) {
    load_units<chunks, 4>(to, from, first_row, first_col);
  } else if constexpr (sizeof(T) == 2) {
    load_units<chunks, 2>(to, from, first_row, first_col);
  }
}

// Runs compute(slot, step) for each step once load(slot, step) of it is there. Shared memory is free afterwards.
template <typename Load, typename Compute>
__device__ inline void pipeline(int steps, const Load& load, const Compute& compute) {
  constexpr int kAhead = kPipeline - 1;
  int slot = 1, free = 0;  // slot of step, and of step + kAhead
  for (int step = -kAhead; step < steps; ++step) {
    if (step >= 0) {
      wait_for_copies<kAhead - 1>();
      __syncthreads();  // the step's slab is there for all; the slab of the step before has been used by all
    }
    if (step + kAhead < steps) load(free, step + kAhead);
    copies_issued();
    if (step >= 0) compute(slot, step);
    slot = slot == kPipeline - 1 ? 0 : slot + 1;
    free = free == kPipeline - 1 ? 0 : free + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
}

}  // namespace ffkernels::cuda
