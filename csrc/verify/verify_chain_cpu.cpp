#include "verify/verify_chain.h"

#include "core/cpu/draw.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

// What a rule has to know of one row of logits to judge the draft in it.
struct Verdict {
  int32_t status = 0;
  bool accepted = false;  // typical, top_beta
  int64_t token = -1;     // coupled: the row's draw
  double prob = 0;        // ratio: of the draft
  double max = 0, sum = 0;
};

// One request: its rows, its randomness, and what it has emitted so far.
template <class T, class C = Compute<T>>
class Request {
 public:
  Request(const VerifyChainArgs& args, int64_t b, void* buffer)
      : a(args),
        b(b),
        V(args.vocab_size),
        s(row_scratch<C>(buffer, V)),
        mapped(reinterpret_cast<C*>(static_cast<char*>(buffer) + row_scratch_bytes<C>(V))),
        tokens(a.tokens + b * (a.K + 1)) {}

  bool active() const { return !a.active || a.active[b]; }
  int64_t len() const { return a.draft_lens ? a.draft_lens[b] : a.K; }
  bool valid() const {
    if (len() < 0 || len() > a.K) return false;
    if (!a.row_start) return true;
    const int64_t first = a.row_start[b], end = a.row_start[b + 1];
    return first >= 0 && end <= a.num_rows && end - first > len();
  }

  // `verdicts`: one per draft, made before by judge(); nullptr = judge when a row is reached.
  void run(const Verdict* verdicts) {
    std::fill(tokens, tokens + a.K + 1, int64_t{-1});
    a.num_accepted[b] = a.num_emitted[b] = a.status[b] = 0;
    if (!active()) return;
    if (!valid()) {
      status = kStatusBadLength;
    } else if (a.rule == kRuleBlock) {
      block();
    } else {
      chain(verdicts);
    }
    a.status[b] = status;
    if (status & kStatusErrors) {
      std::fill(tokens, tokens + a.K + 1, int64_t{-1});
      return;
    }
    a.num_accepted[b] = num_accepted;
    a.num_emitted[b] = num_emitted;
  }

  // Judges draft i by its row, which no other draft's fate changes.
  FD_ROW Verdict judge(int64_t i) {
    Verdict verdict;
    const int64_t x = image(i);
    if (a.target_is_probs) {
      if (a.rule == kRuleRatio) {
        verdict.prob = x < 0 ? 0 : static_cast<double>(load(target_row(i)[x]));
        if (!(verdict.prob < kInf<double>)) verdict.status = kStatusNaN;
      } else {
        verdict.status = load_probs(i);
        if (!verdict.status) verdict.accepted = x >= 0 && clears(static_cast<double>(s.other[x]), entropy_of_probs());
      }
      return verdict;
    }
    verdict.status = with_target(i, [&](auto& law) {
      switch (a.rule) {
        case kRuleCoupled: verdict.token = draw(law, uniform(i), noise(kStreamToken, 0, i)); break;
        case kRuleTopBeta: verdict.accepted = x >= 0 && among_best(law, x); break;
        default:
          law.normalise();
          verdict.prob = x < 0 ? 0 : static_cast<double>(law.prob(x));
          if (a.rule == kRuleTypical) verdict.accepted = x >= 0 && clears(verdict.prob, law.entropy());
      }
      verdict.max = static_cast<double>(law.max());
      verdict.sum = law.sum();
    });
    return verdict;
  }

 private:
  // Every rule but block: accept drafts one by one, then one token more.
  FD_ROW void chain(const Verdict* verdicts) {
    for (int64_t i = 0; i < len(); ++i) {
      const Verdict verdict = verdicts ? verdicts[i] : judge(i);
      if (verdict.status) return fail(verdict.status);
      const int64_t x = image(i);
      if (x < 0) status |= kStatusUnmappedDraft;
      if (!accepts(i, x, verdict)) {
        if (status & kStatusErrors) return;
        return a.rule == kRuleCoupled ? emit(verdict.token) : emit_after_rejection(i, verdict);
      }
      emit(x);
      ++num_accepted;
    }
    if (a.emit_bonus) emit_bonus();
  }

  bool accepts(int64_t i, int64_t x, const Verdict& verdict) {
    if (a.rule == kRuleCoupled) return x >= 0 && x == verdict.token;
    if (a.rule != kRuleRatio) return verdict.accepted;
    if (x < 0) return false;
    const double draft_p = draft_prob(i, x);
    if (!(draft_p < kInf<double>)) return fail(kStatusNaN), false;
    if (!(draft_p > 0)) return status |= kStatusZeroDraftProb, false;
    return acceptance(i) * draft_p < verdict.prob;
  }

