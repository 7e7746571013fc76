#include "core/cuda/nearest.cuh"
#include "core/cuda/rows.cuh"
#include "sample/topk_logits.h"

namespace fastdecode::FD_ISA {
namespace {

// A block per row.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) topk_kernel(TopkLogitsArgs a, LogitRows rows, int parts) {
  FD_SHARED(LawShared<C>, s);
  const int64_t r = blockIdx.x;
  const auto V = static_cast<int>(a.vocab_size);
  const RowView<T> view = rows.view<T>(r);
  C* const values = static_cast<C*>(a.values) + r * a.k;
  int64_t* const ids = a.ids + r * a.k;
  int32_t status = 0;
  int count = 0;
  if (view.live) {
    scan_if_alone(view, V, parts);
    auto* const spill = rows.behind<Entry<C>>() + r * a.k;
    status = with_law(view.logits, V, RowFilter{}, view.memory, s, [&](auto& law) {
      law.keep_top(a.k);
      const Entry<C>* entry = nearest_first(law, spill, count);
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        ids[i] = entry[i].id;
        values[i] = law.logit(static_cast<int>(entry[i].id));
      }
    });
  }
  for (int64_t i = count + static_cast<int64_t>(threadIdx.x); i < a.k; i += kThreads) {
    ids[i] = -1;
    values[i] = -kInf<C>;
  }
  if (threadIdx.x == 0) a.status[r] = status;
}

LogitRows rows_of(const TopkLogitsArgs& a) {
  return logit_rows(a, FilterArgs{}, nullptr, a.batch * a.rows, a.rows, a.row_stride);
}

template <class T>
void run(const TopkLogitsArgs& a, const Exec& ex) {
  const LogitRows rows = rows_of(a);
  const int parts = num_row_parts(rows.num_rows, a.vocab_size, ex);
  launch_scan<T>(rows, parts, ex);
  FD_LAUNCH((topk_kernel<T>), grid_of(rows.num_rows), kThreads, 0, ex.stream, a, rows, parts);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::topk_logits_scratch_bytes(const TopkLogitsArgs& a, const Exec&) {
  const FD_ISA::LogitRows rows = FD_ISA::rows_of(a);
  return rows.bytes() + FD_ISA::entry_bytes(rows.num_rows, a.k, a.dtype);
}

void fastdecode::cuda::topk_logits(const TopkLogitsArgs& a, const Exec& ex) {
  if (a.batch * a.rows == 0) return;
  FD_ISA::dispatch_logits(a.dtype, [&](auto tag) { FD_ISA::run<typename decltype(tag)::type>(a, ex); });
}
