#include "core/cuda/nearest.cuh"
#include "core/cuda/rows.cuh"
#include "sample/token_logprobs.h"

namespace fastdecode::FD_ISA {
namespace {

// A block per row. `weighed`: the tiles' sums are there.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>)
    token_logprobs_kernel(TokenLogprobsArgs a, LogitRows rows, int parts, bool weighed) {
  FD_SHARED(LawShared<C>, s);
  const int64_t r = blockIdx.x;
  const auto V = static_cast<int>(a.vocab_size);
  const RowView<T> view = rows.view<T>(r);
  int64_t* const ids = a.top_ids + r * a.top;
  C* const top_logprobs = static_cast<C*>(a.top_logprobs) + r * a.top;
  C logprob = 0;
  int32_t status = 0;
  int count = 0;
  if (view.live) {
    const int64_t token = a.row_start ? a.tokens[r] : a.tokens[view.b * a.token_stride + view.row];
    const bool inside = token >= 0 && token < V;
    if (token != -1 || a.top > 0) {
      scan_if_alone(view, V, parts);
      auto* const spill = rows.behind<Entry<C>>() + r * a.top;
      status = with_law(view.logits, V, view.filter, view.memory, s, [&](auto& law) {
        law.normalise(weighed);
        const double log_sum = log_(law.sum());
        auto logprob_of = [&](C distance) { return static_cast<C>(-(static_cast<double>(distance) + log_sum)); };
        if (token != -1) logprob = inside ? logprob_of(law.kept_distance(static_cast<int>(token))) : -kInf<C>;
        if (a.top == 0) return;
        law.keep_top(a.top);
        const Entry<C>* entry = nearest_first(law, spill, count);
        for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
          const auto id = static_cast<int>(entry[i].id);
          ids[i] = id;
          top_logprobs[i] = logprob_of(law.distance_of(law.logit(id)));
        }
      });
      if (status == 0 && token != -1 && !inside) status = kStatusUnmappedDraft;
    }
  }
  for (int64_t i = count + static_cast<int64_t>(threadIdx.x); i < a.top; i += kThreads) {
    ids[i] = -1;
    top_logprobs[i] = -kInf<C>;
  }
  if (threadIdx.x != 0) return;
  static_cast<C*>(a.logprobs)[r] = logprob;
  a.status[r] = status;
}

int64_t num_rows(const TokenLogprobsArgs& a) { return a.row_start ? a.rows : a.batch * a.rows; }

LogitRows rows_of(const TokenLogprobsArgs& a) {
  return logit_rows(a, a.filters, a.row_start, num_rows(a), a.rows, a.row_stride);
}

template <class T>
void run(const TokenLogprobsArgs& a, const Exec& ex) {
  const LogitRows rows = rows_of(a);
  const int parts = num_row_parts(rows.num_rows, a.vocab_size, ex);
  const bool weighed = parts > 1 && !may_cut(a.filters);
  launch_scan<T>(rows, parts, ex);
  if (weighed) launch_weigh<T>(rows, parts, ex);
  FD_LAUNCH((token_logprobs_kernel<T>), grid_of(rows.num_rows), kThreads, 0, ex.stream, a, rows, parts, weighed);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::token_logprobs_scratch_bytes(const TokenLogprobsArgs& a, const Exec&) {
  const FD_ISA::LogitRows rows = FD_ISA::rows_of(a);
  return rows.bytes() + FD_ISA::entry_bytes(rows.num_rows, a.top, a.dtype);
}

void fastdecode::cuda::token_logprobs(const TokenLogprobsArgs& a, const Exec& ex) {
  if (FD_ISA::num_rows(a) == 0) return;
  FD_ISA::dispatch_logits(a.dtype, [&](auto tag) { FD_ISA::run<typename decltype(tag)::type>(a, ex); });
}
