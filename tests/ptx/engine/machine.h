// The state of a launch: regions of memory, blocks, warps, registers; and how instructions are bound to handlers.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kNoPc = 0xffffffffu;
using Mask = uint32_t;

struct Warp;
struct Block;
struct Launch;
struct Insn;

// What a handler throws. `lane` is -1 when the whole warp is meant.
struct Fault {
  std::string kind, text;
  int lane = -1;
};

// A register or constant: `off` is a byte offset into the warp's register file, or, with bit 0 set, into the constants;
// `reg` indexes the masks of defined lanes (0: always defined).
struct Operand {
  uint32_t off, reg;
};

using Handler = void (*)(Warp&, const Insn&, Mask);

// How undefined source lanes are treated.
enum Policy : uint8_t {
  kPropagate,  // the results become undefined
  kStrict,     // an error
  kCustom,     // the handler decides
};

struct Insn {
  Handler fn;
  const Operand* ops;  // destinations, then sources
  int64_t imm[4];
  uint64_t flags;
  uint32_t guard_off, guard_reg;  // guard_off is kNoPc without a guard
  uint32_t line;
  uint16_t ndst, nsrc;
  bool guard_negated, is_barrier;
  Policy policy;
};

// Flags shared by all opcodes; the decoder writes the same values.
enum Flag : uint64_t {
  kRoundMask = 3,  // 0 nearest even, 1 zero, 2 down, 3 up
  kFtz = 1 << 2,
  kSat = 1 << 3,
  kRelu = 1 << 4,
  kNan = 1 << 5,        // .NaN of min and max
  kXorSign = 1 << 6,    // .xorsign.abs
  kRoundAway = 1 << 7,  // .rna
  kAsync = 1 << 8,      // may touch the accumulators of wgmma that are still in flight
};

enum Space : uint32_t { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };
enum Order : uint32_t { kWeak, kRelaxed, kAcquire, kRelease, kAcqRel, kSeqCst };
enum Scope : uint32_t { kCta, kCluster, kGpu, kSys };

// An access in the history of a granule. Two lists through `parent`: the reads since the last weak write; and the
// strong writes since the last weak write, which ends its list as `root`.
struct Node {
  uint32_t parent, agent, clock, pc;
  uint32_t flags, root;
};
// kNodeCta: strong at cta scope only; kNodeWide: no write of the list is
enum : uint32_t { kNodeStrong = 1, kNodeCta = 2, kNodeAsync = 4, kNodeWide = 8 };

struct Pool {
  std::vector<Node> nodes{Node{}};  // node 0: no access
};

// The state of a byte.
enum : uint8_t { kDefined = 0, kUnwritten = 1, kOutside = 2, kUndefinedValue = 4 };

// A range of memory with its shadow.
struct Region {
  uint64_t base = 0, size = 0;
  uint8_t* data = nullptr;
  std::vector<uint8_t> owned;
  uint8_t* state = nullptr;
  uint32_t *writes = nullptr, *reads = nullptr;            // a node a granule; null: not tracked
  uint32_t *lane_writes = nullptr, *lane_reads = nullptr;  // of shared memory: see lanes.cpp
  Pool* pool = nullptr;
  std::vector<bool> constant;  // granules that note_constant has seen; empty: none
  uint32_t shift = 2;          // log2 of the bytes of a granule
  uint8_t* sectors = nullptr;  // touched 32-byte sectors: 1 read, 2 written
  Space space = kGlobal;
  bool writable = true;
  std::string name;
  ~Region();
  Region() = default;
  Region(const Region&) = delete;
  void make_shadow(uint8_t initial_state, bool track, uint32_t granule_shift);
};

using Clock = std::vector<uint32_t>;

// Which accesses happen before now. Agents of the own block first (warps, then the asynchronous agents), accesses of
// other blocks in `remote`, indexed by global agent; null until the block has synchronised with another.
struct VectorClock {
  Clock local;
  std::shared_ptr<const Clock> remote;
  void join(const VectorClock& other);
};

// Agents of a block, n of each kind for n warps, then its mbarriers. Bulk copies from shared memory have one agent for
// their writes and one for their reads, which can be waited for alone.
enum AgentKind { kWarpAgent, kCpAsyncAgent, kBulkAgent, kBulkReadAgent, kWgmmaAgent, kAgentKinds };
constexpr int kMaxMbarriers = 128;

// A set of lanes at one program counter that waits.
enum class GroupState { kReady, kWarpSync, kBarrier };
struct Group {
  uint32_t pc;
  Mask mask;
  GroupState state;
  int barrier;
};

