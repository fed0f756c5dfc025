// mma.sync, ldmatrix, stmatrix, movmatrix and wmma.
#include "matrix.h"

#include <algorithm>

#include "memory.h"

namespace ptx {

namespace {
struct ByteTable {
  float e4m3[256], e5m2[256];
  ByteTable() {
    for (int i = 0; i < 256; i++) {
      e4m3[i] = float(decode(uint32_t(i), kE4m3));
      e5m2[i] = float(decode(uint32_t(i), kE5m2));
    }
  }
};
const ByteTable byte_table;
}  // namespace

float element_value(uint32_t v, int type) {
  switch (type) {
    case kElF16:
      return f16_to_float(uint16_t(v));
    case kElBf16:
      return bf16_to_float(uint16_t(v));
    case kElTf32:
      return as_tf32(v);
    case kElE4m3:
      return byte_table.e4m3[v & 0xff];
    case kElE5m2:
      return byte_table.e5m2[v & 0xff];
    case kElS8:
      return int8_t(v);
    case kElU8:
      return uint8_t(v);
    case kElS4:
      return int32_t(v << 28) >> 28;
    case kElU4:
      return v & 15;
    default:
      return bits<float>(v);
  }
}

namespace {

void require_operands(Warp& w, const Insn& in) {
  for (int k = 0; k < in.nsrc; k++)
    if (defined(w, in, k) != kAll) undefined_operand("a fragment", ~defined(w, in, k));
}

// Gathers a fragment whose 32-bit registers hold `per` elements: register r of a lane holds row group + 8 * (r % 2) (of
// A), and from column 4 * per * (r / 2) + per * (lane % 4) on.
void gather_a(Warp& w, const Insn& in, int first, int regs, int type, int k, float* a) {
  int width = element_bits(type), per = 32 / width;
  uint32_t element_mask = width == 32 ? kAll : (1u << width) - 1;
  for (int r = 0; r < regs; r++) {
    const uint32_t* s = src<uint32_t>(w, in, first + r);
    for (int lane = 0; lane < kLanes; lane++) {
      int row = lane / 4 + 8 * (r & 1), col = (r >> 1) * 4 * per + (lane % 4) * per;
      for (int j = 0; j < per; j++)
        a[row * k + col + j] = element_value(s[lane] >> (j * width & 31) & element_mask, type);
    }
  }
}
void gather_b(Warp& w, const Insn& in, int first, int regs, int type, float* b) {
  int width = element_bits(type), per = 32 / width;
  uint32_t element_mask = width == 32 ? kAll : (1u << width) - 1;
  for (int r = 0; r < regs; r++) {
    const uint32_t* s = src<uint32_t>(w, in, first + r);
    for (int lane = 0; lane < kLanes; lane++) {
      int row = r * 4 * per + (lane % 4) * per, col = lane / 4;
      for (int j = 0; j < per; j++)
        b[(row + j) * 8 + col] = element_value(s[lane] >> (j * width & 31) & element_mask, type);
    }
  }
}

void mma_f64(Warp& w, const Insn& in, int rows, int k) {
  int na = rows / 8 * (k / 4), nb = k / 4, nc = rows / 4;
  double a[16 * 16], b[16 * 8];
  for (int r = 0; r < na; r++)
    for (int lane = 0; lane < kLanes; lane++) {
      int row = rows == 8 ? lane / 4 : lane / 4 + 8 * (r & 1), col = lane % 4 + 4 * (rows == 8 ? r : r >> 1);
      a[row * k + col] = src<double>(w, in, r)[lane];
    }
  for (int r = 0; r < nb; r++)
    for (int lane = 0; lane < kLanes; lane++) b[(lane % 4 + 4 * r) * 8 + lane / 4] = src<double>(w, in, na + r)[lane];
  for (int r = 0; r < nc; r++)
    for (int lane = 0; lane < kLanes; lane++) {
      int row = lane / 4 + 8 * (r >> 1), col = lane % 4 * 2 + (r & 1);
      double sum = src<double>(w, in, na + nb + r)[lane];
      for (int l = 0; l < k; l++) sum = std::fma(a[row * k + l], b[l * 8 + col], sum);
      // all sources were read before: d may overlap c only element by element
      dst<double>(w, in, r)[lane] = sum;
    }
}

// imm: type of a, type of b, type of d and c, rows | k << 8 | satfinite << 16
void mma(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  require_operands(w, in);
  int ta = int(in.imm[0]), tb = int(in.imm[1]), tc = int(in.imm[2]), k = in.imm[3] >> 8 & 0xff;
  if (ta == kElF64) return mma_f64(w, in, in.imm[3] & 0xff, k);
  int na = 16 * k * element_bits(ta) / 1024, nb = k * 8 * element_bits(tb) / 1024;
  float a[16 * 64], b[64 * 8];
  gather_a(w, in, 0, na, ta, k, a);
  gather_b(w, in, na, nb, tb, b);
  int first_c = na + nb;
  if (is_integer(ta)) {
    bool sat = in.imm[3] >> 16;
    for (int r = 0; r < 4; r++)
      for (int lane = 0; lane < kLanes; lane++) {
        int row = lane / 4 + 8 * (r >> 1), col = lane % 4 * 2 + (r & 1);
        int64_t sum = src<int32_t>(w, in, first_c + r)[lane];
        for (int l = 0; l < k; l++) sum += int64_t(a[row * k + l]) * int64_t(b[l * 8 + col]);
        if (sat) sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
        dst<int32_t>(w, in, r)[lane] = int32_t(sum);
      }
    return;
  }
  float c[16 * 8];
  auto element = [](int lane, int e) { return (lane / 4 + 8 * (e >> 1)) * 8 + lane % 4 * 2 + (e & 1); };
  for (int e = 0; e < 4; e++)
    for (int lane = 0; lane < kLanes; lane++)
      c[element(lane, e)] = tc == kElF32 ? src<float>(w, in, first_c + e)[lane]
                                         : f16_to_float(src<uint16_t>(w, in, first_c + e / 2)[2 * lane + (e & 1)]);
  multiply_add(c, a, b, 16, 8, k);
  for (int e = 0; e < 4; e++)
    for (int lane = 0; lane < kLanes; lane++) {
      float v = canonical(c[element(lane, e)]);
      if (tc == kElF32)
        dst<float>(w, in, e)[lane] = v;
      else
        dst<uint16_t>(w, in, e / 2)[2 * lane + (e & 1)] = float_to_f16(v);
    }
}

// imm: offset, transposed, unused, address bytes; as many destinations as matrices
void matrix_rows(Warp& w, const Insn& in, int count, bool write, Place* rows) {
  Mask need = count == 4 ? kAll : (1u << 8 * count) - 1;
  if (need & ~defined(w, in, 0)) undefined_operand("a row's address", need & ~defined(w, in, 0));
  uint64_t addr[kLanes];
  addresses(w, in, 0, in.imm[0], addr);
  uint32_t offsets[kLanes];
  for (int i = 0; i < 8 * count; i++) {
    rows[i] = locate(w, i, addr[i], space_of(in), 16, write, 16);
    if (!rows[i].region || rows[i].region->space != kShared)
      throw Fault{"wrong space", "a matrix outside shared memory", i};
    offsets[i] = uint32_t(rows[i].offset);
  }
  Counters& c = w.launch->counters[w.at];
  c.wavefronts += wavefronts(offsets, 8 * count, 16);
  c.ideal_wavefronts += count;
  c.bytes += 128 * count;
}
void ldmatrix(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  Place rows[kLanes];
  matrix_rows(w, in, in.ndst, false, rows);
  uint16_t data[kLanes][8];
  for (int i = 0; i < 8 * in.ndst; i++) {
    require_defined(i, rows[i], 16);
    note_read(w, i, rows[i], 16, Actor());
    note_lane_read(w, i, rows[i], 16);
    std::memcpy(data[i], rows[i].data, 16);
  }
  for (int k = 0; k < in.ndst; k++) {
    uint16_t* d = dst<uint16_t>(w, in, k);
    for (int lane = 0; lane < kLanes; lane++)
      for (int j = 0; j < 2; j++) {
        int row = lane / 4, col = lane % 4 * 2 + j;
        d[2 * lane + j] = in.imm[1] ? data[8 * k + col][row] : data[8 * k + row][col];
      }
  }
}
void stmatrix(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  int count = in.nsrc - 1;
  Place rows[kLanes];
  matrix_rows(w, in, count, true, rows);
  for (int k = 0; k < count; k++) {
    Mask ok = defined(w, in, 1 + k);
    const uint16_t* s = src<uint16_t>(w, in, 1 + k);
    for (int row = 0; row < 8; row++) {
      const Place& p = rows[8 * k + row];
      uint16_t data[8];
      for (int col = 0; col < 8; col++) {
        int r = in.imm[1] ? col : row, c = in.imm[1] ? row : col, lane = r * 4 + c / 2;
        data[col] = s[2 * lane + (c & 1)];
        std::memset(p.state + 2 * col, ok >> lane & 1 ? kDefined : kUndefinedValue, 2);
      }
      note_write(w, 8 * k + row, p, 16, Actor(), data);
      note_lane_write(w, 8 * k + row, p, 16);
      std::memcpy(p.data, data, 16);
    }
  }
}
void movmatrix(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  uint16_t data[8][8];
  const uint16_t* s = src<uint16_t>(w, in, 0);
  for (int lane = 0; lane < kLanes; lane++)
    for (int j = 0; j < 2; j++) data[lane / 4][lane % 4 * 2 + j] = s[2 * lane + j];
  uint16_t* d = dst<uint16_t>(w, in, 0);
  for (int lane = 0; lane < kLanes; lane++)
    for (int j = 0; j < 2; j++) d[2 * lane + j] = data[lane % 4 * 2 + j][lane / 4];
}

// The layout of wmma fragments is not specified. Here the elements lie row-major over (lane, register); formats whose
// fragments have twice the room hold a second copy.
struct WmmaShape {
  int rows, cols, type;
  bool column_major;
};
WmmaShape wmma_shape(const Insn& in) {
  return {int(in.imm[1] & 0xff), int(in.imm[1] >> 8 & 0xff), int(in.imm[1] >> 16 & 0xff), bool(in.imm[1] >> 24 & 1)};
}

template <class F>
void wmma_elements(const Warp& w, const Insn& in, int first_op, int nregs, const WmmaShape& s, F f) {
  int bytes = element_bits(s.type) / 8, reg_bytes = s.type == kElF64 ? 8 : 4, per_reg = reg_bytes / bytes,
      per_lane = nregs * per_reg;
  int total = s.rows * s.cols, copies = per_lane * kLanes / total;
  for (int c = 0; c < copies; c++)
    for (int e = 0; e < total; e++) {
      int slot = c * total + e, lane = slot / per_lane, within = slot % per_lane;
      f(e / s.cols, e % s.cols,
        at(w, in.ops[first_op + within / per_reg]) + lane * reg_bytes + within % per_reg * bytes, lane);
    }
}
// imm: offset, shape, whether a stride is given, address bytes. Sources: address, (stride)
void wmma_place(Warp& w, const Insn& in, const WmmaShape& s, int row, int col, int stride_op, bool write, int lane,
                Place& p) {
  int bytes = element_bits(s.type) / 8;
  int64_t stride = stride_op >= 0 ? int64_t(src<uint32_t>(w, in, stride_op)[lane]) : (s.column_major ? s.rows : s.cols);
  uint64_t addr[kLanes];
  addresses(w, in, 0, in.imm[0], addr);
  int64_t index = s.column_major ? col * stride + row : row * stride + col;
  p = locate(w, lane, addr[lane] + uint64_t(index * bytes), space_of(in), bytes, write, bytes);
}
void wmma_load(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  WmmaShape s = wmma_shape(in);
  int bytes = element_bits(s.type) / 8;
  wmma_elements(w, in, 0, in.ndst, s, [&](int row, int col, char* slot, int lane) {
    Place p;
    wmma_place(w, in, s, row, col, in.imm[2] ? 1 : -1, false, lane, p);
    if (p.region) {
      require_defined(lane, p, bytes);
      note_read(w, lane, p, bytes, Actor());
    }
    std::memcpy(slot, p.data, bytes);
  });
  w.launch->counters[w.at].bytes += uint64_t(s.rows) * s.cols * bytes;
}
void wmma_store(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  require_operands(w, in);
  WmmaShape s = wmma_shape(in);
  int bytes = element_bits(s.type) / 8, first = in.imm[2] ? 2 : 1;
  wmma_elements(w, in, first, in.nsrc - first, s, [&](int row, int col, char* slot, int lane) {
    Place p;
    wmma_place(w, in, s, row, col, in.imm[2] ? 1 : -1, true, lane, p);
    note_write(w, lane, p, bytes, Actor(), slot);
    std::memcpy(p.data, slot, bytes);
    std::memset(p.state, kDefined, bytes);
  });
  w.launch->counters[w.at].bytes += uint64_t(s.rows) * s.cols * bytes;
}
// imm: m | n << 8 | k << 16, types a | b << 8 | c << 16 | d << 24, registers of a | b << 8 | c << 16, satfinite
void wmma_mma(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  require_operands(w, in);
  int rows = in.imm[0] & 0xff, cols = in.imm[0] >> 8 & 0xff, k = in.imm[0] >> 16 & 0xff;
  int ta = in.imm[1] & 0xff, tb = in.imm[1] >> 8 & 0xff, tc = in.imm[1] >> 16 & 0xff, td = in.imm[1] >> 24 & 0xff;
  int na = in.imm[2] & 0xff, nb = in.imm[2] >> 8 & 0xff, nc = in.imm[2] >> 16 & 0xff, first = in.ndst;
  std::vector<double> a(rows * k), b(k * cols), c(rows * cols);
  auto number = [](const char* slot, int type) -> double {
    if (type == kElF64) return *reinterpret_cast<const double*>(slot);
    if (type == kElS32) return *reinterpret_cast<const int32_t*>(slot);
    uint32_t v = 0;
    std::memcpy(&v, slot, element_bits(type) / 8);
    return element_value(v, type);
  };
  wmma_elements(w, in, first, na, {rows, k, ta, false},
                [&](int r, int q, char* s, int) { a[r * k + q] = number(s, ta); });
  wmma_elements(w, in, first + na, nb, {k, cols, tb, false},
                [&](int r, int q, char* s, int) { b[r * cols + q] = number(s, tb); });
  wmma_elements(w, in, first + na + nb, nc, {rows, cols, tc, false},
                [&](int r, int q, char* s, int) { c[r * cols + q] = number(s, tc); });
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++)
      for (int l = 0; l < k; l++) c[i * cols + j] += a[i * k + l] * b[l * cols + j];
  wmma_elements(w, in, 0, in.ndst, {rows, cols, td, false}, [&](int r, int q, char* slot, int) {
    double v = c[r * cols + q];
    if (td == kElF64) {
      *reinterpret_cast<double*>(slot) = v;
    } else if (td == kElS32) {
      if (in.imm[3]) v = std::min(std::max(v, double(INT32_MIN)), double(INT32_MAX));
      *reinterpret_cast<int32_t*>(slot) = int32_t(int64_t(v));
    } else if (td == kElF16) {
      *reinterpret_cast<uint16_t*>(slot) = float_to_f16(float(v));
    } else {
      *reinterpret_cast<float*>(slot) = canonical(float(v));
    }
  });
}

const Register handlers{{"mma", mma},
                        {"ldmatrix", ldmatrix},
                        {"stmatrix", stmatrix},
                        {"movmatrix", movmatrix},
                        {"wmma.load", wmma_load},
                        {"wmma.store", wmma_store},
                        {"wmma.mma", wmma_mma}};

}  // namespace
}  // namespace ptx
