// Bulk copies (TMA): linear and by tensor map, and the tensor maps themselves.
#include <algorithm>

#include "async.h"
#include "numeric.h"

namespace ptx {
namespace {

// A tensor map as this engine lays it out in its 128 bytes; the hardware's layout is not documented. Fields are those
// of tensormap.replace. Python's tensor_map writes the same.
struct TensorMap {
  uint64_t address;
  uint8_t rank_minus_one, type, interleave, swizzle, fill, unused[3];
  uint32_t box[5], size[5], element_stride[5], pad;
  uint64_t stride[4];
  uint8_t rest[16];
};
static_assert(sizeof(TensorMap) == 128);

int type_bytes(int type) {
  static const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  if (type >= int(sizeof sizes / sizeof *sizes))
    throw Fault{"not implemented", format("element type %d of a tensor map", type)};
  return sizes[type];
}

uint64_t base_address(Warp& w, const Insn& in, int op, int lane, int bytes) {
  return bytes == 4 ? src<uint32_t>(w, in, op)[lane] : src<uint64_t>(w, in, op)[lane];
}

uint32_t swizzled(uint32_t offset, int mode) {
  static const uint32_t bits[] = {0, 1, 3, 7};
  return offset ^ (offset >> 7 & bits[mode]) << 4;
}

TensorMap read_map(Warp& w, int lane, uint64_t addr) {
  Place p = locate(w, lane, addr, kGeneric, 128, false, 64);
  if (!p.region) throw Fault{"wrong space", "a tensor map in local memory", lane};
  require_defined(lane, p, 128);
  note_read(w, lane, p, 128, Actor());
  TensorMap t;
  std::memcpy(&t, p.data, 128);
  int rank = t.rank_minus_one + 1, bytes = type_bytes(t.type);
  auto bad = [&](const std::string& why) { throw Fault{"invalid tensor map", why, lane}; };
  if (rank > 5) bad(format("rank %d", rank));
  if (t.interleave) throw Fault{"not implemented", "an interleaved tensor map", lane};
  if (t.address & 15) bad("the global address is not a multiple of 16");
  if (t.swizzle > 3) bad(format("swizzle mode %d", t.swizzle));
  for (int i = 0; i < rank; i++) {
    if (t.size[i] == 0) bad(format("dimension %d is empty", i));
    if (t.box[i] == 0 || t.box[i] > 256) bad(format("box dimension %d is %u", i, t.box[i]));
    if (t.element_stride[i] != 1)
      throw Fault{"not implemented", format("element stride %u of a tensor map", t.element_stride[i]), lane};
    if (i && t.stride[i - 1] % 16)
      bad(format("stride %d is %llu bytes, no multiple of 16", i - 1,
                 static_cast<unsigned long long>(t.stride[i - 1])));
  }
  if (t.box[0] * bytes % 16) bad(format("rows of %u bytes, no multiple of 16", t.box[0] * bytes));
  if (t.swizzle && t.box[0] * bytes > uint32_t(16 << t.swizzle))
    bad(format("rows of %u bytes in swizzle mode %d", t.box[0] * bytes, t.swizzle));
  return t;
}

uint64_t box_bytes(const TensorMap& t) {
  uint64_t n = type_bytes(t.type);
  for (int i = 0; i <= t.rank_minus_one; i++) n *= t.box[i];
  return n;
}

// Calls f(shared offset of the row, global address of its first element, first and last element inside the tensor) for
// each row of the box.
template <class F>
void box_rows(const TensorMap& t, const int32_t* at, F f) {
  int rank = t.rank_minus_one + 1, bytes = type_bytes(t.type);
  uint32_t index[5] = {}, row = 0;
  for (;;) {
    bool inside = true;
    uint64_t addr = t.address + int64_t(at[0]) * bytes;
    for (int i = 1; i < rank; i++) {
      int64_t pos = int64_t(at[i]) + index[i];
      inside &= pos >= 0 && pos < t.size[i];
      addr += uint64_t(pos) * t.stride[i - 1];
    }
    int64_t first = std::max<int64_t>(0, -int64_t(at[0])),
            last = std::min<int64_t>(t.box[0], int64_t(t.size[0]) - at[0]);
    if (!inside || last < first) first = last = 0;
    f(row * t.box[0] * bytes, addr, first, last);
    row++;
    int i = 1;
    for (; i < rank; i++) {
      if (++index[i] < t.box[i]) break;
      index[i] = 0;
    }
    if (i == rank) return;
  }
}

// Writes `bytes` (a multiple of 16) to shared memory in swizzled chunks.
void to_shared(Warp& w, int lane, uint32_t base, uint32_t offset, int mode, const uint8_t* data, uint32_t bytes,
               const Actor& who) {
  for (uint32_t i = 0; i < bytes; i += 16) {
    Place p = locate(w, lane, swizzled(base + offset + i, mode), kShared, 16, true, 16);
    note_write(w, lane, p, 16, who, nullptr);
    std::memcpy(p.data, data + i, 16);
    std::memset(p.state, kDefined, 16);
  }
}
void from_shared(Warp& w, int lane, uint32_t base, uint32_t offset, int mode, uint8_t* data, uint32_t bytes) {
  Actor who = async_actor(w, kBulkReadAgent);
  for (uint32_t i = 0; i < bytes; i += 16) {
    Place p = locate(w, lane, swizzled(base + offset + i, mode), kShared, 16, false, 16);
    require_defined(lane, p, 16);
    note_read(w, lane, p, 16, who);
    std::memcpy(data + i, p.data, 16);
  }
}

// Sectors of a contiguous stretch of global memory.
void count_stretch(Warp& w, const Place& p, uint64_t bytes, bool write) {
  uint64_t first = p.offset >> 5, last = (p.offset + bytes - 1) >> 5;
  for (uint64_t s = first; s <= last; s++) p.region->sectors[s] |= write ? 2 : 1;
  w.launch->counters[w.at].sectors += last - first + 1;
  w.launch->counters[w.at].bytes += bytes;
}

void read_global(Warp& w, int lane, uint64_t addr, uint64_t bytes, uint8_t* out) {
  Place p = locate(w, lane, addr, kGlobal, int(bytes), false, 1);
  require_defined(lane, p, int(bytes));
  note_read(w, lane, p, int(bytes), Actor());
  count_stretch(w, p, bytes, false);
  std::memcpy(out, p.data, bytes);
}

enum Reduction { kNone, kRedAdd, kRedMin, kRedMax, kRedAnd, kRedOr, kRedXor };
// element types of reductions, as in tensor maps: 2 u32, 3 s32, 4 u64, 6 f16, 7 f32, 9 f64, 10 bf16
void reduce(uint8_t* to, const uint8_t* from, uint64_t bytes, int type, int op) {
  int step = type_bytes(type);
  auto combine = [op](auto a, auto b) {
    return op == kRedMin ? std::min(a, b) : op == kRedMax ? std::max(a, b) : decltype(a)(a + b);
  };
  for (uint64_t i = 0; i < bytes; i += step) {
    auto apply = [&](auto zero) {
      auto a = zero, b = zero;
      std::memcpy(&a, to + i, sizeof a);
      std::memcpy(&b, from + i, sizeof b);
      a = combine(a, b);
      std::memcpy(to + i, &a, sizeof a);
    };
    if (op >= kRedAnd) {
      for (int j = 0; j < step; j++) {
        uint8_t &a = to[i + j], b = from[i + j];
        a = op == kRedAnd ? a & b : op == kRedOr ? a | b : a ^ b;
      }
      continue;
    }
    uint16_t a16, b16;
    switch (type) {
      case 2:
        apply(uint32_t(0));
        break;
      case 3:
        apply(int32_t(0));
        break;
      case 4:
        apply(uint64_t(0));
        break;
      case 5:
        apply(int64_t(0));
        break;
      case 7:
        apply(0.0f);
        break;
      case 9:
        apply(0.0);
        break;
      case 6:
      case 10: {
        std::memcpy(&a16, to + i, 2);
        std::memcpy(&b16, from + i, 2);
        float x = type == 6 ? f16_to_float(a16) : bf16_to_float(a16),
              y = type == 6 ? f16_to_float(b16) : bf16_to_float(b16);
        a16 = type == 6 ? float_to_f16(combine(x, y)) : float_to_bf16(combine(x, y));
        std::memcpy(to + i, &a16, 2);
        break;
      }
      default:
        throw Fault{"not implemented", format("a reduction of element type %d", type)};
    }
  }
}

void write_global(Warp& w, int lane, uint64_t addr, uint64_t bytes, const uint8_t* data, int op, int type) {
  Place p = locate(w, lane, addr, kGlobal, int(bytes), true, 1);
  Actor who = async_actor(w, kBulkAgent);
  if (op != kNone) {
    require_defined(lane, p, int(bytes));
    who.flags |= kNodeStrong;  // reductions are performed as relaxed atomics of gpu scope
  }
  note_write(w, lane, p, int(bytes), who, nullptr);
  count_stretch(w, p, bytes, true);
  if (op == kNone)
    std::memcpy(p.data, data, bytes);
  else
    reduce(p.data, data, bytes, type, op);
  std::memset(p.state, kDefined, bytes);
}

uint32_t shared_address(uint64_t addr, int lane) {
  if (addr >> 32) addr -= kSharedWindow;
  if (addr >> 32) throw Fault{"wrong space", "an address of shared memory is needed", lane};
  return uint32_t(addr);
}

// imm: offsets of the three addresses, sizes of the three address registers a byte each | number of coordinates << 24.
// Sources: shared, map, mbarrier, coordinates
void tensor_load(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    auto addr = [&](int op) { return base_address(w, in, op, i, in.imm[3] >> (8 * op) & 0xff) + in.imm[op]; };
    uint32_t to = shared_address(addr(0), i);
    TensorMap t = read_map(w, i, addr(1));
    int rank = in.imm[3] >> 24;
    if (rank != t.rank_minus_one + 1)
      throw Fault{"invalid tensor map", format("a map of rank %d in a copy of rank %d", t.rank_minus_one + 1, rank), i};
    if (to & 127) throw Fault{"misaligned", format("a tensor copy to byte %u of shared memory (alignment 128)", to), i};
    int32_t at[5];
    for (int k = 0; k < rank; k++) at[k] = src<int32_t>(w, in, 3 + k)[i];
    Mbarrier& b = mbarrier_at(w, i, shared_address(addr(2), i), kShared);
    Actor who = mbarrier_actor(b);
    int bytes = type_bytes(t.type);
    std::vector<uint8_t> row(t.box[0] * bytes);
    box_rows(t, at, [&](uint32_t offset, uint64_t from, int64_t first, int64_t last) {
      std::fill(row.begin(), row.end(), 0);
      if (last > first) read_global(w, i, from + first * bytes, (last - first) * bytes, row.data() + first * bytes);
      to_shared(w, i, to, offset, t.swizzle, row.data(), uint32_t(row.size()), who);
    });
    land_later(w, b, int64_t(box_bytes(t)));
  });
}