  void emit_after_rejection(int64_t i, const Verdict& verdict) {
    const Noise row_noise = noise(kStreamResidual, i, 0);
    if (a.rule != kRuleRatio) return emit_lossy(i, row_noise);
    if (a.target_is_probs) return emit_residual(i, 1.0, row_noise);
    with_target(i, [&](auto& law) { emit_residual(i, law, 1.0, row_noise); }, &verdict);
  }

  // One token from the target row after the last draft token.
  FD_ROW void emit_bonus() {
    const int64_t row = len();
    const Noise row_noise = noise(kStreamBonus, row, 0);
    if (a.rule == kRuleTypical || a.rule == kRuleTopBeta) return emit_lossy(row, row_noise);
    if (!a.target_is_probs) {
      const bool coupled = a.rule == kRuleCoupled;
      status |= with_target(row, [&](auto& law) {
        emit(draw(law, uniform(coupled ? row : a.K), coupled ? noise(kStreamToken, 0, row) : row_noise));
      });
      return;
    }
    if (const int32_t bad = load_probs(row)) return fail(bad);
    emit_drawn(s.other, row_noise);
  }

  // -- block --

  FD_ROW void block() {
    int64_t kept = 0;  // longest accepted prefix
    double kept_weight = 1, weight = 1;
    for (int64_t i = 0; i < len() && weight > 0; ++i) {
      double target_p = 0, left = 0;  // of draft i; (weight * target - draft)+ in its row
      const int64_t x = image(i);
      if (!read_block_row(i, x, weight, target_p, left)) return;
      // prefix of i drafts, judged by what its next row leaves
      if (i > 0 && accept_block(i, weight, left)) kept = i, kept_weight = weight;
      double draft_p = 1;
      if (x < 0) {
        status |= kStatusUnmappedDraft;
      } else {
        draft_p = draft_prob(i, x);
        if (!(draft_p < kInf<double>)) return fail(kStatusNaN);
        if (!(draft_p > 0)) status |= kStatusZeroDraftProb;
      }
      weight = x >= 0 && draft_p > 0 ? std::min(1.0, weight * target_p / draft_p) : 0;
      if (i + 1 == len() && acceptance(i) < weight) kept = len();
    }
    for (int64_t i = 0; i < kept; ++i) emit(image(i));
    num_accepted = static_cast<int32_t>(kept);
    if (kept == len()) {
      if (a.emit_bonus) emit_bonus();
      return;
    }
    const Noise row_noise = noise(kStreamResidual, kept, 0);
    if (a.target_is_probs) return emit_residual(kept, kept_weight, row_noise);
    with_target(kept, [&](auto& law) { emit_residual(kept, law, kept_weight, row_noise); });
  }

  // u < left / (left + 1 - weight), 1 where that is 0 / 0
  bool accept_block(int64_t prefix, double weight, double left) {
    const double whole = left + (1 - weight);
    return !(whole > 0) || acceptance(prefix - 1) * whole < left;
  }

  bool read_block_row(int64_t i, int64_t x, double weight, double& target_p, double& left) {
    int32_t bad = 0;
    if (a.target_is_probs) {
      target_p = x < 0 ? 0 : static_cast<double>(load(target_row(i)[x]));
      bad = residual_of_probs(i, weight, left);
    } else {
      int32_t residual_bad = 0;
      bad = with_target(i, [&](auto& law) {
        law.normalise();
        target_p = x < 0 ? 0 : static_cast<double>(law.prob(x));
        residual_bad = residual_of_law(i, law, weight, left);
      });
      bad |= residual_bad;
    }
    status |= bad;
    return bad == 0;
  }

  // -- the residual --

  // Leaves (scale * target - draft)+ of row i in s.other, entry j for id ids[j] (all ids where nullptr), and its sum.
  // target(wide, j) gives target probabilities. kStatusNaN where a number read is none.
  template <class TargetOf>
  int32_t residual(int64_t i, double scale, const uint32_t* ids, int64_t count, const TargetOf& target, double& sum) {
    const auto factor = static_cast<C>(scale);
    if (!a.draft_probs) return take_away(ids, count, factor, target, static_cast<const C*>(nullptr), image(i), sum);
    if (a.draft_to_target) return take_away(ids, count, factor, target, map_draft(i), -1, sum);
    int32_t bad = 0;
    with_draft(i, [&](const auto* draft) { bad = take_away(ids, count, factor, target, draft, -1, sum); });
    return bad;
  }

