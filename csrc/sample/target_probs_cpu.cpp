#include "sample/target_probs.h"

#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

template <class T, class C = Compute<T>>
void run(const TargetProbsArgs& a, const Exec& ex) {
  const int64_t V = a.vocab_size;
  const int64_t bytes = row_scratch_bytes(V, sizeof(C) == 8);
  for_each_row(ex, a.batch * a.rows, V, a.scratch, bytes, [&](int64_t r, void* buffer) {
    const int64_t b = r / a.rows, row = r % a.rows;
    C* probs = static_cast<C*>(a.probs) + r * V;
    std::fill(probs, probs + V, C(0));
    a.status[r] = 0;
    if (a.active && !a.active[b]) return;
    const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    const RowScratch<C> s = row_scratch<C>(buffer, V);
    const RowLaw<C> law = row_law(logits, V, row_filter(a.filters, b, row), s);
    a.status[r] = law.status;
    if (law.status) return;
    for (int64_t v = 0; v < V; ++v) probs[v] = s.weight[v] * law.inverse_sum;
  });
}

}  // namespace

void target_probs(const TargetProbsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::target_probs_scratch_bytes(const TargetProbsArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(a.batch * a.rows, a.vocab_size, ex) *
         FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype == DType::kFloat64);
}
#endif
FD_CPU_OP(target_probs, TargetProbsArgs)
