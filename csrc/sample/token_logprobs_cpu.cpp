#include "sample/token_logprobs.h"

#include "core/cpu/law.h"
#include "core/cpu/nearest.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

int64_t num_rows(const TokenLogprobsArgs& a) { return a.row_start ? a.rows : a.batch * a.rows; }

template <class T, class C = Compute<T>>
void run(const TokenLogprobsArgs& a, const Exec& ex) {
  const int64_t V = a.vocab_size;
  for_each_row(ex, num_rows(a), V, a.scratch, row_scratch_bytes<C>(V), [&](int64_t r, void* buffer) {
    const auto [b, row] = owner_of(r, a.rows, a.row_start, a.batch);
    C* logprob = static_cast<C*>(a.logprobs) + r;
    int64_t* ids = a.top_ids + r * a.top;
    C* top_logprobs = static_cast<C*>(a.top_logprobs) + r * a.top;
    *logprob = 0;
    a.status[r] = 0;
    std::fill(ids, ids + a.top, int64_t{-1});
    std::fill(top_logprobs, top_logprobs + a.top, -kInf<C>);
    if (b < 0 || (a.active && !a.active[b])) return;
    const int64_t token = a.row_start ? a.tokens[r] : a.tokens[b * a.token_stride + row];
    if (token == -1 && a.top == 0) return;
    const T* logits =
        static_cast<const T*>(a.logits) + (a.row_start ? r * a.row_stride : b * a.batch_stride + row * a.row_stride);
    const RowScratch<C> s = row_scratch<C>(buffer, V);
    a.status[r] = with_law(logits, V, row_filter(a.filters, b, row, r), s, [&](auto& law) {
      law.normalise();
      const double log_sum = log_(law.sum());
      auto logprob_of = [&](C distance) { return static_cast<C>(-(static_cast<double>(distance) + log_sum)); };
      const bool inside = token >= 0 && token < V;
      if (token != -1) *logprob = inside ? logprob_of(law.kept_distance(token)) : -kInf<C>;
      if (a.top == 0) return;
      law.keep_top(a.top);
      const uint32_t* order = nearest_first(law);
      for (int64_t i = 0; i < law.count(); ++i) {
        ids[i] = s.ids[order[i]];
        top_logprobs[i] = logprob_of(s.distance[order[i]]);
      }
    });
    if (!a.status[r] && (token < -1 || token >= V)) a.status[r] = kStatusUnmappedDraft;
  });
}

}  // namespace

void token_logprobs(const TokenLogprobsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::token_logprobs_scratch_bytes(const TokenLogprobsArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(FD_ISA::num_rows(a), a.vocab_size, ex) * FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype);
}
#endif
FD_CPU_OP(token_logprobs, TokenLogprobsArgs)
