// Rows of logits are scanned (scan) and each is judged by itself (weigh, judge); block adds up what its rows leave
// (leave); where requests are few the race for the last token is cut into parts (race); and one block per request walks
// its verdicts and emits (finish).
#include "verify/walk.cuh"

namespace fastdecode::FD_ISA {
namespace {

// -- judging one row --

// What has run on the rows before they are judged.
struct Before {
  int scan_parts;  // 1: no scan
  int race_parts;  // coupled; 1: no race
  bool weighed;
};

// coupled: part blockIdx.x % parts of the race over a row that nothing cuts.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) race_row_kernel(ChainRows rows, int parts) {
  FD_SHARED(LawShared<C>, s);
  const RowView<T> view = rows.view<T>(blockIdx.x / parts);
  if (!view.live) return;
  const auto V = static_cast<int>(rows.vocab_size);
  const Span span = part_of(V, static_cast<int>(blockIdx.x % parts), parts);
  const Noise noise = rows.noise(view.b, kStreamToken, 0, view.row);
  Leader<C> leader;
  with_law(view.logits, V, view.filter, view.memory, s,
           [&](const auto& law) { leader = join_leaders(s.slots, race(law, noise, span)); });
  if (threadIdx.x == 0) rows.race_parts()[blockIdx.x] = {static_cast<double>(leader.best), leader.winner, false};
}

// Whether x is among the beta largest logits, ties by id, and at most tau below the largest.
template <class L>
__device__ bool among_best(const VerifyChainArgs& a, int64_t b, const L& law, int x) {
  using C = typename L::C;
  const int32_t beta = a.beta ? a.beta[b] : 1;
  const C tau = a.tau ? static_cast<C>(a.tau[b]) : C(0), logit = law.logit(x);
  int better = 0;
  for (int v = static_cast<int>(threadIdx.x); v < law.V; v += kThreads) {
    const C other = law.logit(v);
    better += other > logit || (other == logit && v < x);
  }
  better = block_reduce(law.s.slots, better, Plus{});
  return logit > -kInf<C> && law.max() - logit <= tau && better < beta;
}

template <class L>
__device__ void judge_law(const ChainRows& rows, int64_t b, int64_t i, int64_t x, const Before& before, L& law,
                          Verdict& out) {
  const VerifyChainArgs& a = rows.a;
  const bool drafted = i < rows.len(b);  // else the row after the last draft
  switch (a.rule) {
    case kRuleCoupled:
      if (before.race_parts > 1) {
        bool bad;
        const int parts = before.race_parts;
        out.token = join_parts(law.s.slots, rows.race_parts() + (b * (a.K + 1) + i) * parts, parts, bad);
      } else {
        out.token = draw(law, rows.draw_at(b, i, rows.noise(b, kStreamToken, 0, i)));
      }
      break;
    case kRuleTopBeta: out.accepted = drafted && x >= 0 && among_best(a, b, law, static_cast<int>(x)); break;
    default:
      if (!drafted) break;
      law.normalise(before.weighed);
      if (x >= 0) out.prob = static_cast<double>(law.prob(static_cast<int>(x)));
      if (a.rule == kRuleTypical) {
        const double least = typical_threshold(a, b, law.entropy());
        out.accepted = x >= 0 && out.prob > least;
      }
  }
  out.settled = law.settled();
}

// Of a row of probabilities: kStatusNaN, kStatusNoMass or 0.
template <class T, class C = Compute<T>>
__device__ int32_t status_of_probs(const T* row, int vocab_size) {
  int bad = 0, any = 0;
  for (int v = static_cast<int>(threadIdx.x); v < vocab_size; v += kThreads) {
    const C p = load(row[v]);
    bad |= !(p < kInf<C>);
    any |= p > C(0);
  }
  bad = __syncthreads_or(bad);
  any = __syncthreads_or(any);
  return bad ? kStatusNaN : any ? 0 : kStatusNoMass;
}

template <class T, class C = Compute<T>>
__device__ double entropy_of_probs(BlockSlots& slots, const T* row, int vocab_size, double* tile_sums) {
  return sum_row<T, C>(slots, vocab_size, nullptr, tile_sums, [&](int v, auto& out) {
    read(row, v, vocab_size, C(0), out);
    for (C& p : out) p = p > C(0) ? -p * log_(p) : C(0);
  });
}

template <class T, class C = Compute<T>>
__device__ void judge_probs(const ChainRows& rows, int64_t b, int64_t i, int64_t x, const RowView<T>& view,
                            LawShared<C>& s, Verdict& out) {
  const auto V = static_cast<int>(rows.vocab_size);
  if (rows.a.rule == kRuleTypical) {
    out.status = status_of_probs(view.logits, V);
    if (out.status) return;
    const double least = typical_threshold(rows.a, b, entropy_of_probs(s.slots, view.logits, V, view.memory.tile_sum));
    out.accepted = i < rows.len(b) && x >= 0 && static_cast<double>(load(view.logits[x])) > least;
    return;
  }
  if (x >= 0) out.prob = static_cast<double>(load(view.logits[x]));
  if (rows.a.rule == kRuleRatio && !(out.prob < kInf<double>)) out.status = kStatusNaN;
}

// A block per row.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) judge_kernel(ChainRows rows, Before before) {
  FD_SHARED(LawShared<C>, s);
  const int64_t job = blockIdx.x;
  const RowView<T> view = rows.view<T>(job);
  if (!view.live) return;
  const int64_t b = view.b, i = view.row, x = i < rows.len(b) ? rows.image(b, i) : -1;
  Verdict verdict{};
  if (rows.a.target_is_probs) {
    judge_probs(rows, b, i, x, view, s, verdict);
  } else {
    const auto V = static_cast<int>(rows.vocab_size);
    scan_if_alone(view, V, before.scan_parts);
    verdict.status = with_law(view.logits, V, view.filter, view.memory, s,
                              [&](auto& law) { judge_law(rows, b, i, x, before, law, verdict); });
  }
  if (x >= 0 && (rows.a.rule == kRuleRatio || rows.a.rule == kRuleBlock))
    verdict.draft_prob = rows.draft_prob<T, C>(s.slots, b, i, x);
  if (threadIdx.x == 0) rows.verdicts()[job] = verdict;
}

