// What a .cu file finds in CUDA, for the host compiler. Kernels include core/cuda/device.cuh, which chooses.
#pragma once

#include "simt/executor.h"
#include "simt/intrinsics.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::fastdecode::simt::current->index)
#define blockIdx (::fastdecode::simt::current->block->index)
#define blockDim (::fastdecode::simt::grid.block_size)
#define gridDim (::fastdecode::simt::grid.size)
inline constexpr int warpSize = 32;

#define FD_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::fastdecode::simt::launch(#kernel, grid, block, smem, stream, kernel __VA_OPT__(, ) __VA_ARGS__)
#define FD_ALLOW_SHARED(kernel, smem) ::fastdecode::simt::allow_shared(reinterpret_cast<const void*>(kernel), smem)
#define FD_SHARED(Type, name)                                  \
  static ::fastdecode::simt::SharedSlot fd_shared_slot_##name; \
  Type& name = ::fastdecode::simt::shared<Type>(fd_shared_slot_##name)
#define FD_DYNAMIC_SHARED(Type, name) \
  Type* const name = static_cast<Type*>(::fastdecode::simt::dynamic_shared_memory(alignof(Type)))

// ---- block barriers ----

inline void __syncthreads(FD_SIMT_WHERE) {
  fastdecode::simt::block_barrier(fastdecode::simt::Call::kSyncThreads, 0, {file, line});
}
inline int __syncthreads_count(int predicate, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<int>(block_barrier(Call::kSyncThreadsCount, predicate != 0, {file, line}));
}
inline int __syncthreads_and(int predicate, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<int>(block_barrier(Call::kSyncThreadsAnd, predicate != 0, {file, line}));
}
inline int __syncthreads_or(int predicate, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<int>(block_barrier(Call::kSyncThreadsOr, predicate != 0, {file, line}));
}

// ---- warp collectives ----

namespace fastdecode::simt {

// Operands travel as 64 bits; a narrow integer is promoted first, as CUDA's overloads do.
template <class T>
using Promoted = decltype(+T{});

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
Promoted<T> shuffle(Call call, unsigned mask, T value, Source source, const char* file, int line) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles int, unsigned, 64-bit integers, float and double");
  return from_bits<Promoted<T>>(collective(call, mask, to_bits(+value), source, file, line));
}

}  // namespace fastdecode::simt

inline void __syncwarp(unsigned mask = 0xffffffffu, FD_SIMT_WHERE) {
  fastdecode::simt::collective(fastdecode::simt::Call::kSyncWarp, mask, 0, {}, file, line);
}
template <class T>
auto __shfl_sync(unsigned mask, T value, int source_lane, int width = 32, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return shuffle(Call::kShuffle, mask, value, {source_lane, width}, file, line);
}
template <class T>
auto __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = 32, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return shuffle(Call::kShuffleUp, mask, value, {static_cast<int>(offset), width}, file, line);
}
template <class T>
auto __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return shuffle(Call::kShuffleDown, mask, value, {static_cast<int>(offset), width}, file, line);
}
template <class T>
auto __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return shuffle(Call::kShuffleXor, mask, value, {lane_mask, width}, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<unsigned>(collective(Call::kBallot, mask, predicate != 0, {}, file, line));
}
inline int __any_sync(unsigned mask, int predicate, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<int>(collective(Call::kAny, mask, predicate != 0, {}, file, line));
}
inline int __all_sync(unsigned mask, int predicate, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<int>(collective(Call::kAll, mask, predicate != 0, {}, file, line));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  return static_cast<unsigned>(collective(Call::kMatchAny, mask, to_bits(+value), {}, file, line));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* same, FD_SIMT_WHERE) {
  using namespace fastdecode::simt;
  const auto result = static_cast<unsigned>(collective(Call::kMatchAll, mask, to_bits(+value), {}, file, line));
  *same = result != 0;
  return result;
}

// Of lanes that may run on their own, only the caller is known to be here: code that needs more is wrong.
inline unsigned __activemask() { return 1u << fastdecode::simt::current->lane; }

#define FD_SIMT_REDUCE(name, T, kind)                                                                  \
  inline T name(unsigned mask, T value, FD_SIMT_WHERE) {                                               \
    using namespace fastdecode::simt;                                                                  \
    return static_cast<T>(collective(Call::kind, mask, static_cast<uint32_t>(value), {}, file, line)); \
  }
FD_SIMT_REDUCE(__reduce_add_sync, int, kReduceAdd)
FD_SIMT_REDUCE(__reduce_add_sync, unsigned, kReduceAdd)
FD_SIMT_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
FD_SIMT_REDUCE(__reduce_min_sync, unsigned, kReduceMin)
FD_SIMT_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
FD_SIMT_REDUCE(__reduce_max_sync, unsigned, kReduceMax)
FD_SIMT_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
FD_SIMT_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
FD_SIMT_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
#undef FD_SIMT_REDUCE