// imm[0], imm[1]: offsets of map and shared address; imm[2]: reduction; imm[3]: as above. Sources: map, shared,
// coordinates
void tensor_store(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    auto addr = [&](int op) { return base_address(w, in, op, i, in.imm[3] >> (8 * op) & 0xff) + in.imm[op]; };
    TensorMap t = read_map(w, i, addr(0));
    uint32_t from = shared_address(addr(1), i);
    int rank = in.imm[3] >> 24;
    if (rank != t.rank_minus_one + 1)
      throw Fault{"invalid tensor map", format("a map of rank %d in a copy of rank %d", t.rank_minus_one + 1, rank), i};
    if (from & 127)
      throw Fault{"misaligned", format("a tensor copy from byte %u of shared memory (alignment 128)", from), i};
    int32_t at[5];
    for (int k = 0; k < rank; k++) at[k] = src<int32_t>(w, in, 2 + k)[i];
    int bytes = type_bytes(t.type);
    std::vector<uint8_t> row(t.box[0] * bytes);
    box_rows(t, at, [&](uint32_t offset, uint64_t to, int64_t first, int64_t last) {
      if (last <= first) return;
      from_shared(w, i, from, offset, t.swizzle, row.data(), uint32_t(row.size()));
      write_global(w, i, to + first * bytes, (last - first) * bytes, row.data() + first * bytes, int(in.imm[2]),
                   t.type);
    });
  });
}

