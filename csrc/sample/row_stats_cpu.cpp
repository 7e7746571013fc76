#include "sample/row_stats.h"

#include "core/dtype.h"
#include "core/fmath.h"
#include "core/rows.h"
#include "core/tiles.h"

namespace fastdecode::FD_ISA {
namespace {

// One tile, relative to its own maximum: sum of e^-d and of d e^-d, d = max - logit.
struct TileStats {
  double max, sum, moment;
};

template <class C>
struct TopTwo {
  C first = -kInf<C>, second = -kInf<C>;
};

// Largest and second largest of n values, NaN skipped.
template <class C>
TopTwo<C> top_two(const C* x, int64_t n) {
  constexpr int64_t kWide = 16;
  C first[kWide], second[kWide];
  for (int64_t l = 0; l < kWide; ++l) first[l] = second[l] = -kInf<C>;
  auto enter = [&](int64_t l, C value) {
    const C lower = value < first[l] ? value : first[l];
    first[l] = value > first[l] ? value : first[l];
    second[l] = lower > second[l] ? lower : second[l];
  };
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide)
    for (int64_t l = 0; l < kWide; ++l) enter(l, x[i + l]);
  for (int64_t l = 0; i + l < n; ++l) enter(l, x[i + l]);
  TopTwo<C> top;
  for (int64_t l = 0; l < kWide; ++l) {
    for (const C value : {first[l], second[l]}) {
      const C lower = std::min(value, top.first);
      top = {std::max(value, top.first), std::max(lower, top.second)};
    }
  }
  return top;
}

template <class T, class C = Compute<T>>
void one_row(const RowStatsArgs& a, int64_t r, const T* logits, TileStats* tiles) {
  alignas(64) C x[kTile], e[kTile], de[kTile];
  TopTwo<C> top;
  int64_t argmax_tile = 0;
  int bad = 0;
  int64_t num_tiles = 0;
  for (int64_t start = 0; start < a.vocab_size; start += kTile, ++num_tiles) {
    const int64_t n = std::min(kTile, a.vocab_size - start);
    for (int64_t i = 0; i < n; ++i) x[i] = load(logits[start + i]);
    for (int64_t i = 0; i < n; ++i) bad |= !(x[i] < kInf<C>);
    const TopTwo<C> here = top_two(x, n);
    if (here.first > top.first) argmax_tile = start;
    top.second = std::max(std::min(here.first, top.first), std::max(here.second, top.second));
    top.first = std::max(here.first, top.first);
    if (here.first == -kInf<C>) {
      tiles[num_tiles] = {-kInf<double>, 0, 0};
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      const C d = here.first - x[i];
      e[i] = exp_minus(d);
      de[i] = e[i] > C(0) ? d * e[i] : C(0);
    }
    tiles[num_tiles] = {static_cast<double>(here.first), static_cast<double>(tile_sum(e, n)),
                        static_cast<double>(tile_sum(de, n))};
  }
  const int32_t status = bad ? kStatusNaN : !(top.first > -kInf<C>) ? kStatusNoMass : 0;
  a.status[r] = status;
  if (status) return;

  const double max = static_cast<double>(top.first);
  double sum = 0, moment = 0;
  for (int64_t t = 0; t < num_tiles; ++t) {
    if (!(tiles[t].sum > 0)) continue;
    const double drop = max - tiles[t].max;
    const double scale = exp_minus(drop);
    sum += scale * tiles[t].sum;
    moment += scale * (tiles[t].moment + drop * tiles[t].sum);
  }
  const double log_sum = log_(sum);
  int64_t argmax = argmax_tile;
  while (load(logits[argmax]) != top.first) ++argmax;
  static_cast<C*>(a.max)[r] = top.first;
  static_cast<C*>(a.second)[r] = top.second;
  static_cast<C*>(a.logsumexp)[r] = static_cast<C>(max + log_sum);
  static_cast<C*>(a.entropy)[r] = static_cast<C>(log_sum + moment / sum);
  a.argmax[r] = argmax;
}

template <class T, class C = Compute<T>>
void run(const RowStatsArgs& a, const Exec& ex) {
  const int64_t tiles = (a.vocab_size + kTile - 1) / kTile;
  const int64_t bytes = tiles * static_cast<int64_t>(sizeof(TileStats));
  for_each_row(ex, a.batch * a.rows, a.vocab_size, a.scratch, bytes, [&](int64_t r, void* buffer) {
    a.argmax[r] = -1;
    a.status[r] = 0;
    for (void* out : {a.max, a.second, a.logsumexp, a.entropy}) static_cast<C*>(out)[r] = 0;
    const int64_t b = r / a.rows, row = r % a.rows;
    if (a.active && !a.active[b]) return;
    const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    one_row(a, r, logits, static_cast<TileStats*>(buffer));
  });
}

}  // namespace

void row_stats(const RowStatsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::row_stats_scratch_bytes(const RowStatsArgs& a, const Exec& ex) {
  using fastdecode::FD_ISA::kTile;
  return FD_ISA::num_slots(a.batch * a.rows, a.vocab_size, ex) * ((a.vocab_size + kTile - 1) / kTile) *
         static_cast<int64_t>(sizeof(FD_ISA::TileStats));
}
#endif
FD_CPU_OP(row_stats, RowStatsArgs)