struct Mbarrier {
  bool live = false;
  uint32_t expected = 0, pending = 0, phase = 0;  // phase counts for ever: its parity and tokens derive from it
  uint32_t first_phase = 0;                       // at init
  int64_t tx = 0;
  int agent = 0;
  VectorClock arriving, done, arriving_proxy, done_proxy;
};

struct CommitGroup {
  uint32_t sequence;
  Mask lanes;
};

struct Warp {
  char* regs;
  const char* consts;
  uint32_t* init;
  Block* block;
  Launch* launch;
  uint32_t pc = 0;  // of the next instruction
  uint32_t at = 0;  // of the current instruction
  Mask active = 0;
  uint32_t reconverge_pc = kNoPc;
  int budget = 0;
  int index = 0;          // in the block
  uint32_t meetings = 1;  // how often something has ordered the lanes with each other
  Mask exited = 0, exists = 0;
  bool done = false, yielded = false;
  std::vector<Group> groups;
  Mask carry = 0;  // the condition code register of add.cc and its like

  // happens-before
  VectorClock vc, proxy;                   // proxy: writes that the async proxy sees
  VectorClock released_cta, released_gpu;  // at the last fence of that scope
  VectorClock pending_acquire;
  bool has_pending_acquire = false, has_released_gpu = false, has_released_cta = false;
  struct Cached {
    Pool* pool;
    uint32_t parent, agent, clock, pc, flags, id;
  };
  Cached read_cache[64] = {}, write_cache[16] = {};
  struct Known {
    Pool* pool;
    uint32_t id;
  };
  Known known_write[64] = {}, known_read[64] = {}, known_strong_read[64] = {};  // lists found to be ordered before now
  struct Polled {
    const Region* region;
    size_t granule;
    uint32_t clock;
  };
  Polled polled[16] = {};

  // asynchronous copies and wgmma
  std::vector<CommitGroup> cp_groups, bulk_groups, bulk_read_groups, wgmma_groups;
  uint32_t sequence[kAgentKinds] = {};  // open group of each kind of agent
  // by register, for kernels with wgmma: the last wgmma group that has it as accumulator or as source, and the number
  // of wgmma.fence before its last ordinary write
  std::vector<uint32_t> accumulator_of, source_of, written_after;
  uint32_t wgmma_done = 0, fences = 1;

  std::vector<uint8_t> local, local_state;  // lane-major

  uint32_t clock() const { return vc.local[index]; }
};

struct BarrierState {
  int arrived = 0, expected = 0;
  VectorClock acc, acc_proxy;
  uint32_t reduce_count = 0;
  bool reduce_and = true, reduce_or = false;
  std::vector<std::pair<Warp*, Mask>> waiting;
  // results of bar.red are delivered when the barrier completes
  struct Delivery {
    Warp* warp;
    Mask lanes;
    const Insn* insn;
  };
  std::vector<Delivery> deliveries;
};

struct Block {
  Launch* launch;
  uint32_t id[3], linear;
  Region shared;
  Pool pool;
  std::vector<Warp> warps;
  std::vector<char> files;  // registers of all warps
  std::vector<uint32_t> inits;
  BarrierState barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  int mbarrier_agents = 0;
  std::vector<std::pair<Mbarrier*, int64_t>> landing;  // bulk copies whose bytes their mbarrier does not count yet
  int next_warp = 0, finished_warps = 0, exited_threads = 0;
  std::unordered_map<uint64_t, VectorClock> sync_vars;  // of shared memory
};

struct Counters {
  uint64_t warps = 0, threads = 0, bytes = 0, sectors = 0, wavefronts = 0, ideal_wavefronts = 0, divergent = 0;
};

// Special registers that are filled in when a warp starts; the decoder uses the same order.
enum SpecialRegister {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kNsmid,
  kGridid,
  kLanemaskEq,
  kLanemaskLe,
  kLanemaskLt,
  kLanemaskGe,
  kLanemaskGt,
  kDynamicSmem,
  kTotalSmem,
  kZero,
  kOne,
  kEnvreg1,
  kEnvreg2,
  kSpecialCount
};