// -- block: what each row leaves after the weight of the drafts before it --

// A block per row. Rows that the walk does not reach are left out.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) leave_kernel(ChainRows rows) {
  FD_SHARED(LawShared<C>, s);
  const int64_t job = blockIdx.x;
  const RowView<T> view = rows.view<T>(job);
  if (!view.live || view.row >= rows.len(view.b)) return;
  const int64_t b = view.b;
  const Verdict* const verdicts = rows.verdicts() + b * (rows.a.K + 1);
  double weight = 1;
  for (int64_t i = 0; i < view.row && weight > 0; ++i) weight = next_weight(weight, verdicts[i], rows.image(b, i));
  if (!(weight > 0) || verdicts[view.row].status) return;
  const auto V = static_cast<int>(rows.vocab_size);
  const DraftRow<T, C> draft = rows.draft_of<T, C>(b, view.row, rows.mapped_at(job));
  const auto factor = static_cast<C>(weight);
  bool bad = false;
  double left = 0;
  if (rows.a.target_is_probs) {
    left =
        sum_row<T, C>(s.slots, V, nullptr, view.memory.tile_sum, residual_of_probs(view.logits, V, factor, draft, bad));
  } else {
    with_settled_law(view.logits, V, verdicts[view.row].settled, view.filter, view.memory, s, [&](const auto& law) {
      left = sum_row<typename std::decay_t<decltype(law)>::Row, C>(s.slots, V, law.kept(), view.memory.tile_sum,
                                                                   residual_of_law(law, factor, draft, bad));
    });
  }
  bad = __syncthreads_or(bad) != 0;
  if (threadIdx.x != 0) return;
  rows.lefts()[job] = left;
  rows.left_status()[job] = bad ? kStatusNaN : 0;
}

// -- the last token --