  // `draft` by id; nullptr = one-hot at x, -1 for nowhere.
  template <class TargetOf, class D>
  FD_ROW int32_t take_away(const uint32_t* ids, int64_t count, C factor, const TargetOf& target, const D* draft,
                           int64_t x, double& sum) {
    C* const out = s.other;
    LaneBits<C> bad = {};
    bool bad_rest = false;
    sum = sum_over<C>(ids, count, [&](auto wide, int64_t j) {
      auto target_v = target(wide, j);
      auto draft_v = target_v * C(0);
      if (draft) draft_v = take(wide, draft + (ids ? ids[j] : j));
      if constexpr (wide) {
        bad |= ~(LaneBits<C>)(target_v < kInf<C>) | ~(LaneBits<C>)(draft_v < kInf<C>);
      } else {
        bad_rest |= !(target_v < kInf<C>) || !(draft_v < kInf<C>);
      }
      target_v *= factor;
      const auto left = target_v - draft_v;
      auto kept = left > C(0) ? left : draft_v * C(0);
      if constexpr (wide) {
        if (x >= j && x < j + kWide) kept[x - j] = C(0);
      } else {
        if (x == (ids ? ids[j] : j)) kept = C(0);
      }
      put(wide, out + j, kept);
      return kept;
    });
    return bad_rest || any_bit(bad) ? kStatusNaN : 0;
  }

  template <class E>
  FD_ROW int32_t residual_of_law(int64_t i, const Law<E>& law, double scale, double& sum) {
    const C inverse = law.inverse_sum();
    if (law.dense()) {
      return residual(
          i, scale, nullptr, V, [&](auto wide, int64_t v) { return exp_minus(law.distance(wide, v)) * inverse; }, sum);
    }
    const C* weight = s.weight;
    return residual(
        i, scale, s.ids, law.count(), [=](auto wide, int64_t j) { return take(wide, weight + j) * inverse; }, sum);
  }

  FD_ROW int32_t residual_of_probs(int64_t i, double scale, double& sum) {
    const T* row = target_row(i);
    return residual(i, scale, nullptr, V, [row](auto wide, int64_t v) { return take(wide, row + v); }, sum);
  }

  // After a rejection in row i.
  template <class E>
  FD_ROW void emit_residual(int64_t i, Law<E>& law, double scale, const Noise& row_noise) {
    if (law.sum() == 0) law.normalise();
    double sum = 0;
    if (const int32_t bad = residual_of_law(i, law, scale, sum)) return fail(bad);
    if (sum > 0) {
      const Weights<C> left{law.dense() ? nullptr : s.ids, s.other, law.count()};
      return emit(draw(left, sum, uniform(a.K), row_noise));
    }
    status |= kStatusResidualFallback;
    emit(draw(law, uniform(a.K), row_noise));
  }

  FD_ROW void emit_residual(int64_t i, double scale, const Noise& row_noise) {
    double sum = 0;
    if (const int32_t bad = residual_of_probs(i, scale, sum)) return fail(bad);
    if (sum > 0) return emit(draw(Weights<C>{nullptr, s.other, V}, sum, uniform(a.K), row_noise));
    status |= kStatusResidualFallback;
    if (const int32_t bad = load_probs(i)) return fail(bad);
    emit_drawn(s.other, row_noise);
  }

  // -- typical and top_beta --

  double threshold(double entropy) const {
    const double eps = a.eps ? a.eps[b] : 0.09f, delta = a.delta ? a.delta[b] : 0.3f;
    return std::min(eps, delta * exp_minus(entropy > 0 ? entropy : 0.0));
  }
  bool clears(double prob, double entropy) const { return prob > threshold(entropy); }

  // Whether x is among the beta largest logits, ties by id, and at most tau below the largest.
  template <class E>
  FD_ROW bool among_best(const Law<E>& law, int64_t x) const {
    const int32_t beta = a.beta ? a.beta[b] : 1;
    const C tau = a.tau ? static_cast<C>(a.tau[b]) : C(0);
    const C logit = law.logit(x);
    if (!(logit > -kInf<C>) || !(law.max() - logit <= tau)) return false;
    int64_t better = 0;
    for (int64_t v = 0; v < V; ++v) better += law.logit(v) > logit;
    for (int64_t v = 0; v < x; ++v) better += law.logit(v) == logit;
    return better < beta;
  }