struct Launch {
  std::vector<Insn> code;
  std::vector<Operand> operands;
  std::vector<char> consts;
  uint32_t file_bytes = 0, nregs = 0, local_bytes = 0, static_shared = 0, total_shared = 0;
  uint32_t granule_shift_shared = 2, granule_shift_global = 2;
  struct SpecialSlot {
    int which;
    uint32_t reg, off;
  };
  std::vector<SpecialSlot> specials;
  bool uses_wgmma = false, uses_async = false;
  uint32_t grid[3], block[3];
  int threads = 0, nwarps = 0, sms = 1, resident = 1;
  bool cooperative = false;
  uint32_t envreg[3] = {};
  std::vector<std::unique_ptr<Region>> windows;  // by address window
  Pool pool;
  std::vector<uint32_t> order;
  std::vector<Counters> counters;
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> same_value_writes;
  std::map<uint32_t, uint64_t> lane_conflicts;    // stores whose lanes wrote different values to one address
  std::unordered_map<uint64_t, Clock> sync_vars;  // of global memory; key: address and scope
  uint64_t progress = 0, executed = 0;
  uint64_t now = 0;  // %clock

  // the failure, if any
  Fault fault;
  bool failed = false;
  uint32_t fault_pc = 0, fault_block[3] = {}, fault_thread[3] = {};
};

inline char* at(const Warp& w, Operand o) { return (o.off & 1 ? const_cast<char*>(w.consts) : w.regs) + (o.off & ~1u); }
template <class T>
inline T* reg(const Warp& w, Operand o) {
  return reinterpret_cast<T*>(at(w, o));
}
template <class T>
inline T* dst(const Warp& w, const Insn& in, int i) {
  return reg<T>(w, in.ops[i]);
}
template <class T>
inline const T* src(const Warp& w, const Insn& in, int i) {
  return reg<T>(w, in.ops[in.ndst + i]);
}
inline Mask defined(const Warp& w, const Insn& in, int i) { return w.init[in.ops[in.ndst + i].reg]; }
inline uint32_t& pred(const Warp& w, Operand o) { return *reg<uint32_t>(w, o); }

inline void set_pred(const Warp& w, Operand o, Mask m, Mask value) {
  uint32_t& p = pred(w, o);
  p = (p & ~m) | (value & m);
}
inline void mark_defined(Warp& w, Operand o, Mask m, Mask ok) { w.init[o.reg] = (w.init[o.reg] & ~m) | (ok & m); }

// Calls f(lane) for each lane of m.
template <class F>
inline void each_lane(Mask m, F f) {
  for (; m; m &= m - 1) f(__builtin_ctz(m));
}

// d[lane] = f(s[lane]...) for the lanes of m. A destination may be a source: lanes are independent, hence ivdep.
template <class F, class D, class... S>
inline void map_lanes(Mask m, D* d, F f, const S*... s) {
  if (m == kAll) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; i++) d[i] = f(s[i]...);
  } else {
    each_lane(m, [&](int i) { d[i] = f(s[i]...); });
  }
}
template <class D, class A, class F>
inline void map1(Warp& w, const Insn& in, Mask m, F f) {
  map_lanes(m, dst<D>(w, in, 0), f, src<A>(w, in, 0));
}
template <class D, class A, class B, class F>
inline void map2(Warp& w, const Insn& in, Mask m, F f) {
  map_lanes(m, dst<D>(w, in, 0), f, src<A>(w, in, 0), src<B>(w, in, 1));
}
template <class D, class A, class B, class C, class F>
inline void map3(Warp& w, const Insn& in, Mask m, F f) {
  map_lanes(m, dst<D>(w, in, 0), f, src<A>(w, in, 0), src<B>(w, in, 1), src<C>(w, in, 2));
}

struct Entry {
  const char* name;
  Handler fn;
};
// Handlers register under the keys that the decoder asks for.
struct Register {
  Register(std::initializer_list<Entry> entries);
};
Handler find_handler(const std::string& key);

std::string format(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

// scheduler.cpp
void run_launch(Launch& launch);
void park(Warp& w, GroupState state, int barrier);  // the current lanes wait; others of the warp go on
void release_group(Warp& w, Mask lanes);            // lanes that waited at a barrier go on
void branch(Warp& w, Mask taken, uint32_t target);
void exit_lanes(Warp& w, Mask lanes);
// Bulk copies land when no warp of the block can go on without them, so that every wait has to wait. True if any did.
bool land_copies(Block& block);
// Ends this turn of the warp, which may be spinning, after the current instruction.
inline void yield(Warp& w) {
  w.yielded = true;
  w.budget = 0;
}
inline Mask live_lanes(const Warp& w) { return w.exists & ~w.exited; }
// Waits until all lanes of `members` are at this instruction; true when they are.
bool gather_lanes(Warp& w, Mask executing, Mask members);

}  // namespace ptx
