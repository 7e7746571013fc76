#include "attention/merge_states.h"

#include "core/fmath.h"
#include "core/kv_codec.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

template <class T, class C = Compute<T>>
FD_ROW void merge(const MergeStatesArgs& a, int64_t row) {
  C max = -kInf<C>, sum = 0, weight[kMaxStates];
  for (int64_t i = 0; i < a.num_states; ++i) {
    const C lse = static_cast<const C*>(a.lses[i])[row];
    max = lse > max || !(lse == lse) ? lse : max;
  }
  for (int64_t i = 0; i < a.num_states; ++i) {
    weight[i] = exp_minus(max - static_cast<const C*>(a.lses[i])[row]);  // 0 for -inf - -inf
    sum += weight[i];
  }
  const bool broken = !(max == max) || max == kInf<C>;
  if (broken) sum = kInf<C> - kInf<C>;
  static_cast<C*>(a.lse)[row] = broken ? sum : max + log_(sum);
  const C inverse = sum == 0 ? C(0) : 1 / sum;
  T* out = static_cast<T*>(a.out) + row * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; ++d) {
    C total = 0;
    for (int64_t i = 0; i < a.num_states; ++i) {
      // An empty state adds nothing, whatever stands in it.
      const C value = load(static_cast<const T*>(a.outs[i])[row * a.head_dim + d]);
      total += weight[i] == 0 ? C(0) : weight[i] * value;
    }
    out[d] = store<T, false>(total * inverse);
  }
}

}  // namespace

void merge_states(const MergeStatesArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_row(ex, a.num_rows * a.num_heads, a.num_states * a.head_dim, nullptr, 0,
                 [&](int64_t row, void*) { merge<T>(a, row); });
  });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(merge_states, MergeStatesArgs)
