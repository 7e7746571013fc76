// Joins attention over disjoint sets of keys: m = max lse, w = exp(lse - m), out = sum w out / sum w,
// lse = m + log sum w. Associative and commutative; (0, -inf) is the neutral element. An attention sink is a state of
// its own: out 0, lse the sink's logit.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

inline constexpr int64_t kMaxStates = 16;

struct MergeStatesArgs {
  const void* outs[kMaxStates];  // num_states of [num_rows, num_heads, head_dim] of `dtype`, contiguous
  const void* lses[kMaxStates];  // of [num_rows, num_heads], float, double for double outs, contiguous
  void* out;                     // [num_rows, num_heads, head_dim] of `dtype`, written
  void* lse;                     // [num_rows, num_heads], written
  int64_t num_states, num_rows, num_heads, head_dim;
  DType dtype;
};

namespace cpu {
void merge_states(const MergeStatesArgs&, const Exec&);
}
namespace cuda {
void merge_states(const MergeStatesArgs&, const Exec&);
}

}  // namespace fastdecode
