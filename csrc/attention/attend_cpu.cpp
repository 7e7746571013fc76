#include "attention/attend.h"

#include "attention/tile.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int64_t kSplit = 1024;             // keys that are summed up before they are joined with those before
constexpr int64_t kMacsPerThread = 1 << 19;  // less is done sooner than a second thread wakes

// Sum of weights, relative to `max`, that a row has seen.
template <class C>
struct Mass {
  C max = -kInf<C>, sum = 0;
};

template <class C>
FD_INLINE LaneBits<C> spread_bits(uint64_t bits) {
  LaneBits<C> lanes;
  for (int64_t l = 0; l < kWide; ++l) lanes[l] = uint64_t{1} << l;
  const LaneBits<C> all = LaneBits<C>{} + static_cast<typename Number<C>::Bits>(bits & 0xffff);
  return (LaneBits<C>)((lanes & all) != LaneBits<C>{});
}

// Turns a tile's products q.k into weights exp(score - max), 0 where not seen. Returns what earlier weights must be
// multiplied with.
template <class C>
FD_ROW C weigh(C* tile, uint64_t seen, C scale, C softcap, Mass<C>& mass) {
  Lanes<C> x[kKeys / kWide];
  LaneBits<C> broken = {};
  Lanes<C> top = Lanes<C>{} - kInf<C>;
  for (int64_t j = 0; j < kKeys / kWide; ++j) {
    x[j] = load_lanes(tile + j * kWide) * scale;
    if (softcap > 0) x[j] = detail::tanh_of<C>(x[j] / softcap) * softcap;
    if (~seen) x[j] = (Lanes<C>)(spread_bits<C>(seen >> j * kWide)) != 0 ? x[j] : Lanes<C>{} - kInf<C>;
    broken |= (LaneBits<C>)(x[j] != x[j]);
    top = larger<C>(top, x[j]);
  }
  const C before = mass.max, highest = largest<C>(top);
  mass.max = before > highest ? before : highest;
  Lanes<C> sum = {};
  for (int64_t j = 0; j < kKeys / kWide; ++j) {
    const Lanes<C> weight = exp_minus(mass.max - x[j]);
    sum = sum + weight;
    put(std::true_type{}, tile + j * kWide, weight);
  }
  for (int step = 0; step < 4; ++step) sum = add_neighbours<C>(sum, sum);
  const C fade = exp_minus(mass.max - before);
  mass.sum = mass.sum * fade + sum[0];
  // A score that is NaN or +inf has no weight above: say so here.
  if (any_bit(broken) || mass.max == kInf<C>) mass.sum = kInf<C> - kInf<C>;
  return fade;
}

// Sums of a split, or of several joined: totals [kRows, width] in units of exp(max).
template <class C>
struct State {
  Mass<C>* mass;
  C* totals;

  State(Carve& carve, int64_t width) : mass(carve.take<Mass<C>>(kRows)), totals(carve.take<C>(kRows * width)) {}
};

// One thread's work on one block of rows.
template <class Tile, class C = typename Tile::Compute>
class Attend {
 public:
  Attend(const AttendArgs& args, Carve& carve)
      : a(args),
        D(args.pages.head_dim),
        tile(args, carve),
        width(tile.width(D)),
        weights(carve.take<C>(kRows * kKeys)),
        seen(carve.take<uint64_t>(kRows)),
        own(carve, width),
        whole(carve, width) {}

  static int64_t bytes(const AttendArgs& args) {
    Carve carve(nullptr);
    Attend attend(args, carve);
    return carve.bytes();
  }
  static int64_t state_bytes(const AttendArgs& args) {
    Carve carve(nullptr);
    Attend attend(args, carve);
    const int64_t before = carve.bytes();
    attend.state(carve);
    return carve.bytes() - before;
  }
  State<C> state(Carve& carve) const { return State<C>(carve, width); }

  void start(const Block& block) { tile.load_queries(block); }

  // Keys kSplit * split and on.
  void add_split(const Block& block, int64_t split, const State<C>& to) {
    clear(to, block.rows);
    const int64_t begin = split * kSplit, end = std::min(begin + kSplit, block.s.length);
    for (int64_t first = begin; first < end; first += kKeys) {
      if (first < block.s.coded_end) add_tile(block, /*ring=*/false, first, to);
      if (first + kKeys > block.s.coded_begin) add_tile(block, /*ring=*/true, first, to);
    }
  }

