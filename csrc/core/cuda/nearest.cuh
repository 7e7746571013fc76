// The ids that a law keeps, most likely first.
#pragma once

#include "core/cuda/law.cuh"

namespace fastdecode::FD_ISA {

// At most kSharedEntries of a row stand in shared memory, more in this many bytes behind the rows' memory.
inline int64_t entry_bytes(int64_t rows, int64_t most, DType dtype) {
  if (most <= kSharedEntries) return 0;
  return rows * most * static_cast<int64_t>(dtype == DType::kFloat64 ? sizeof(Entry<double>) : sizeof(Entry<float>));
}

// Lists the ids kept, by logit, then id.
template <class E, class C = Compute<E>>
__device__ inline void list_nearest(const Law<E>& law, Entry<C>* entry, int count) {
  if (threadIdx.x == 0) law.s.found = 0;
  __syncthreads();  // the count starts at 0
  law.for_kept(
      [&](int v) { entry[atomicAdd(&law.s.found, 1)] = {falling_key(law.logit(v)), static_cast<uint32_t>(v)}; });
  __syncthreads();  // the entries are written, in any order
  sort_entries(entry, count);
}

// `count` entries; `spill` is used where they are more than kSharedEntries.
template <class E, class C = Compute<E>>
__device__ inline const Entry<C>* nearest_first(const Law<E>& law, Entry<C>* spill, int& count) {
  count = law.count();
  if (count <= kSharedEntries) {  // two calls, so that neither mixes shared with global addresses
    list_nearest(law, law.s.entry, count);
    return law.s.entry;
  }
  list_nearest(law, spill, count);
  return spill;
}

}  // namespace fastdecode::FD_ISA
