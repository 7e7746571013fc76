#include "core/cuda/device.cuh"
#include "verify/commit_request.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kThreads = 64;

// One thread per request: a round is a handful of tokens.
__global__ void __launch_bounds__(kThreads) commit_kernel(CommitArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b < a.batch) commit_request(a, b);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::commit(const CommitArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  const unsigned blocks = FD_ISA::grid_of((a.batch + FD_ISA::kThreads - 1) / FD_ISA::kThreads);
  FD_LAUNCH(FD_ISA::commit_kernel, blocks, FD_ISA::kThreads, 0, ex.stream, a);
}
