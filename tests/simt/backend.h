// LAUNCH and Buffer for test programs that run on the host executor and, compiled by nvcc, on a GPU.
#pragma once

#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "core/cuda/device.cuh"

#if defined(__CUDACC__)
template <class T>
struct Managed {
  using value_type = T;
  T* allocate(size_t n) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, n * sizeof(T)) != cudaSuccess) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t) { cudaFree(p); }
  bool operator==(const Managed&) const { return true; }
  bool operator!=(const Managed&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, Managed<T>>;
#define LAUNCH(...)                                                                                \
  do {                                                                                             \
    FD_LAUNCH(__VA_ARGS__);                                                                        \
    CHECK_EQUAL(cudaGetErrorString(cudaDeviceSynchronize()), std::string("no error"), "a launch"); \
  } while (false)
inline void set_seed(uint64_t) {}
inline void set_live_blocks(int) {}
#else
namespace simt = fastdecode::simt;
inline void set_seed(uint64_t seed) { simt::config().seed = seed; }
inline void set_live_blocks(int blocks) { simt::config().live_blocks = blocks; }
template <class T>
using Buffer = std::vector<T>;
#define LAUNCH(...) FD_LAUNCH(__VA_ARGS__)
#endif