// One id of weights; -1, and kStatusNoMass, where none has any. `sum` as sum_row left it.
template <class T, class C, class ValueOf>
__device__ int64_t draw_weights(LawShared<C>& s, int vocab_size, const uint32_t* kept, double* tile_sums, const Draw& d,
                                const ValueOf& value) {
  if (!d.has_uniform) return join_leaders(s.slots, race_weights<C>(value, d.noise, {0, vocab_size})).winner;
  const double sum = sum_row<T, C>(s.slots, vocab_size, kept, tile_sums, value);
  return sum > 0 ? inverse_cdf<C>(s, vocab_size, tile_sums, sum, d.uniform, value) : -1;
}

// The last row has a noise of its own.
__device__ Noise last_noise(const ChainRows& rows, int64_t b, const Walk& walk) {
  return rows.noise(b, walk.row == rows.len(b) ? kStreamBonus : kStreamResidual, walk.row, 0);
}

// From rows of logits.
template <class T, class L, class C = Compute<T>>
__device__ int64_t draw_last(const ChainRows& rows, int64_t b, const Walk& walk, L& law, char* buffer,
                             int32_t& status) {
  const VerifyChainArgs& a = rows.a;
  using Row = typename L::Row;
  const Draw d = rows.draw_at(b, a.K, last_noise(rows, b, walk));
  if (walk.last == Last::kBonus) return draw(law, d);
  if (walk.last == Last::kLossy) {
    const int mode = law.mode();
    if (a.rule != kRuleTypical || a.bonus != kBonusSample) return mode;
    law.normalise();
    const double least = typical_threshold(a, b, law.entropy());
    return draw_weights<Row, C>(law.s, law.V, law.kept(), law.m.tile_sum, d, [&](int v, auto& out) {
      law.weights(v, out);
      int id = v;
      for (C& weight : out) {
        const bool stays = static_cast<double>(weight * law.inverse_sum()) > least || id == mode;
        weight = stays ? weight : C(0);
        ++id;
      }
    });
  }
  bool bad = false;
  const DraftRow<T, C> draft = rows.draft_of<T, C>(b, walk.row, buffer);
  const int64_t token = draw_weights<Row, C>(law.s, law.V, law.kept(), law.m.tile_sum, d,
                                             residual_of_law(law, static_cast<C>(walk.scale), draft, bad));
  if (__syncthreads_or(bad)) return status |= kStatusNaN, -1;
  if (token >= 0) return token;
  status |= kStatusResidualFallback;
  return draw(law, d);
}

// From rows of probabilities.
template <class T, class C = Compute<T>>
__device__ int64_t draw_last(const ChainRows& rows, int64_t b, const Walk& walk, const RowView<T>& view,
                             LawShared<C>& s, char* buffer, int32_t& status) {
  const VerifyChainArgs& a = rows.a;
  const auto V = static_cast<int>(rows.vocab_size);
  const T* const row = view.logits;
  double* const tile_sums = view.memory.tile_sum;
  const Draw d = rows.draw_at(b, a.K, last_noise(rows, b, walk));
  auto as_given = [&](int v, auto& out) { read(row, v, V, C(0), out); };
  if (walk.last == Last::kResidual) {
    bool bad = false;
    const DraftRow<T, C> draft = rows.draft_of<T, C>(b, walk.row, buffer);
    const int64_t token = draw_weights<T, C>(s, V, nullptr, tile_sums, d,
                                             residual_of_probs(row, V, static_cast<C>(walk.scale), draft, bad));
    if (__syncthreads_or(bad)) return status |= kStatusNaN, -1;
    if (token >= 0) return token;
    status |= kStatusResidualFallback;
  }
  if (const int32_t broken = status_of_probs(row, V)) return status |= broken, -1;
  if (walk.last != Last::kLossy) return draw_weights<T, C>(s, V, nullptr, tile_sums, d, as_given);
  C most = -kInf<C>;
  for (int v = static_cast<int>(threadIdx.x); v < V; v += kThreads) most = Larger{}(most, static_cast<C>(load(row[v])));
  most = block_reduce(s.slots, most, Larger{});
  int mode = V;
  for (int v = static_cast<int>(threadIdx.x); v < V && mode == V; v += kThreads)
    if (static_cast<C>(load(row[v])) == most) mode = v;
  mode = block_reduce(s.slots, mode, Smaller{});
  if (a.bonus != kBonusSample) return mode;
  const double least = typical_threshold(a, b, entropy_of_probs(s.slots, row, V, tile_sums));
  return draw_weights<T, C>(s, V, nullptr, tile_sums, d, [&](int v, auto& out) {
    read(row, v, V, C(0), out);
    int id = v;
    for (C& p : out) {
      p = static_cast<double>(p) > least || id == mode ? p : C(0);
      ++id;
    }
  });
}