  void clear(const State<C>& to, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) to.mass[r] = {};
    std::memset(to.totals, 0, rows * width * sizeof(C));
  }

  void join(const State<C>& to, const State<C>& from, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const Mass<C> left = to.mass[r], right = from.mass[r];
      const C max = left.max > right.max ? left.max : right.max;
      const C fade = exp_minus(max - left.max), weight = exp_minus(max - right.max);
      to.mass[r] = {max, left.sum * fade + right.sum * weight};
      C *total = to.totals + r * width, *part = from.totals + r * width;
      for (int64_t i = 0; i < width; ++i) total[i] = total[i] * fade + part[i] * weight;
    }
  }

  void write(const Block& block, const State<C>& state) const {
    dispatch_logits(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (std::is_same_v<Compute<T>, C>) {
        for (int64_t r = 0; r < block.rows; ++r) {
          const int64_t index = (block.s.first_row + block.node(r)) * a.num_q_heads + block.head(r);
          const Mass<C> mass = state.mass[r];
          const C sum = mass.sum == 0 ? C(1) : mass.sum;
          static_cast<C*>(a.lse)[index] = mass.sum == mass.sum ? mass.max + log_(mass.sum) : mass.sum;
          T* out = static_cast<T*>(a.out) + index * D;
          const C* total = state.totals + r * width;
          // + 0: never -0, so that keys that a row does not see change no bit
          for (int64_t d = 0; d < D; ++d) out[d] = FD_ISA::store<T, false>(total[tile.place(d)] / sum + C(0));
        }
      }
    });
  }

 private:
  void add_tile(const Block& block, bool ring, int64_t first, const State<C>& to) {
    const Sequence& s = block.s;
    uint64_t any = 0, all = ~uint64_t{0};
    const int64_t first_node = block.node(0), last_node = block.node(block.rows - 1);
    for (int64_t node = first_node; node <= last_node; ++node) {
      const int64_t coded = s.coded ? s.coded[node] : s.coded_end;
      const uint64_t stored = ring ? bits_between(coded - first, kKeys) : bits_between(0, coded - first);
      const uint64_t here = s.seen(node, first) & stored;
      seen[node - first_node] = here;
      any |= here;
      all &= here;
    }
    if (!any) return;
    tile.load(block, ring, first, any);
    if (any == all || tile.hides_values()) return add_rows(block, 0, block.rows, to);
    // A value that is not finite would spoil the rows that do not see it: each node with what it sees.
    for (int64_t r = 0, end; r < block.rows; r = end) {
      for (end = r; end < block.rows && block.node(end) == block.node(r);) ++end;
      if (!seen[block.node(r) - first_node]) continue;
      tile.load(block, ring, first, seen[block.node(r) - first_node]);
      add_rows(block, r, end, to);
    }
  }

  // Rows begin .. end - 1 to the tile.
  void add_rows(const Block& block, int64_t begin, int64_t end, const State<C>& to) {
    tile.multiply_keys(begin, end - begin, weights);
    for (int64_t r = begin; r < end; ++r) {
      const C fade = weigh<C>(weights + (r - begin) * kKeys, seen[block.node(r) - block.node(0)],
                              static_cast<C>(a.scale), static_cast<C>(a.softcap), to.mass[r]);
      C* total = to.totals + r * width;
      if (fade != 1)
        for (int64_t i = 0; i < width; ++i) total[i] *= fade;
    }
    tile.add_values(end - begin, weights, to.totals + begin * width);
  }

  const AttendArgs& a;
  const int64_t D;
  Tile tile;
  const int64_t width;
  C* weights;
  uint64_t* seen;  // per node of the block

 public:
  State<C> own, whole;
};

// How a call is cut into tasks.
struct Plan {
  int64_t heads, num_blocks, num_splits, threads;  // heads: per kv head; blocks: of a sequence and kv head, at most
  bool by_split;                                   // a task is one split, its state is kept

  int64_t blocks(const AttendArgs& a) const { return a.batch * a.pages.num_heads * num_blocks; }

  Plan(const AttendArgs& a, const Exec& ex) {
    heads = a.pages.num_heads ? a.num_q_heads / a.pages.num_heads : 1;
    int64_t most_nodes = 0, most_keys = 0, work = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      int64_t nodes = a.group_start   ? int64_t{a.group_start[b + 1]} - a.group_start[b]
                      : a.num_queries ? a.num_queries[b]
                                      : a.num_slots;
      nodes = std::clamp<int64_t>(nodes, 0, a.group_start ? a.num_rows : a.num_slots);
      const int64_t keys = std::clamp<int64_t>(a.kv_lens[b], 0, a.max_pages * a.pages.page_size + a.pages.tail_size);
      most_nodes = std::max(most_nodes, nodes);
      most_keys = std::max(most_keys, keys);
      work += nodes * (a.window ? std::min(keys, a.window + nodes) : keys);
    }
    num_blocks = ceil_div(most_nodes * heads, kRows);
    num_splits = ceil_div(most_keys, kSplit);
    work *= a.num_q_heads * a.pages.head_dim;
    threads = std::clamp<int64_t>(work / kMacsPerThread, 1, ex.num_threads);
    by_split = threads > 1 && num_splits > 1 && blocks(a) < 4 * threads;
    threads = std::clamp<int64_t>(blocks(a) * (by_split ? num_splits : 1), 1, threads);
  }
};

// body(i, slot) for i in [0, count) on `threads` threads, which take the next one as they finish.
template <class Body>
void for_each_task(const Exec& ex, int64_t threads, int64_t count, const Body& body) {
  int64_t next = 0;
  auto run = [&](int64_t slot) {
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) return;
      body(i, slot);
    }
  };
  if (threads == 1) return run(0);
  auto call = [](void* context, int64_t slot) { (*static_cast<decltype(run)*>(context))(slot); };
  ex.parallel_for(threads, call, &run);
}

