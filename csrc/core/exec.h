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

}  // namespace fastdecode