// Part blockIdx.x % parts of a request's last race.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) race_kernel(ChainRows rows, int parts) {
  FD_SHARED(ChainShared<C>, shared);
  LawShared<C>& s = shared.law;
  const VerifyChainArgs& a = rows.a;
  const int64_t b = blockIdx.x / parts;
  if (!rows.valid(b)) return;
  const Walk walk = walk_of<T>(rows, b, shared);
  const bool bonus = walk.last == Last::kBonus;
  if ((walk.status & kStatusErrors) || !(bonus || walk.last == Last::kResidual)) return;
  const auto V = static_cast<int>(rows.vocab_size);
  const Span span = part_of(V, static_cast<int>(blockIdx.x % parts), parts);
  const Noise noise = last_noise(rows, b, walk);
  const int64_t job = b * (a.K + 1) + walk.row;
  const RowView<T> view = rows.view<T>(job);
  const C factor = bonus ? C(1) : static_cast<C>(walk.scale);
  Leader<C> leader;
  bool bad = false;
  if (a.target_is_probs) {  // a bonus is what no draft takes anything away from
    const DraftRow<T, C> draft = bonus ? DraftRow<T, C>{nullptr, nullptr, -1} : rows.draft_row<T, C>(b, walk.row);
    leader = race_weights<C>(residual_of_probs(view.logits, V, factor, draft, bad), noise, span);
  } else {
    with_settled_law(view.logits, V, rows.verdicts()[job].settled, view.filter, view.memory, s, [&](const auto& law) {
      if (bonus) {
        leader = race(law, noise, span);
      } else {
        const DraftRow<T, C> draft = rows.draft_row<T, C>(b, walk.row);
        leader = race_weights<C>(residual_of_law(law, factor, draft, bad), noise, span);
      }
    });
  }
  leader = join_leaders(s.slots, leader);
  bad = __syncthreads_or(bad) != 0;
  if (threadIdx.x == 0) rows.race_parts()[blockIdx.x] = {static_cast<double>(leader.best), leader.winner, bad};
}

// A block per request. `parts` of its race have run, 1: none.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) finish_kernel(ChainRows rows, int parts) {
  FD_SHARED(ChainShared<C>, shared);
  LawShared<C>& s = shared.law;
  const VerifyChainArgs& a = rows.a;
  const int64_t b = blockIdx.x, first = b * (a.K + 1);
  int64_t* const tokens = a.tokens + first;
  Walk walk;
  int64_t token = -1;
  if (rows.valid(b)) {
    walk = walk_of<T>(rows, b, shared);
    token = walk.token;
    bool draws = walk.last != Last::kNothing && walk.last != Last::kToken && !(walk.status & kStatusErrors);
    if (draws && parts > 1) {
      bool bad;
      token = join_parts(s.slots, rows.race_parts() + b * parts, parts, bad);
      if (bad) walk.status |= kStatusNaN;
      draws = !bad && token < 0;  // no id has weight: the block finds out what to do
    }
    if (draws) {
      const RowView<T> view = rows.view<T>(first + walk.row);
      char* const buffer = rows.mapped_at(a.rule == kRuleBlock ? first + walk.row : b);
      if (a.target_is_probs) {
        token = draw_last(rows, b, walk, view, s, buffer, walk.status);
      } else {
        with_settled_law(view.logits, static_cast<int>(rows.vocab_size), rows.verdicts()[first + walk.row].settled,
                         view.filter, view.memory, s,
                         [&](auto& law) { token = draw_last<T>(rows, b, walk, law, buffer, walk.status); });
      }
    }
  } else if (rows.active(b)) {
    walk.status = kStatusBadLength;
  }
  const bool fine = rows.valid(b) && !(walk.status & kStatusErrors);
  const int64_t emitted = fine ? walk.num_accepted + (walk.last != Last::kNothing) : 0;
  for (int64_t i = threadIdx.x; i <= a.K; i += kThreads) {
    int64_t value = -1;
    if (i < emitted) value = i < walk.num_accepted ? rows.image(b, i) : token;
    tokens[i] = value;
  }
  if (threadIdx.x != 0) return;
  a.num_accepted[b] = fine ? static_cast<int32_t>(walk.num_accepted) : 0;
  a.num_emitted[b] = static_cast<int32_t>(emitted);
  a.status[b] = walk.status;
}

