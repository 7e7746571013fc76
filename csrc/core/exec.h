// Where a kernel runs: the caller's stream (CUDA) or thread pool (CPU). Kernels own no threads, no allocator, no
// global.
#pragma once

#include <cstdint>

namespace fastdecode {

// Runs body(context, i) for i in [0, count), in any order, possibly at once.
using ParallelFor = void(int64_t count, void (*body)(void* context, int64_t i), void* context);

struct Exec {
  void* stream = nullptr;               // CUDA: a cudaStream_t
  ParallelFor* parallel_for = nullptr;  // CPU
  int32_t num_threads = 1;              // CPU: threads behind parallel_for; outcomes never depend on it
  int32_t cpu_level = 1;                // CPU: instruction-set build to run, 1, 3 or 4 (core/cpu_level.h)
};

// A pool of one, for C++ programs without a pool.
inline void serial_for(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

// for_each(ex, n, [&](int64_t i) { ... }); the body must not throw.
template <class Body>
void for_each(const Exec& ex, int64_t count, const Body& body) {
  auto call = [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
  ex.parallel_for(count, call, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastdecode
