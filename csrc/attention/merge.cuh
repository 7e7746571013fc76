// Joins softmax states of one row (merge_states.h), a warp to a row.
#pragma once

#include "core/cuda/reduce.cuh"

namespace fastdecode::FD_ISA {

inline constexpr int kChannels = 8;  // of a thread

// e^-d for d >= 0; NaN stays NaN.
template <class C>
__device__ inline C weight_of(C distance) {
  return distance == distance ? exp_minus(distance) : distance;
}

// Channels lane_id() + 32 i of sum w out / sum w, w = exp(lse - max), states in order. Returns the lse of all. States
// of weight 0 are not read, so the result is the same without them.
template <class C, class Lse, class Out>
__device__ inline C merge_row(int num_states, int head_dim, const Lse& lse, const Out& out, C (&result)[kChannels]) {
  C max = -kInf<C>;
  for (int s = 0; s < num_states; ++s) {
    const C x = lse(s);
    if (!(x <= max)) max = x;
    if (x != x) break;  // NaN
  }
#pragma unroll
  for (C& value : result) value = 0;
  if (max == -kInf<C>) return max;
  C sum = 0;
#pragma unroll 1
  for (int s = 0; s < num_states; ++s) {
    const C w = weight_of(max - lse(s));
    if (w == 0) continue;
    sum += w;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (kWarp * i < head_dim) {  // the same for all: lanes past the end read the last channel
        const int c = lane_id() + kWarp * i;
        result[i] = fma_(w, out(s, c < head_dim ? c : head_dim - 1), result[i]);
      }
  }
#pragma unroll
  for (C& value : result) value /= sum;
  return sum == sum ? max + log_(sum) : sum;  // of NaN log_ makes -inf
}

}  // namespace fastdecode::FD_ISA
