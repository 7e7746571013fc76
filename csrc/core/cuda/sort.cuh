// Sorting the few ids that a selection left.
#pragma once

#include "core/cuda/reduce.cuh"
#include "core/law.h"

namespace fastdecode::FD_ISA {

template <class C>
struct Entry {
  Key<C> key;
  uint32_t id;

  __device__ bool before(const Entry& other) const { return key < other.key || (key == other.key && id < other.id); }
};

// More than these are sorted in global memory.
inline constexpr int kSharedEntries = 512;

// Sorts n entries by key, then id, by a block of kThreads: a bitonic network whose comparisons all point one way, so
// that entries beyond n, which would come last, need not exist.
template <class C>
__device__ inline void sort_entries(Entry<C>* entry, int n) {
  int padded = 1;
  while (padded < n) padded *= 2;
  auto order = [&](int low, int high) {
    if (high >= n || !entry[high].before(entry[low])) return;
    const Entry<C> swapped = entry[low];
    entry[low] = entry[high];
    entry[high] = swapped;
  };
  for (int size = 2; size <= padded; size *= 2) {
    // two sorted halves: the first against the second from behind, which leaves two bitonic halves
    for (int pair = static_cast<int>(threadIdx.x); pair < padded / 2; pair += kThreads) {
      const int base = pair / (size / 2) * size, i = pair % (size / 2);
      order(base + i, base + size - 1 - i);
    }
    __syncthreads();  // every step moves entries between threads
    for (int stride = size / 4; stride > 0; stride /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < padded / 2; pair += kThreads) {
        const int low = pair / stride * 2 * stride + pair % stride;
        order(low, low + stride);
      }
      __syncthreads();  // every step moves entries between threads
    }
  }
}

}  // namespace fastdecode::FD_ISA