void write_nothing(const AttendArgs& a, int64_t row, int64_t count) {
  if (count == 0) return;
  const int64_t heads = count * a.num_q_heads, at = row * a.num_q_heads,
                width = a.pages.head_dim * element_size(a.dtype);
  std::memset(static_cast<std::byte*>(a.out) + at * width, 0, heads * width);
  if (a.dtype == DType::kFloat64) {
    for (int64_t i = at; i < at + heads; ++i) static_cast<double*>(a.lse)[i] = -kInf<double>;
  } else {
    for (int64_t i = at; i < at + heads; ++i) static_cast<float*>(a.lse)[i] = -kInf<float>;
  }
}

template <class Tile>
void run(const AttendArgs& a, const Exec& ex) {
  const Plan plan(a, ex);
  auto* memory = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<int64_t>(a.scratch)));
  const int64_t thread_bytes = Attend<Tile>::bytes(a), state_bytes = Attend<Tile>::state_bytes(a);
  std::byte* states = memory + plan.threads * thread_bytes;

  // False where there is nothing to do.
  auto block_of = [&](int64_t i, Block& block) {
    const int64_t head = i % a.pages.num_heads, rest = i / a.pages.num_heads;
    const int64_t b = rest / plan.num_blocks, first = rest % plan.num_blocks * kRows;
    if (a.status[b]) return false;
    block = {sequence_of(a, b), head, plan.heads, first, 0};
    block.rows = std::min(kRows, block.s.num_nodes * plan.heads - first);
    return block.rows > 0;
  };
  const int64_t blocks = plan.blocks(a);
  if (plan.by_split) {
    for_each_task(ex, plan.threads, blocks * plan.num_splits, [&](int64_t i, int64_t slot) {
      Block block;
      if (!block_of(i / plan.num_splits, block) || i % plan.num_splits * kSplit >= block.s.length) return;
      Carve carve(memory + slot * thread_bytes), kept(states + i * state_bytes);
      Attend<Tile> attend(a, carve);
      attend.start(block);
      attend.add_split(block, i % plan.num_splits, attend.state(kept));
    });
  }
  for_each_task(ex, plan.by_split ? 1 : plan.threads, blocks, [&](int64_t i, int64_t slot) {
    Block block;
    if (!block_of(i, block)) return;
    Carve carve(memory + slot * thread_bytes);
    Attend<Tile> attend(a, carve);
    attend.clear(attend.whole, block.rows);
    if (!plan.by_split) attend.start(block);
    for (int64_t split = 0; split * kSplit < block.s.length; ++split) {
      if (plan.by_split) {
        Carve kept(states + (i * plan.num_splits + split) * state_bytes);
        attend.join(attend.whole, attend.state(kept), block.rows);
      } else {
        attend.add_split(block, split, attend.own);
        attend.join(attend.whole, attend.own, block.rows);
      }
    }
    attend.write(block, attend.whole);
  });
}

// visit(Tag<Tile>) with the arithmetic for these queries and this cache.
template <class Visitor>
auto dispatch_tile(const AttendArgs& a, const Visitor& visit) {
  if (a.dtype == DType::kFloat64) return visit(Tag<NumberTile<double>>{});
#if FD_CPU_LEVEL >= 4
  if (a.dtype == DType::kBFloat16) return CodeTile::takes(a.pages) ? visit(Tag<CodeTile>{}) : visit(Tag<PairTile>{});
#endif
  return visit(Tag<NumberTile<float>>{});
}

}  // namespace

int64_t attend_scratch_bytes(const AttendArgs& a, const Exec& ex) {
  return dispatch_tile(a, [&](auto tag) {
    using Tile = typename decltype(tag)::type;
    const Plan plan(a, ex);
    const int64_t kept = plan.by_split ? plan.blocks(a) * plan.num_splits * Attend<Tile>::state_bytes(a) : 0;
    return 64 + plan.threads * Attend<Tile>::bytes(a) + kept;
  });
}

void attend(const AttendArgs& a, const Exec& ex) {
  if (a.group_start) write_nothing(a, 0, a.num_rows);
  for (int64_t b = 0; b < a.batch; ++b) {
    a.status[b] = check(a, b);
    if (a.group_start) continue;
    const int64_t used = a.status[b] ? 0 : a.num_queries ? a.num_queries[b] : a.num_slots;
    write_nothing(a, b * a.num_slots + used, a.num_slots - used);
  }
  dispatch_tile(a, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
#if defined(__x86_64__)
namespace fastdecode::v3 {
int64_t attend_scratch_bytes(const AttendArgs&, const Exec&);
}
namespace fastdecode::v4 {
int64_t attend_scratch_bytes(const AttendArgs&, const Exec&);
}
#endif
int64_t fastdecode::cpu::attend_scratch_bytes(const AttendArgs& a, const Exec& ex) {
#if defined(__x86_64__)
  if (ex.cpu_level >= 4) return v4::attend_scratch_bytes(a, ex);
  if (ex.cpu_level >= 3) return v3::attend_scratch_bytes(a, ex);
#endif
  return v1::attend_scratch_bytes(a, ex);
}
#endif
