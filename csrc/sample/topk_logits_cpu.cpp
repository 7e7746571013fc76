#include "sample/topk_logits.h"

#include "core/cpu/law.h"
#include "core/cpu/nearest.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

template <class T, class C = Compute<T>>
void run(const TopkLogitsArgs& a, const Exec& ex) {
  const int64_t V = a.vocab_size;
  for_each_row(ex, a.batch * a.rows, V, a.scratch, row_scratch_bytes<C>(V), [&](int64_t r, void* buffer) {
    const int64_t b = r / a.rows, row = r % a.rows;
    C* values = static_cast<C*>(a.values) + r * a.k;
    int64_t* ids = a.ids + r * a.k;
    std::fill(values, values + a.k, -kInf<C>);
    std::fill(ids, ids + a.k, int64_t{-1});
    a.status[r] = 0;
    if (a.active && !a.active[b]) return;
    const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    const RowScratch<C> s = row_scratch<C>(buffer, V);
    a.status[r] = with_law(logits, V, RowFilter{}, s, [&](auto& law) {
      law.keep_top(a.k);
      const uint32_t* order = nearest_first(law);
      for (int64_t i = 0; i < law.count(); ++i) {
        ids[i] = s.ids[order[i]];
        values[i] = law.logit(ids[i]);
      }
    });
  });
}

}  // namespace

void topk_logits(const TopkLogitsArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::topk_logits_scratch_bytes(const TopkLogitsArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(a.batch * a.rows, a.vocab_size, ex) * FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype);
}
#endif
FD_CPU_OP(topk_logits, TopkLogitsArgs)