ChainRows rows_of(const VerifyChainArgs& a) {
  const int64_t row = row_memory_bytes(a.vocab_size, may_edit(a.filters), a.dtype);
  const int64_t size = a.dtype == DType::kFloat64 ? 8 : 4;
  const bool maps = a.draft_to_target && a.draft_probs;
  return {a, a.batch * (a.K + 1), a.vocab_size, row, maps ? (a.vocab_size * (size + 8) + 15) / 16 * 16 : 0};
}

int num_scan_parts(const VerifyChainArgs& a, const Exec& ex) {
  return a.target_is_probs ? 1 : num_row_parts(a.batch * (a.K + 1), a.vocab_size, ex);
}

// Parts of the race over every row.
int num_row_race_parts(const VerifyChainArgs& a, const Exec& ex) {
  return a.rule == kRuleCoupled && a.random.seed && !may_cut(a.filters) ? num_scan_parts(a, ex) : 1;
}

// Parts of the race for a request's last token.
int num_last_race_parts(const VerifyChainArgs& a, const Exec& ex) {
  const bool may = a.random.seed && (a.rule == kRuleRatio || a.rule == kRuleBlock);
  return may && !(a.draft_probs && a.draft_to_target) ? num_row_parts(a.batch, a.vocab_size, ex) : 1;
}

template <class T>
void run(const VerifyChainArgs& a, const Exec& ex) {
  const ChainRows rows = rows_of(a);
  const unsigned blocks = grid_of(rows.num_rows), batch = grid_of(a.batch);
  const bool sums = a.rule == kRuleRatio || a.rule == kRuleBlock || a.rule == kRuleTypical;
  const int parts = num_scan_parts(a, ex), race_parts = num_last_race_parts(a, ex);
  const Before before{parts, num_row_race_parts(a, ex), parts > 1 && sums && !may_cut(a.filters)};
  if (!a.target_is_probs) launch_scan<T>(rows, parts, ex);
  if (before.weighed) launch_weigh<T>(rows, parts, ex);
  if (before.race_parts > 1)
    FD_LAUNCH((race_row_kernel<T>), grid_of(rows.num_rows * parts), kThreads, 0, ex.stream, rows, parts);
  if (!judges_in_walk(a)) FD_LAUNCH((judge_kernel<T>), blocks, kThreads, 0, ex.stream, rows, before);
  if (a.rule == kRuleBlock) FD_LAUNCH((leave_kernel<T>), blocks, kThreads, 0, ex.stream, rows);
  if (race_parts > 1)
    FD_LAUNCH((race_kernel<T>), grid_of(a.batch * race_parts), kThreads, 0, ex.stream, rows, race_parts);
  FD_LAUNCH((finish_kernel<T>), batch, kThreads, 0, ex.stream, rows, race_parts);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::verify_chain_scratch_bytes(const VerifyChainArgs& a, const Exec& ex) {
  FD_ISA::ChainRows from_zero = FD_ISA::rows_of(a);
  from_zero.a.scratch = nullptr;
  const int64_t of_rows = from_zero.num_rows * FD_ISA::num_row_race_parts(a, ex);
  const int64_t of_requests = a.batch * FD_ISA::num_last_race_parts(a, ex);
  return reinterpret_cast<intptr_t>(from_zero.race_parts() + (of_rows > of_requests ? of_rows : of_requests));
}

void fastdecode::cuda::verify_chain(const VerifyChainArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  FD_ISA::dispatch_logits(a.dtype, [&](auto tag) { FD_ISA::run<typename decltype(tag)::type>(a, ex); });
}
