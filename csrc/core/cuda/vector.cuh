// Elements read and written 16 bytes at a time where their address allows it.
#pragma once

#include "core/cuda/device.cuh"
#include "core/dtype.h"

namespace fastdecode::FD_ISA {

// Elements of a 16-byte load.
template <class T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// kBytes in registers, moved by one instruction.
template <int kBytes>
struct alignas(kBytes) Chunk {
  uint32_t word[kBytes / 4];
};

template <int kBytes>
__device__ inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

template <int kBytes>
__device__ inline Chunk<kBytes> load_chunk(const void* p) {
#if !defined(__CUDACC__)
  simt::check_aligned(p, kBytes);
#endif
  return *static_cast<const Chunk<kBytes>*>(p);
}

template <int kBytes>
__device__ inline void store_chunk(void* p, const Chunk<kBytes>& chunk) {
#if !defined(__CUDACC__)
  simt::check_aligned(p, kBytes);
#endif
  *static_cast<Chunk<kBytes>*>(p) = chunk;
}

// The same of 16 bytes that come as a kernel's argument, which would be copied word by word.
__device__ inline void store_vector(void* p, uint4 vector) {
#if !defined(__CUDACC__)
  simt::check_aligned(p, 16);
#endif
  *static_cast<uint4*>(p) = vector;
}

// Bytes of one access to kCount elements of type E.
template <class E, int kCount>
inline constexpr int kAccess = kCount * static_cast<int>(sizeof(E)) < 16 ? kCount * static_cast<int>(sizeof(E)) : 16;

// out[j] = x[j], by loads of kAccess bytes, to which x must be aligned.
template <int kCount, class E, class C = Compute<E>>
__device__ inline void read_aligned(const E* x, C (&out)[kCount]) {
  constexpr int kBytes = kAccess<E, kCount>, kChunks = kCount * static_cast<int>(sizeof(E)) / kBytes;
  constexpr int kEach = kCount / kChunks;
  static_assert(kCount * sizeof(E) % kBytes == 0 && kBytes >= 4);
  struct Elements {
    E e[kEach];
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const auto elements = bit_cast<Elements>(load_chunk<kBytes>(x + c * kEach));
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[c * kEach + j] = load(elements.e[j]);
  }
}

// out[j] = x[v + j], or `fill` where v + j >= n.
template <int kCount, class E, class C = Compute<E>>
__device__ inline void read(const E* x, int v, int n, C fill, C (&out)[kCount]) {
  if (v + kCount <= n && is_aligned<kAccess<E, kCount>>(x + v)) return read_aligned(x + v, out);
#pragma unroll
  for (int j = 0; j < kCount; ++j) out[j] = v + j < n ? static_cast<C>(load(x[v + j])) : fill;
}

// x[v + j] = values[j] where v + j < n.
template <int kCount, class C>
__device__ inline void write(C* x, int v, int n, const C (&values)[kCount]) {
  constexpr int kBytes = kAccess<C, kCount>;
  if (v + kCount <= n && is_aligned<kBytes>(x + v)) {
    constexpr int kChunks = kCount * static_cast<int>(sizeof(C)) / kBytes, kEach = kCount / kChunks;
    struct Elements {
      C e[kEach];
    };
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      Elements elements;
#pragma unroll
      for (int j = 0; j < kEach; ++j) elements.e[j] = values[c * kEach + j];
      store_chunk<kBytes>(x + v + c * kEach, bit_cast<Chunk<kBytes>>(elements));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (v + j < n) x[v + j] = values[j];
}

}  // namespace fastdecode::FD_ISA
