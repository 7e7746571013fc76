// tree_error by a whole block.
#pragma once

#include "core/cuda/reduce.cuh"
#include "tree/tree_error.h"

namespace fastdecode::FD_ISA {

// Every thread of the block must call it, and gets the result: the error of the first slot that has one.
__device__ inline TreeError block_tree_error(BlockSlots& slots, const int32_t* parents, int64_t count,
                                             int64_t num_slots) {
  if (count < 0 || count > num_slots) return kTreeBadCount;
  constexpr int kNone = 0x7fffffff;
  int first = kNone;  // slot * 4 + error, so that the smallest is the first slot's
  for (auto slot = static_cast<int>(threadIdx.x); slot < count && first == kNone; slot += kThreads) {
    const TreeError error = slot_error(slot, parents[slot]);
    if (error != kTreeValid) first = slot * 4 + error;
  }
  first = block_reduce(slots, first, Smaller{});
  return first == kNone ? kTreeValid : static_cast<TreeError>(first % 4);
}

}  // namespace fastdecode::FD_ISA