// Linear copies. Sources: destination, source, size, (mbarrier). imm: offsets of destination, source, mbarrier; address
// bytes.
struct Linear {
  uint64_t to, from;
  uint32_t bytes;
};
Linear linear(Warp& w, const Insn& in, int i) {
  auto addr = [&](int op) { return base_address(w, in, op, i, in.imm[3] >> (8 * op) & 0xff) + in.imm[op]; };
  Linear c{addr(0), addr(1), src<uint32_t>(w, in, 2)[i]};
  if (c.bytes % 16 || c.to % 16 || c.from % 16)
    throw Fault{"misaligned", format("a bulk copy of %u bytes: size and addresses must be multiples of 16", c.bytes),
                i};
  return c;
}
void bulk_load(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    Linear c = linear(w, in, i);
    uint64_t bar = base_address(w, in, 3, i, in.imm[3] >> 24 & 0xff) + in.imm[2];
    Mbarrier& b = mbarrier_at(w, i, shared_address(bar, i), kShared);
    std::vector<uint8_t> data(c.bytes);
    if (c.bytes) read_global(w, i, c.from, c.bytes, data.data());
    to_shared(w, i, shared_address(c.to, i), 0, 0, data.data(), c.bytes, mbarrier_actor(b));
    land_later(w, b, c.bytes);
  });
}
// imm[2]: reduction | element type << 8
void bulk_store(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    Linear c = linear(w, in, i);
    std::vector<uint8_t> data(c.bytes);
    from_shared(w, i, shared_address(c.from, i), 0, 0, data.data(), c.bytes);
    if (c.bytes) write_global(w, i, c.to, c.bytes, data.data(), int(in.imm[2] & 0xff), int(in.imm[2] >> 8));
  });
}