  // The last token: the argmax, or a draw from the ids that would have been accepted.
  FD_ROW void emit_lossy(int64_t i, const Noise& row_noise) {
    const bool sampled = a.rule == kRuleTypical && a.bonus == kBonusSample;
    if (a.target_is_probs) {
      if (const int32_t bad = load_probs(i)) return fail(bad);
      int64_t mode = 0;
      for (int64_t v = 1; v < V; ++v) mode = s.other[v] > s.other[mode] ? v : mode;
      if (!sampled) return emit(mode);
      const double least = threshold(entropy_of_probs());
      for (int64_t v = 0; v < V; ++v)
        s.other[v] = static_cast<double>(s.other[v]) > least || v == mode ? s.other[v] : C(0);
      return emit_drawn(s.other, row_noise);
    }
    status |= with_target(i, [&](auto& law) {
      if (!sampled) return emit(law.mode());
      law.store_weights();
      const double least = threshold(law.entropy());
      const Weights<C> all = law.weights();
      const int64_t mode = law.mode();
      const C inverse = law.inverse_sum();
      for (int64_t j = 0; j < all.count; ++j) {
        const bool stays = static_cast<double>(all.weight[j] * inverse) > least || all.id(j) == mode;
        s.other[j] = stays ? all.weight[j] : C(0);
      }
      const Weights<C> cut{all.ids, s.other, all.count};
      emit(draw(cut, sum_of(cut), uniform(a.K), row_noise));
    });
  }

  // -- rows of probabilities --

  // Row i into s.other.
  FD_ROW int32_t load_probs(int64_t i) {
    const T* row = target_row(i);
    C* const out = s.other;
    int bad = 0, any = 0;
    for (int64_t v = 0; v < V; ++v) {
      out[v] = static_cast<C>(load(row[v]));
      bad |= !(out[v] < kInf<C>);
      any |= out[v] > C(0);
    }
    return bad ? kStatusNaN : any ? 0 : kStatusNoMass;
  }

  FD_ROW double entropy_of_probs() const {
    const C* p = s.other;
    double sum = 0;
    for (int64_t start = 0; start < V; start += kTile) {
      TileSum<C> tile;
      for (int64_t v = start; v < std::min(V, start + kTile); ++v) tile.add(v, p[v] > C(0) ? -p[v] * log_(p[v]) : C(0));
      sum += static_cast<double>(tile.join());
    }
    return sum;
  }

  void emit_drawn(const C* weight, const Noise& row_noise) {
    const Weights<C> all{nullptr, weight, V};
    const double sum = sum_of(all);
    if (!(sum > 0)) return fail(kStatusNoMass);
    emit(draw(all, sum, uniform(a.K), row_noise));
  }

  // -- access --

  int64_t flat_row(int64_t i) const { return a.row_start ? a.row_start[b] + i : 0; }

  // use(law) on row i; `before`: what an earlier reading of the row found.
  template <class Use>
  int32_t with_target(int64_t i, const Use& use, const Verdict* before = nullptr) {
    const RowFilter f = row_filter(a.filters, b, i, flat_row(i));
    if (before && before->sum > 0 && !f.edits() && !f.cuts()) {
      Law<T> law(target_row(i), V, static_cast<C>(before->max), before->sum, f, s);
      use(law);
      return 0;
    }
    return with_law(target_row(i), V, f, s, use);
  }

  // The draft's id in the target's vocabulary, -1 if there is none.
  int64_t image(int64_t i) const {
    const int64_t id = a.draft_tokens[b * a.draft_stride + i];
    if (id < 0 || id >= a.draft_vocab_size) return -1;
    const int64_t x = a.draft_to_target ? a.draft_to_target[id] : id;
    return x >= 0 && x < V ? x : -1;
  }

  // Draft probability of target id x in row i.
  double draft_prob(int64_t i, int64_t x) const {
    double prob = 1;
    if (!a.draft_probs) return prob;
    with_draft(i, [&](const auto* row) {
      if (!a.draft_to_target) {
        prob = static_cast<double>(load(row[x]));
        return;
      }
      prob = 0;  // several draft ids may mean one id of the target
      for (int64_t d = 0; d < a.draft_vocab_size; ++d)
        if (a.draft_to_target[d] == x) prob += static_cast<double>(load(row[d]));
    });
    return prob;
  }

