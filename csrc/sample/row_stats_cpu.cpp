#include "sample/row_stats.h"

#include "core/cpu/law.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

// One tile, relative to its own maximum: sum of e^-d and of d e^-d, d = max - logit.
struct TileStats {
  double max, second, sum, moment;
  int64_t argmax;
  bool good;
};

template <class T, class C = Compute<T>>
TileStats tile_stats(const T* logits, int64_t start, int64_t n) {
  C block_max[kTile / kBlock], max;
  TileStats stats{-kInf<double>, -kInf<double>, 0, 0, -1, true};
  const T* x = logits + start;
  stats.good = detail::scan(x, n, block_max, max);
  if (!stats.good || max == -kInf<C>) return stats;
  // the two largest lie in the best block, or one in it and one heads another
  int64_t best = 0;
  while (block_max[best] != max) ++best;
  int64_t at = best * kBlock;
  while (load(x[at]) != max) ++at;
  C second = -kInf<C>;
  for (int64_t i = best * kBlock; i < std::min(n, (best + 1) * kBlock); ++i) {
    const C other = i == at ? -kInf<C> : load(x[i]);
    second = other > second ? other : second;
  }
  for (int64_t g = 0; g < num_blocks(n); ++g) second = g != best && block_max[g] > second ? block_max[g] : second;
  C sum, moment;
  tile_sums<C>(
      n,
      [=](int64_t i, C& e, C& de) {
        const C d = max - load(x[i]);
        e = exp_minus(d);
        de = e > C(0) ? d * e : C(0);
      },
      sum, moment);
  stats.max = static_cast<double>(max);
  stats.second = static_cast<double>(second);
  stats.sum = static_cast<double>(sum);
  stats.moment = static_cast<double>(moment);
  stats.argmax = start + at;
  return stats;
}

template <class C>
void join(const RowStatsArgs& a, int64_t r, const TileStats* tiles, int64_t num_tiles) {
  TileStats row{-kInf<double>, -kInf<double>, 0, 0, -1, true};
  for (int64_t t = 0; t < num_tiles; ++t) {
    row.good = row.good && tiles[t].good;
    row.second = std::max({row.second, tiles[t].second, std::min(row.max, tiles[t].max)});
    if (tiles[t].max > row.max) row.max = tiles[t].max, row.argmax = tiles[t].argmax;
  }
  a.status[r] = !row.good ? kStatusNaN : row.argmax < 0 ? kStatusNoMass : 0;
  if (a.status[r]) return;
  for (int64_t t = 0; t < num_tiles; ++t) {
    if (!(tiles[t].sum > 0)) continue;
    const double drop = row.max - tiles[t].max;
    const double scale = exp_minus(drop);
    row.sum += scale * tiles[t].sum;
    row.moment += scale * (tiles[t].moment + drop * tiles[t].sum);
  }
  const double log_sum = log_(row.sum);
  static_cast<C*>(a.max)[r] = static_cast<C>(row.max);
  static_cast<C*>(a.second)[r] = static_cast<C>(row.second);
  static_cast<C*>(a.logsumexp)[r] = static_cast<C>(row.max + log_sum);
  static_cast<C*>(a.entropy)[r] = static_cast<C>(log_sum + row.moment / row.sum);
  a.argmax[r] = row.argmax;
}

int64_t num_tiles(const RowStatsArgs& a) { return (a.vocab_size + kTile - 1) / kTile; }

// A row is cut into parts where there are fewer rows than threads. Results do not depend on it: tiles are joined in
// order either way.
template <class T, class C = Compute<T>>
void run(const RowStatsArgs& a, const Exec& ex) {
  const int64_t rows = a.batch * a.rows, tiles = num_tiles(a), V = a.vocab_size;
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
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t)
      all[r * tiles + t] = tile_stats(logits, t * kTile, std::min(kTile, V - t * kTile));
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
int64_t fastdecode::row_stats_scratch_bytes(const RowStatsArgs& a, const Exec&) {
  return a.batch * a.rows * FD_ISA::num_tiles(a) * static_cast<int64_t>(sizeof(FD_ISA::TileStats));
}
#endif
FD_CPU_OP(row_stats, RowStatsArgs)
