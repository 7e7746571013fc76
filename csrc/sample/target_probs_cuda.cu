#include "core/cuda/rows.cuh"
#include "sample/target_probs.h"

namespace fastdecode::FD_ISA {
namespace {

// A block per part of a row. Rows are cut where their tiles' sums are there (`weighed`), else part 0 is all.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>)
    target_probs_kernel(TargetProbsArgs a, LogitRows rows, int scan_parts, int parts, bool weighed) {
  constexpr int kPer = kPerVector<C>;
  FD_SHARED(LawShared<C>, s);
  const int64_t r = blockIdx.x / parts;
  const auto V = static_cast<int>(a.vocab_size), part = static_cast<int>(blockIdx.x % parts);
  const RowView<T> view = rows.view<T>(r);
  const Span span = part_of(V, part, parts);
  C* const probs = static_cast<C*>(a.probs) + r * a.vocab_size;
  int32_t status = 0;
  bool written = false;
  if (view.live) {
    scan_if_alone(view, V, scan_parts);
    status = with_law(view.logits, V, view.filter, view.memory, s, [&](auto& law) {
      law.normalise(weighed);
      for (int v = span.begin + static_cast<int>(threadIdx.x) * kPer; v < span.end; v += kThreads * kPer) {
        C weight[kPer];
        law.weights(v, weight);
#pragma unroll
        for (int j = 0; j < kPer; ++j) weight[j] *= law.inverse_sum();
        write(probs, v, span.end, weight);
      }
      written = true;
    });
  }
  constexpr C kZeros[kPer] = {};
  for (int v = span.begin + static_cast<int>(threadIdx.x) * kPer; !written && v < span.end; v += kThreads * kPer)
    write(probs, v, span.end, kZeros);
  if (threadIdx.x == 0 && part == 0) a.status[r] = status;
}

int64_t num_rows(const TargetProbsArgs& a) { return a.row_start ? a.rows : a.batch * a.rows; }

LogitRows rows_of(const TargetProbsArgs& a) {
  return logit_rows(a, a.filters, a.row_start, num_rows(a), a.rows, a.row_stride);
}

template <class T>
void run(const TargetProbsArgs& a, const Exec& ex) {
  const LogitRows rows = rows_of(a);
  const int scan_parts = num_row_parts(rows.num_rows, a.vocab_size, ex);
  const bool weighed = scan_parts > 1 && !may_cut(a.filters);
  const int parts = weighed ? scan_parts : 1;
  launch_scan<T>(rows, scan_parts, ex);
  if (weighed) launch_weigh<T>(rows, parts, ex);
  FD_LAUNCH((target_probs_kernel<T>), grid_of(rows.num_rows * parts), kThreads, 0, ex.stream, a, rows, scan_parts,
            parts, weighed);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::target_probs_scratch_bytes(const TargetProbsArgs& a, const Exec&) {
  const FD_ISA::LogitRows rows = FD_ISA::rows_of(a);
  return rows.bytes();
}

void fastdecode::cuda::target_probs(const TargetProbsArgs& a, const Exec& ex) {
  if (FD_ISA::num_rows(a) == 0) return;
  FD_ISA::dispatch_logits(a.dtype, [&](auto tag) { FD_ISA::run<typename decltype(tag)::type>(a, ex); });
}
