// Reductions and scans over a warp and over a block of kThreads. Every thread of the warp or block must call them, and
// gets the result. Sums are of integers: their order is left open.
#pragma once

#include "core/cuda/device.cuh"
#include "core/fmath.h"

namespace fastdecode::FD_ISA {

// Threads of every block that works on a row.
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;
// Blocks of a kernel that computes in C that a multiprocessor must be able to hold: with no number, or with two blocks
// of doubles, ptxas spills registers.
template <class C>
inline constexpr int kBlocksPerSm = sizeof(C) == 8 ? 1 : 2;

// op(a, b) must not depend on the order of its arguments.
template <class N, class Op>
__device__ inline N warp_reduce(N value, const Op& op) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

struct Plus {
  template <class N>
  __device__ N operator()(N a, N b) const {
    return a + b;
  }
};
struct Larger {
  template <class N>
  __device__ N operator()(N a, N b) const {
    return b > a ? b : a;
  }
};
struct Smaller {
  template <class N>
  __device__ N operator()(N a, N b) const {
    return b < a ? b : a;
  }
};

// Shared memory of the block-wide calls below, one 8-byte value per warp.
struct BlockSlots {
  uint64_t of_warp[kWarps];
};

template <class N, class Op>
__device__ inline N block_reduce(BlockSlots& slots, N value, const Op& op) {
  static_assert(sizeof(N) <= 8);
  value = warp_reduce(value, op);
  N* const of_warp = reinterpret_cast<N*>(slots.of_warp);
  if (lane_id() == 0) of_warp[warp_id()] = value;
  __syncthreads();  // all warps have written
  value = of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) value = op(value, of_warp[w]);
  __syncthreads();  // all have read, the slots are free
  return value;
}

struct Scanned {
  uint64_t before, total;  // sum of the values of threads with smaller numbers, of all threads
};

__device__ inline Scanned block_scan(BlockSlots& slots, uint64_t value) {
  uint64_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_id() >= step) sum += below;
  }
  if (lane_id() == kWarp - 1) slots.of_warp[warp_id()] = sum;
  __syncthreads();  // all warps have written
  Scanned out{sum - value, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_id()) out.before += slots.of_warp[w];
    out.total += slots.of_warp[w];
  }
  __syncthreads();  // all have read, the slots are free
  return out;
}

// The value of the one thread that has one, to all. At most one thread may give `mine`.
template <class N>
__device__ inline N block_broadcast(BlockSlots& slots, bool mine, N value) {
  static_assert(sizeof(N) <= 8);
  N* const slot = reinterpret_cast<N*>(slots.of_warp);
  if (mine) *slot = value;
  __syncthreads();  // written
  value = *slot;
  __syncthreads();  // read, the slot is free
  return value;
}

}  // namespace fastdecode::FD_ISA