  // The draft's row i over the target's vocabulary.
  const C* map_draft(int64_t i) {
    std::fill(mapped, mapped + V, C(0));
    with_draft(i, [&](const auto* row) {
      for (int64_t d = 0; d < a.draft_vocab_size; ++d) {
        const int64_t x = a.draft_to_target[d];
        if (x >= 0 && x < V) mapped[x] += static_cast<C>(load(row[d]));
      }
    });
    return mapped;
  }

  double acceptance(int64_t i) const {
    if (a.random.uniforms) return *uniform(i);
    return acceptance_uniform(noise(kStreamAccept, 0, 0).word(i + 1));  // draft i stands in slot i + 1
  }

  std::optional<double> uniform(int64_t i) const {
    if (!a.random.uniforms) return std::nullopt;
    return a.random.uniforms[b * a.random.uniform_stride + i];
  }

  Noise noise(int64_t stream, int64_t node, int64_t ahead) const {
    if (!a.random.seed) return Noise(0, 0, stream, node);  // uniforms are used instead, or nothing is drawn
    return Noise(a.random.seed[b], a.random.offset[b] + ahead, stream, node);
  }

  const T* target_row(int64_t i) const {
    const auto* target = static_cast<const T*>(a.target);
    return target + b * a.target_stride + (flat_row(i) + (a.row_start ? 0 : i)) * a.target_row_stride;
  }
  // use(row) on the draft's probabilities of row i.
  template <class Use>
  void with_draft(int64_t i, const Use& use) const {
    const int64_t at = b * a.draft_prob_stride + i * a.draft_prob_row_stride;
    if (a.draft_dtype == a.dtype) {
      use(static_cast<const T*>(a.draft_probs) + at);
    } else {
      use(static_cast<const C*>(a.draft_probs) + at);
    }
  }
  void emit(int64_t token) { tokens[num_emitted++] = token; }
  void fail(int32_t bit) { status |= bit; }

  const VerifyChainArgs& a;
  const int64_t b, V;
  const RowScratch<C> s;
  C* const mapped;
  int64_t* const tokens;
  int32_t num_accepted = 0, num_emitted = 0, status = 0;
};

int64_t buffer_bytes(const VerifyChainArgs& a) {
  const int64_t size = a.dtype == DType::kFloat64 ? 8 : 4;
  return row_scratch_bytes(a.vocab_size, a.dtype) +
         (a.draft_to_target && a.draft_probs ? detail::round_up(a.vocab_size * size) : 0);
}

// Few requests would leave threads idle: judge all drafts at once first. Otherwise rows behind a rejection are spared.
bool judges_first(const VerifyChainArgs& a, const Exec& ex) {
  return a.batch < ex.num_threads && a.rule != kRuleBlock && !a.target_is_probs &&
         num_slots(a.batch * a.K, a.vocab_size, ex) > 1;
}

int64_t num_buffers(const VerifyChainArgs& a, const Exec& ex) {
  return std::max(num_slots(a.batch, (a.K + 1) * a.vocab_size, ex),
                  judges_first(a, ex) ? num_slots(a.batch * a.K, a.vocab_size, ex) : 1);
}

template <class T>
void run(const VerifyChainArgs& a, const Exec& ex) {
  const int64_t bytes = buffer_bytes(a);
  Verdict* verdicts = nullptr;
  if (judges_first(a, ex)) {
    verdicts = reinterpret_cast<Verdict*>(static_cast<char*>(a.scratch) + num_buffers(a, ex) * bytes);
    for_each_row(ex, a.batch * a.K, a.vocab_size, a.scratch, bytes, [&](int64_t job, void* buffer) {
      Request<T> request(a, job / a.K, buffer);
      if (!request.active() || !request.valid() || job % a.K >= request.len()) return;
      verdicts[job] = request.judge(job % a.K);
    });
  }
  for_each_row(ex, a.batch, (a.K + 1) * a.vocab_size, a.scratch, bytes,
               [&](int64_t b, void* buffer) { Request<T>(a, b, buffer).run(verdicts ? verdicts + b * a.K : nullptr); });
}

}  // namespace

void verify_chain(const VerifyChainArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::verify_chain_scratch_bytes(const VerifyChainArgs& a, const Exec& ex) {
  const auto verdicts = FD_ISA::judges_first(a, ex) ? a.batch * a.K * static_cast<int64_t>(sizeof(FD_ISA::Verdict)) : 0;
  return FD_ISA::num_buffers(a, ex) * FD_ISA::buffer_bytes(a) + verdicts;
}
#endif
FD_CPU_OP(verify_chain, VerifyChainArgs)
