#include "sample/token_logprobs.h"

#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

// The `top` nearest ids of the row, nearest first; returns how many there are.
template <class C>
int64_t nearest(const RowScratch<C>& s, int64_t vocab_size, int64_t top) {
  int64_t count = detail::gather_finite(s.distance, vocab_size, s.members);
  if (top < count) {
    const auto cut =
        detail::radix_select(s.distance, s.members, count, static_cast<uint64_t>(top), detail::CountMeasure<C>{});
    count = 0;
    uint64_t ties = 0;
    for (int64_t v = 0; v < vocab_size; ++v) {
      const auto key = detail::key_of(s.distance[v]);
      if (key < cut.threshold || (key == cut.threshold && ties++ < cut.ties))
        s.members[count++] = static_cast<uint32_t>(v);
    }
  }
  std::sort(s.members, s.members + count, [&](uint32_t u, uint32_t v) {
    return s.distance[u] < s.distance[v] || (s.distance[u] == s.distance[v] && u < v);
  });
  return count;
}

template <class T, class C = Compute<T>>
void run(const TokenLogprobsArgs& a, const Exec& ex) {
  const int64_t V = a.vocab_size;
  const int64_t bytes = row_scratch_bytes(V, sizeof(C) == 8);
  for_each_row(ex, a.batch * a.rows, V, a.scratch, bytes, [&](int64_t r, void* buffer) {
    const int64_t b = r / a.rows, row = r % a.rows;
    C* logprob = static_cast<C*>(a.logprobs) + r;
    int64_t* ids = a.top_ids + r * a.top;
    C* top_logprobs = static_cast<C*>(a.top_logprobs) + r * a.top;
    *logprob = 0;
    a.status[r] = 0;
    std::fill(ids, ids + a.top, int64_t{-1});
    std::fill(top_logprobs, top_logprobs + a.top, -kInf<C>);
    if (a.active && !a.active[b]) return;
    const int64_t token = a.tokens[b * a.token_stride + row];
    if (token == -1 && a.top == 0) return;
    const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    const RowScratch<C> s = row_scratch<C>(buffer, V);
    const RowLaw<C> law = row_law(logits, V, row_filter(a.filters, b, row), s);
    a.status[r] = law.status;
    if (law.status) return;
    const double log_sum = log_(law.sum);
    auto logprob_of = [&](int64_t v) { return static_cast<C>(-(static_cast<double>(s.distance[v]) + log_sum)); };
    if (token >= 0 && token < V) {
      *logprob = logprob_of(token);
    } else if (token != -1) {
      *logprob = -kInf<C>;
      a.status[r] |= kStatusUnmappedDraft;
    }
    if (a.top == 0) return;
    const int64_t count = nearest(s, V, a.top);
    for (int64_t i = 0; i < count; ++i) {
      ids[i] = s.members[i];
      top_logprobs[i] = logprob_of(ids[i]);
    }
  });
}

}  // namespace

void token_logprobs(const TokenLogprobsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::token_logprobs_scratch_bytes(const TokenLogprobsArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(a.batch * a.rows, a.vocab_size, ex) *
         FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype == DType::kFloat64);
}
#endif
FD_CPU_OP(token_logprobs, TokenLogprobsArgs)
