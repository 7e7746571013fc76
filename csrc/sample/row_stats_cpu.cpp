#include "sample/row_stats.h"

#include "core/cpu/law.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

// The two largest logits so far, and the id of the first.
struct TopTwo {
  double max = -kInf<double>, second = -kInf<double>;
  int64_t argmax = -1;

  void enter(const TopTwo& later) {
    second = std::max({second, later.second, std::min(max, later.max)});
    if (later.max > max) max = later.max, argmax = later.argmax;
  }
};

// One tile, relative to its own maximum: sum of e^-d and of d e^-d, d = max - logit.
struct TileStats {
  TopTwo top;
  double sum = 0, moment = 0;
  bool good = true;
};

// `before`: of tiles with smaller ids. The second largest and the argmax of a tile that cannot change it are left out.
// `next`: the following tile of the row, fetched into the cache while this one is computed.
template <class T, class C>
TileStats tile_stats(const C* x, int64_t start, int64_t n, const TopTwo& before, const T* next) {
  C block_max[kTile / kBlock], max;
  TileStats stats;
  stats.good = detail::scan(x, n, block_max, max);
  stats.top.max = static_cast<double>(max);
  if (!stats.good || max == -kInf<C>) return stats;
  if (stats.top.max > before.second) {
    // the two largest lie in the best block, or one in it and one heads another
    int64_t best = 0;
    while (block_max[best] != max) ++best;
    int64_t at = best * kBlock;
    while (x[at] != max) ++at;
    C second = -kInf<C>;
    for (int64_t i = best * kBlock; i < std::min(n, (best + 1) * kBlock); ++i) {
      const C other = i == at ? -kInf<C> : x[i];
      second = other > second ? other : second;
    }
    for (int64_t g = 0; g < num_blocks(n); ++g) second = g != best && block_max[g] > second ? block_max[g] : second;
    stats.top.second = static_cast<double>(second);
    stats.top.argmax = start + at;
  }
  TileSum<C> sum(n), moment(n);
  for_tile<true>(n, [&](auto place, int64_t i) {
    __builtin_prefetch(next);
    next += kWide;
    const auto d = max - take(place.wide, x + i);
    const auto e = exp_minus(d);
    sum.add(place, e);
    moment.add_moment(place, d, e);
  });
  stats.sum = static_cast<double>(sum.join());
  stats.moment = static_cast<double>(moment.join());
  return stats;
}

template <class C>
void join(const RowStatsArgs& a, int64_t r, const TileStats* tiles, int64_t count) {
  TopTwo top;
  bool good = true;
  for (int64_t t = 0; t < count; ++t) {
    good = good && tiles[t].good;
    top.enter(tiles[t].top);
  }
  a.status[r] = !good ? kStatusNaN : !(top.max > -kInf<double>) ? kStatusNoMass : 0;
  if (a.status[r]) return;
  double sum = 0, moment = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (!(tiles[t].sum > 0)) continue;
    const double drop = top.max - tiles[t].top.max;
    const double scale = exp_minus(drop);
    sum += scale * tiles[t].sum;
    moment += scale * (tiles[t].moment + drop * tiles[t].sum);
  }
  const double log_sum = log_(sum);
  static_cast<C*>(a.max)[r] = static_cast<C>(top.max + 0.0);  // of two zeros +0, whichever was met
  static_cast<C*>(a.second)[r] = static_cast<C>(top.second + 0.0);
  static_cast<C*>(a.logsumexp)[r] = static_cast<C>(top.max + log_sum);
  static_cast<C*>(a.entropy)[r] = static_cast<C>(log_sum + moment / sum);
  a.argmax[r] = top.argmax;
}

// A row is cut into parts where there are fewer rows than threads. Results do not depend on it: tiles are joined in
// order either way.
template <class T, class C = Compute<T>>
void run(const RowStatsArgs& a, const Exec& ex) {
  const int64_t rows = a.batch * a.rows, tiles = num_tiles(a.vocab_size), V = a.vocab_size;
  auto* const all = static_cast<TileStats*>(a.scratch);
  auto active = [&](int64_t r) { return !a.active || a.active[r / a.rows]; };
  auto clear = [&](int64_t r) {
    a.argmax[r] = -1;
    a.status[r] = 0;
    for (void* out : {a.max, a.second, a.logsumexp, a.entropy}) static_cast<C*>(out)[r] = 0;
  };
  const int64_t parts = num_parts(rows, V, ex);
  for_each_row(ex, rows * parts, V / parts, nullptr, 0, [&](int64_t job, void*) {
    const int64_t r = job / parts, part = job % parts;
    if (!active(r)) return;
    const T* logits = static_cast<const T*>(a.logits) + r / a.rows * a.batch_stride + r % a.rows * a.row_stride;
    TopTwo before;
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const int64_t start = t * kTile, n = std::min(kTile, V - start);
      if constexpr (std::is_same_v<T, C>) {
        all[r * tiles + t] = tile_stats(logits + start, start, n, before, logits + start + n);
      } else {
        alignas(64) C x[kTile];  // widened once for the two passes over a tile
        for_lanes(0, n, [&](auto wide, int64_t i) { put(wide, x + i, take(wide, logits + start + i)); });
        all[r * tiles + t] = tile_stats(x, start, n, before, logits + start + n);
      }
      before.enter(all[r * tiles + t].top);
    }
    if (parts > 1) return;
    clear(r);
    join<C>(a, r, all + r * tiles, tiles);
  });
  for (int64_t r = 0; r < rows; ++r) {
    if (active(r) && parts == 1) continue;
    clear(r);
    if (active(r)) join<C>(a, r, all + r * tiles, tiles);
  }
}

}  // namespace

void row_stats(const RowStatsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::row_stats_scratch_bytes(const RowStatsArgs& a, const Exec&) {
  return a.batch * a.rows * FD_ISA::num_tiles(a.vocab_size) * static_cast<int64_t>(sizeof(FD_ISA::TileStats));
}
#endif
FD_CPU_OP(row_stats, RowStatsArgs)
