#include "sample/target_probs.h"

#include "core/cpu/law.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

int64_t num_rows(const TargetProbsArgs& a) { return a.row_start ? a.rows : a.batch * a.rows; }

template <class T, class C = Compute<T>>
void run(const TargetProbsArgs& a, const Exec& ex) {
  const int64_t V = a.vocab_size;
  for_each_row(ex, num_rows(a), V, a.scratch, row_scratch_bytes<C>(V), [&](int64_t r, void* buffer) {
    const auto [b, row] = owner_of(r, a.rows, a.row_start, a.batch);
    C* probs = static_cast<C*>(a.probs) + r * V;
    a.status[r] = 0;
    if (b < 0 || (a.active && !a.active[b])) {
      std::fill(probs, probs + V, C(0));
      return;
    }
    const T* logits =
        static_cast<const T*>(a.logits) + (a.row_start ? r * a.row_stride : b * a.batch_stride + row * a.row_stride);
    const RowScratch<C> s = row_scratch<C>(buffer, V);
    a.status[r] = with_law(logits, V, row_filter(a.filters, b, row, r), s, [&](auto& law) {
      law.normalise(law.dense() ? probs : nullptr);
      const C scale = law.inverse_sum();
      if (law.dense()) {
        for (int64_t v = 0; v < V; ++v) probs[v] *= scale;
        return;
      }
      std::fill(probs, probs + V, C(0));
      const Weights<C> kept = law.weights();
      for (int64_t j = 0; j < kept.count; ++j) probs[kept.ids[j]] = kept.weight[j] * scale;
    });
    if (a.status[r]) std::fill(probs, probs + V, C(0));
  });
}

}  // namespace

void target_probs(const TargetProbsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::target_probs_scratch_bytes(const TargetProbsArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(FD_ISA::num_rows(a), a.vocab_size, ex) * FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype);
}
#endif
FD_CPU_OP(target_probs, TargetProbsArgs)
