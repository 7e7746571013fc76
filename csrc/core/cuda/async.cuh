// Asynchronous copies from global into shared memory (cp.async). On the host a copy happens at the wait for its group;
// until then its destination holds poison, which ASan reports when it is read.
#pragma once

#include <cstdint>

#include "core/cuda/device.cuh"

namespace fastdecode::FD_ISA {

// Starts a copy of 4, 8 or 16 bytes, both ends aligned to them. 16 goes past the first-level cache.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if defined(__CUDACC__)
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(global))
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(__cvta_generic_to_global(global)),
                 "n"(Bytes)
                 : "memory");
  }
#else
  simt::async_copy(shared, global, Bytes, {__builtin_FILE(), __builtin_LINE()});
#endif
}

// Makes a group of the copies that this thread has started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::async_commit();
#endif
}

// Returns when all groups of this thread but the newest N are done. Other threads see them after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::async_wait(N);
#endif
}

}  // namespace fastdecode::FD_ISA
