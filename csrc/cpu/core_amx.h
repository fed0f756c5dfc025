// The bf16 GEMM cores on AMX tiles: 2 x 2 tiles of 16 x 16 results. Included by amx.cpp.
#pragma once

#include "cpu/panels_bf16.h"

namespace ffkernels::cpu::FFK_NAMESPACE {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// static: gcc drops stores to a configuration on the stack
static const TileConfig tile_config;

// parts = 1: bf16 operands. parts = 2: each the sum of two, and three of the four products.
template <int64_t parts>
struct CoreAmx : PanelsBf16<parts> {
  static constexpr int64_t kTile = PanelsBf16<parts>::kTile, kStep = PanelsBf16<parts>::kStep;
  static constexpr int64_t kFetches = 1;
  static constexpr int64_t kGradientCols = 256;  // x is read once for each block, and tiles outrun the L3 cache

  static void enter() { _tile_loadconfig(&tile_config); }
  static void leave() { _tile_release(); }

  // c (32, 32) = or += a b
  static void multiply(const Extent& used, const char* a, const char* b, float* c, int64_t stride, bool accumulate,
                       Ahead* ahead) {
    const int64_t bytes = stride * 4;
    float* lower = c + 16 * stride;
    if (accumulate) {
      _tile_loadd(0, c, bytes);
      _tile_loadd(1, c + 16, bytes);
      _tile_loadd(2, lower, bytes);
      _tile_loadd(3, lower + 16, bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < used.depth; k += 32, a += kStep, b += kStep) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kTile, 64);
      ahead->fetch();
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      if constexpr (parts == 2) {
        _tile_loadd(4, a + 2 * kTile, 64);  // the rest of a by b
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 3 * kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, b + 2 * kTile, 64);  // a by the rest of b
        _tile_loadd(7, b + 3 * kTile, 64);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + 16, bytes);
    _tile_stored(2, lower, bytes);
    _tile_stored(3, lower + 16, bytes);
  }
};

}  // namespace ffkernels::cpu::FFK_NAMESPACE
