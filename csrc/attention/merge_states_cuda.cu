#include "attention/merge_states.h"

#include "attention/merge.cuh"
#include "core/cuda/mma.cuh"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kBlockWarps = 4;
constexpr int kSpan = kWarp * kChannels;

// A warp to a row's next kSpan channels. Rows without channels have an lse as well.
int64_t spans_of(const MergeStatesArgs& a) { return a.head_dim == 0 ? 1 : (a.head_dim + kSpan - 1) / kSpan; }

template <class T>
__global__ void __launch_bounds__(kBlockWarps* kWarp) merge_states_kernel(MergeStatesArgs a, int64_t spans) {
  using C = Compute<T>;
  for (int64_t i = int64_t{blockIdx.x} * kBlockWarps + warp_id(); i < a.num_rows * a.num_heads * spans;
       i += int64_t{gridDim.x} * kBlockWarps) {
    const int64_t row = i / spans, first = i % spans * kSpan, at = row * a.head_dim + first;
    const int count = static_cast<int>(a.head_dim - first < kSpan ? a.head_dim - first : kSpan);
    C result[kChannels];
    const C lse = merge_row<C>(
        static_cast<int>(a.num_states), count, [&](int s) { return static_cast<const C*>(a.lses[s])[row]; },
        [&](int s, int c) { return load(static_cast<const T*>(a.outs[s])[at + c]); }, result);
    if (first == 0 && lane_id() == 0) static_cast<C*>(a.lse)[row] = lse;
#pragma unroll
    for (int j = 0; j < kChannels; ++j)
      if (const int c = lane_id() + kWarp * j; c < count) static_cast<T*>(a.out)[at + c] = round_to<T>(result[j]);
  }
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::merge_states(const MergeStatesArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  const int64_t spans = spans_of(a), blocks = (a.num_rows * a.num_heads * spans + kBlockWarps - 1) / kBlockWarps;
  if (blocks == 0) return;
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    FD_LAUNCH((merge_states_kernel<T>), capped_grid(blocks), kBlockWarps * kWarp, 0, ex.stream, a, spans);
  });
}
