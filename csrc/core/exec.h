// Where a kernel runs: the caller's stream (CUDA) or thread pool (CPU). Kernels own no threads, no allocator, no
// global.
//   Exec exec{.cpu_level = best_cpu_level()};                                         // in the calling thread
//   Exec exec{.parallel_for = run, .num_threads = 4, .cpu_level = best_cpu_level()};  // on threads of your own
// where `run` has each i in [0, count) done by a pool and returns when all are; without a pool:
//   void run(int64_t count, void (*body)(void*, int64_t), void* context) {
//     std::vector<std::jthread> threads;
//     for (int64_t i = 1; i < count; ++i) threads.emplace_back(body, context, i);
//     body(context, 0);
//   }
#pragma once

#include <cstdint>

namespace fastdecode {

// Runs body(context, i) for i in [0, count), in any order, possibly at once. body does not throw.
using ParallelFor = void(int64_t count, void (*body)(void* context, int64_t i), void* context);

struct Exec {
  void* stream = nullptr;               // CUDA: a cudaStream_t
  ParallelFor* parallel_for = nullptr;  // CPU; not called while num_threads is 1
  int32_t num_threads = 1;              // CPU: threads behind parallel_for; outcomes never depend on it
  int32_t num_sms = 1;                  // CUDA: multiprocessors of the device; outcomes never depend on it
  int32_t cpu_level = 1;                // CPU: instruction-set build to run, 1, 3 or 4; outcomes never depend on it
};

// The last of 1, 3 and 4 that this machine can execute: x86-64, x86-64-v3 (AVX2, FMA), x86-64-v4 (AVX-512) with VNNI
// and BF16. A higher one than this in Exec ends the program with an illegal instruction. 1 on other processors.
int32_t best_cpu_level();

}  // namespace fastdecode
