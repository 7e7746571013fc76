// The words that kernels are written in: CUDA's own under nvcc; under the host's compiler csrc/simt gives them the same
// meaning and runs them. Launches and shared memory are macros, so that both can.
//   FD_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, arguments...)
//   FD_ALLOW_SHARED((kernel<T>), shared_bytes): before a launch with more than 48 KiB of dynamic shared memory
//   FD_SHARED(Type, name): a trivially constructible struct, one per block and place in the program
//   FD_DYNAMIC_SHARED(Type, name): Type* to the launch's shared_bytes, aligned to 16
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/cpu_level.h"
#include "core/exec.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define FD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FD_ALLOW_SHARED(kernel, shared_bytes) \
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))
#define FD_SHARED(Type, name) __shared__ Type name
#define FD_DYNAMIC_SHARED(Type, name)                                \
  extern __shared__ __align__(16) unsigned char fd_dynamic_shared[]; \
  Type* const name = reinterpret_cast<Type*>(fd_dynamic_shared)

#else

#include "simt/cuda.h"

#endif

namespace fastdecode::FD_ISA {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks of a grid stand along x, whose limit this is. grid_of is for a block to each item, capped_grid for blocks that
// go on to another.
inline constexpr int64_t kMaxBlocks = 0x7fffffff;
inline unsigned capped_grid(int64_t blocks) { return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks); }
inline unsigned grid_of(int64_t blocks) {
  if (blocks > kMaxBlocks) throw std::invalid_argument("more than 2^31 - 1 blocks of one launch: split the batch");
  return static_cast<unsigned>(blocks);
}

// Bytes of shared memory that a block may have, static and dynamic, on the current device.
inline int64_t shared_limit() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
#else
  return simt::kMaxShared;
#endif
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

}  // namespace fastdecode::FD_ISA
