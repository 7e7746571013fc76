#include "verify/verify_chain.h"

#include "core/rows.h"
#include "core/sample_row.h"

namespace fastdecode::FD_ISA {
namespace {

// One request: its rows, its randomness, and what it has emitted so far.
// T: elements of the target, Q: of the draft probabilities.
template <class T, class Q, class C = Compute<T>>
class Request {
 public:
  Request(const VerifyChainArgs& args, int64_t b, void* buffer)
      : a(args), b(b), V(args.vocab_size), s(row_scratch<C>(buffer, V)), tokens(a.tokens + b * (a.K + 1)) {}

  void run() {
    std::fill(tokens, tokens + a.K + 1, int64_t{-1});
    a.num_accepted[b] = a.num_emitted[b] = a.status[b] = 0;
    if (a.active && !a.active[b]) return;
    const int64_t len = a.draft_lens ? a.draft_lens[b] : a.K;
    if (len < 0 || len > a.K) {
      status = kStatusBadLength;
    } else if (a.rule == kRuleCoupled) {
      coupled(len);
    } else {
      ratio(len);
    }
    a.status[b] = status;
    if (status & kStatusErrors) {
      std::fill(tokens, tokens + a.K + 1, int64_t{-1});
      return;
    }
    a.num_accepted[b] = num_accepted;
    a.num_emitted[b] = num_emitted;
  }

 private:
  void coupled(int64_t len) {
    for (int64_t i = 0; i <= len; ++i) {
      if (i == len && !a.emit_bonus) return;
      if (!load_law(i)) return;
      const int64_t token = draw_from_law(law, s, V, uniform(i), noise(kStreamToken, 0, i));
      emit(token);
      if (i == len) return;
      if (outside(draft(i))) status |= kStatusUnmappedDraft;
      if (token != draft(i)) return;
      ++num_accepted;
    }
  }

  void ratio(int64_t len) {
    for (int64_t i = 0; i < len; ++i) {
      if (!a.target_is_probs && !load_law(i)) return;
      const int64_t x = draft(i);
      double target_p = 0, draft_p = 1;
      if (outside(x)) {
        status |= kStatusUnmappedDraft;
      } else {
        target_p = target_prob(i, x);
        if (a.draft_probs) draft_p = load(draft_row(i)[x]);
        if (!(target_p < kInf<double>) || !(draft_p < kInf<double>)) return fail(kStatusNaN);
        if (!(draft_p > 0)) status |= kStatusZeroDraftProb;
      }
      if (draft_p > 0 && acceptance(i) * draft_p < target_p) {
        emit(x);
        ++num_accepted;
      } else {
        return emit_residual(i, x);
      }
    }
    if (a.emit_bonus) emit_bonus(len);
  }

  // One token from norm((target - draft)+) of row i, whose draft x was rejected.
  void emit_residual(int64_t i, int64_t x) {
    const bool dense = a.draft_probs != nullptr;
    const Q* draft_law = dense ? draft_row(i) : nullptr;
    int bad = 0;
    for (int64_t v = 0; v < V; ++v) {
      const C target_v = static_cast<C>(target_prob(i, v));
      const C draft_v = dense ? load(draft_law[v]) : C(0);
      bad |= !(target_v < kInf<C>) | !(draft_v < kInf<C>);
      const C t = target_v - draft_v;
      s.weight[v] = t > C(0) ? t : C(0);
    }
    if (bad) return fail(kStatusNaN);
    if (!dense && !outside(x)) s.weight[x] = C(0);
    if (!(row_sum(s.weight, V) > 0)) {
      status |= kStatusResidualFallback;
      if (!a.target_is_probs && !load_law(i)) return;  // the residual stands where the law's weights stood
      for (int64_t v = 0; v < V; ++v) s.weight[v] = static_cast<C>(target_prob(i, v));
    }
    emit_from_weights(noise(kStreamResidual, i, 0));
  }

  // One token from the target row after the last draft token.
  void emit_bonus(int64_t len) {
    if (!a.target_is_probs) {
      if (load_law(len)) emit(draw_from_law(law, s, V, uniform(a.K), noise(kStreamBonus, len, 0)));
      return;
    }
    int bad = 0;
    for (int64_t v = 0; v < V; ++v) {
      s.weight[v] = static_cast<C>(target_prob(len, v));
      bad |= !(s.weight[v] < kInf<C>);
    }
    if (bad) return fail(kStatusNaN);
    emit_from_weights(noise(kStreamBonus, len, 0));
  }

  // One token from s.weight, which need not sum to 1.
  void emit_from_weights(const Noise& row_noise) {
    const double sum = row_sum(s.weight, V);
    if (!(sum > 0)) return fail(kStatusNoMass);
    if (a.random.uniforms) return emit(inverse_cdf(s.weight, V, sum, *uniform(a.K)));
    int64_t kept = 0;
    for (int64_t v = 0; v < V; ++v) {
      s.distance[v] = log_(s.weight[v]);
      kept += s.weight[v] > C(0);
    }
    const C* key = s.distance;
    emit(race<C>(V, kept, row_noise, [key](int64_t v) { return key[v]; }));
  }

  bool load_law(int64_t i) {
    law = row_law(target_row(i), V, row_filter(a.filters, b, i), s);
    status |= law.status;
    return law.status == 0;
  }

  // After load_law(i), or with probabilities.
  double target_prob(int64_t i, int64_t v) const {
    return a.target_is_probs ? static_cast<double>(load(target_row(i)[v]))
                             : static_cast<double>(s.weight[v] * law.inverse_sum);
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
    if (!a.random.seed) return Noise(0, 0, stream, node);  // uniforms are used instead
    return Noise(a.random.seed[b], a.random.offset[b] + ahead, stream, node);
  }

  int64_t draft(int64_t i) const { return a.draft_tokens[b * a.draft_stride + i]; }
  bool outside(int64_t id) const { return id < 0 || id >= V; }
  const T* target_row(int64_t i) const {
    return static_cast<const T*>(a.target) + b * a.target_stride + i * a.target_row_stride;
  }
  const Q* draft_row(int64_t i) const {
    return static_cast<const Q*>(a.draft_probs) + b * a.draft_prob_stride + i * a.draft_prob_row_stride;
  }
  void emit(int64_t token) { tokens[num_emitted++] = token; }
  void fail(int32_t bit) { status |= bit; }

  const VerifyChainArgs& a;
  const int64_t b, V;
  const RowScratch<C> s;
  int64_t* const tokens;
  RowLaw<C> law;
  int32_t num_accepted = 0, num_emitted = 0, status = 0;
};

}  // namespace

void verify_chain(const VerifyChainArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t bytes = row_scratch_bytes(a.vocab_size, sizeof(Compute<T>) == 8);
    for_each_row(ex, a.batch, (a.K + 1) * a.vocab_size, a.scratch, bytes, [&](int64_t b, void* buffer) {
      if (a.draft_dtype == a.dtype) {
        Request<T, T>(a, b, buffer).run();
      } else {
        Request<T, Compute<T>>(a, b, buffer).run();
      }
    });
  });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::verify_chain_scratch_bytes(const VerifyChainArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(a.batch, (a.K + 1) * a.vocab_size, ex) *
         FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype == DType::kFloat64);
}
#endif
FD_CPU_OP(verify_chain, VerifyChainArgs)
