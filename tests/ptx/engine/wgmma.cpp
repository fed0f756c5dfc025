// wgmma: matrix products of a warpgroup on shared memory, asynchronous until waited for.
#include "async.h"
#include "matrix.h"

namespace ptx {
namespace {

constexpr int kWarpsAGroup = 4;

// A matrix descriptor: start, leading and stride offsets in bytes, and the bytes of a swizzled row (16: not swizzled).
struct Descriptor {
  uint32_t start, leading, stride, row;
};
Descriptor descriptor(uint64_t d) {
  static const uint32_t rows[] = {16, 128, 64, 32};
  if (d >> 49 & 7) throw Fault{"not implemented", "a matrix descriptor with a base offset"};
  return {uint32_t(d & 0x3fff) << 4, uint32_t(d >> 16 & 0x3fff) << 4, uint32_t(d >> 32 & 0x3fff) << 4, rows[d >> 62]};
}

// The 16-byte chunk that holds row `major` (m or n), byte `inner` of k, for operands with k contiguous.
uint32_t k_major_chunk(const Descriptor& d, int major, int inner) {
  uint32_t at = d.start + major / 8 * d.stride + major % 8 * d.row;
  return d.row == 16 ? at + inner / 16 * d.leading : at + inner;
}
// The chunk of row k that holds byte `inner` of m or n, for operands with m or n contiguous.
uint32_t mn_major_chunk(const Descriptor& d, int k, int inner) {
  uint32_t at = d.start + k % 8 * d.row;
  if (d.row == 16) return at + k / 8 * d.leading + inner / 16 * d.stride;
  return at + k / 8 * d.stride + inner / d.row * d.leading + inner % d.row;
}

// Reads a chunk through the async proxy.
const uint8_t* chunk(Warp& w, const Descriptor& d, uint32_t offset, const Actor& who) {
  if (d.row != 16) offset ^= (offset >> 7 & (d.row / 16 - 1)) << 4;
  Place p = locate(w, 0, offset, kShared, 16, false, 16);
  require_defined(0, p, 16);
  note_read(w, 0, p, 16, who);
  return p.data;
}

uint32_t element_bits_at(const uint8_t* p, int bytes) {
  uint32_t v = 0;
  std::memcpy(&v, p, bytes);
  return v;
}

// rows x k values, row-major, from row `first` of the operand on
void read_operand(Warp& w, const Descriptor& d, bool mn_major, int type, int first, int rows, int k, const Actor& who,
                  float* out) {
  int bytes = element_bits(type) / 8, per = 16 / bytes;
  if (mn_major) {
    for (int l = 0; l < k; l++)
      for (int r = 0; r < rows; r += per) {
        const uint8_t* p = chunk(w, d, mn_major_chunk(d, l, (first + r) * bytes), who);
        for (int j = 0; j < per; j++) out[(r + j) * k + l] = element_value(element_bits_at(p + j * bytes, bytes), type);
      }
    return;
  }
  for (int r = 0; r < rows; r++)
    for (int l = 0; l < k; l += per) {
      const uint8_t* p = chunk(w, d, k_major_chunk(d, first + r, l * bytes), who);
      for (int j = 0; j < per; j++) out[r * k + l + j] = element_value(element_bits_at(p + j * bytes, bytes), type);
    }
}

// A register must not have been written since the last wgmma.fence.
void require_fenced(Warp& w, Operand o, const char* what) {
  if (w.written_after[o.reg] == w.fences)
    throw Fault{"missing wgmma.fence", std::string(what) + " was written since the last wgmma.fence"};
}

// imm: n | k << 16, types a | b << 8 | d << 16, a in registers | transposed a << 1 | transposed b << 2 | negated a << 3
// | negated b << 4. Sources: accumulators, a (registers or descriptor), descriptor of b, scale-d
void mma_async(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  if (w.index / kWarpsAGroup * kWarpsAGroup + kWarpsAGroup > w.launch->nwarps)
    throw Fault{"warp operation by part of a warp", "a wgmma outside a complete warpgroup"};
  int n = in.imm[0] & 0xffff, k = in.imm[0] >> 16, ta = in.imm[1] & 0xff, tb = in.imm[1] >> 8 & 0xff,
      td = in.imm[1] >> 16 & 0xff;
  bool a_registers = in.imm[2] & 1, trans_a = in.imm[2] >> 1 & 1, trans_b = in.imm[2] >> 2 & 1;
  bool negate = bool(in.imm[2] >> 3 & 1) != bool(in.imm[2] >> 4 & 1);
  int acc = in.ndst, na = a_registers ? 4 : 1;
  Mask scale = pred(w, in.ops[in.ndst + acc + na + 1]);
  if (scale != 0 && scale != kAll) throw Fault{"invalid operand", "scale-d differs between the threads of a warp"};
  for (int r = 0; r < acc; r++) {
    require_fenced(w, in.ops[r], "an accumulator");
    if (scale && w.init[in.ops[r].reg] != kAll) undefined_operand("an accumulator", ~w.init[in.ops[r].reg]);
    w.init[in.ops[r].reg] = kAll;
  }
  for (int k2 = 0; k2 <= na; k2++)
    if (defined(w, in, acc + k2) != kAll) undefined_operand("a source", ~defined(w, in, acc + k2));
  Actor who = async_actor(w, kWgmmaAgent);
  std::vector<float> a(16 * k), b(size_t(n) * k), bt(size_t(n) * k), c(size_t(16) * n);
  if (a_registers) {
    int width = element_bits(ta), per = 32 / width;
    for (int r = 0; r < 4; r++) {
      require_fenced(w, in.ops[in.ndst + acc + r], "a source");
      const uint32_t* s = src<uint32_t>(w, in, acc + r);
      for (int lane = 0; lane < kLanes; lane++)
        for (int j = 0; j < per; j++)
          a[(lane / 4 + 8 * (r & 1)) * k + (r >> 1) * 4 * per + (lane % 4) * per + j] =
              element_value(width == 32 ? s[lane] : s[lane] >> j * width & ((1u << width) - 1), ta);
    }
  } else {
    uint64_t d = src<uint64_t>(w, in, acc)[0];
    read_operand(w, descriptor(d), trans_a, ta, 16 * (w.index % kWarpsAGroup), 16, k, who, a.data());
  }
  read_operand(w, descriptor(src<uint64_t>(w, in, acc + na)[0]), trans_b, tb, 0, n, k, who, bt.data());
  for (int j = 0; j < n; j++)
    for (int l = 0; l < k; l++) b[size_t(l) * n + j] = negate ? -bt[size_t(j) * k + l] : bt[size_t(j) * k + l];
  auto element = [&](int lane, int e) {
    return size_t(lane / 4 + 8 * (e >> 1 & 1)) * n + (e >> 2) * 8 + lane % 4 * 2 + (e & 1);
  };
  if (td == kElS32) {
    for (int e = 0; e < n / 2; e++)
      for (int lane = 0; lane < kLanes; lane++) {
        size_t at_c = element(lane, e), row = at_c / n, col = at_c % n;
        int64_t sum = scale ? src<int32_t>(w, in, e)[lane] : 0;
        for (int l = 0; l < k; l++) sum += int64_t(a[row * k + l]) * int64_t(b[size_t(l) * n + col]);
        if (in.imm[2] >> 5 & 1) sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
        dst<int32_t>(w, in, e)[lane] = int32_t(sum);
      }
  } else {
    for (int e = 0; scale && e < n / 2; e++)
      for (int lane = 0; lane < kLanes; lane++)
        c[element(lane, e)] =
            td == kElF32 ? src<float>(w, in, e)[lane] : f16_to_float(src<uint16_t>(w, in, e / 2)[2 * lane + (e & 1)]);
    multiply_add(c.data(), a.data(), b.data(), 16, n, k);
    for (int e = 0; e < n / 2; e++)
      for (int lane = 0; lane < kLanes; lane++) {
        float v = canonical(c[element(lane, e)]);
        if (td == kElF32)
          dst<float>(w, in, e)[lane] = v;
        else
          dst<uint16_t>(w, in, e / 2)[2 * lane + (e & 1)] = float_to_f16(v);
      }
  }
  uint32_t group = w.sequence[kWgmmaAgent];
  for (int r = 0; r < acc; r++) w.accumulator_of[in.ops[r].reg] = group;
  if (a_registers)
    for (int r = 0; r < 4; r++) w.source_of[in.ops[in.ndst + acc + r].reg] = group;
}

void wgmma_fence(Warp& w, const Insn&, Mask m) {
  if (!full_warp(w, m)) return;
  w.fences++;
}
void wgmma_commit(Warp& w, const Insn&, Mask m) {
  if (!full_warp(w, m)) return;
  commit_group(w, kWgmmaAgent, w.wgmma_groups, m);
}
void wgmma_wait(Warp& w, const Insn& in, Mask m) {
  if (!full_warp(w, m)) return;
  wait_groups(w, kWgmmaAgent, w.wgmma_groups, m, uint32_t(in.imm[0]));
  w.wgmma_done = w.vc.local[agent_index(w, kWgmmaAgent)];
}

const Register handlers{{"wgmma.mma_async", mma_async},
                        {"wgmma.fence", wgmma_fence},
                        {"wgmma.commit", wgmma_commit},
                        {"wgmma.wait", wgmma_wait}};

}  // namespace
}  // namespace ptx