void bulk_commit(Warp& w, const Insn&, Mask m) {
  commit_group(w, kBulkAgent, w.bulk_groups, m);
  w.sequence[kBulkReadAgent] = w.sequence[kBulkAgent];
  w.bulk_read_groups.push_back(w.bulk_groups.back());
}
// imm[0]: groups that may remain; imm[1]: .read
void bulk_wait(Warp& w, const Insn& in, Mask m) {
  wait_groups(w, kBulkReadAgent, w.bulk_read_groups, m, uint32_t(in.imm[0]));
  if (!in.imm[1]) wait_groups(w, kBulkAgent, w.bulk_groups, m, uint32_t(in.imm[0]));
}

// imm: offset, byte of the field in the map, bytes of the field, address bytes. Sources: address, value
void map_replace(Warp& w, const Insn& in, Mask m) {
  each_lane(m, [&](int i) {
    uint64_t addr = base_address(w, in, 0, i, int(in.imm[3])) + in.imm[0] + in.imm[1];
    int bytes = int(in.imm[2]);
    Place p = locate(w, i, addr, space_of(in), bytes, true, 1);
    if (!p.region) throw Fault{"wrong space", "a tensor map in local memory", i};
    const char* value = at(w, in.ops[in.ndst + 1]) + i * (bytes == 8 ? 8 : 4);
    note_write(w, i, p, bytes, Actor(), value);
    std::memcpy(p.data, value, bytes);
    std::memset(p.state, kDefined, bytes);
  });
}
// Copies a map from shared to global memory and releases it. imm: offsets; address bytes
void map_copy(Warp& w, const Insn& in, Mask m) {
  int i = __builtin_ctz(m);
  uint64_t to = base_address(w, in, 0, i, in.imm[3] & 0xff) + in.imm[0],
           from = base_address(w, in, 1, i, in.imm[3] >> 8 & 0xff) + in.imm[1];
  Place s = locate(w, i, from, kShared, 128, false, 128);
  require_defined(i, s, 128);
  note_read(w, i, s, 128, Actor());
  Place p = locate(w, i, to, kGlobal, 128, true, 128);
  note_write(w, i, p, 128, Actor(), s.data);
  std::memcpy(p.data, s.data, 128);
  std::memset(p.state, kDefined, 128);
  fence(w, scope_of(in), kRelease);
}

const Register handlers{
    {"bulk.tensor.load", tensor_load},  {"bulk.tensor.store", tensor_store}, {"bulk.load", bulk_load},
    {"bulk.store", bulk_store},         {"bulk.commit", bulk_commit},        {"bulk.wait", bulk_wait},
    {"tensormap.replace", map_replace}, {"tensormap.copy", map_copy},
};

}  // namespace
}  // namespace ptx
