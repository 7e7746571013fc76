#include "attention/merge_states.h"

#include "core/cpu/tiles.h"
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
  for_lanes(0, a.head_dim, [&](auto wide, int64_t d) {
    std::conditional_t<wide, Lanes<C>, C> total = {};
    for (int64_t i = 0; i < a.num_states; ++i)
      if (weight[i] != 0)  // an empty state adds nothing, whatever stands in it
        total = total + take(wide, static_cast<const T*>(a.outs[i]) + row * a.head_dim + d) * weight[i];
    total = total * inverse;
    if constexpr (std::is_same_v<T, C>) {
      put<C>(wide, out + d, total);
    } else if constexpr (wide) {
      for (int64_t l = 0; l < kWide; ++l) out[d + l] = store<T, false>(total[l]);
    } else {
      out[d] = store<T, false>(total);
    }
  });
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
