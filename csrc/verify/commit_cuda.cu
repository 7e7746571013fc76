#include <limits>

#include "core/cuda/device.cuh"
#include "verify/commit.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kThreads = 64;

// One thread per request: a round is a handful of tokens.
__global__ void __launch_bounds__(kThreads) commit_kernel(CommitArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b >= a.batch) return;
  a.num_committed[b] = a.reason[b] = 0;
  if (a.finished[b]) return;
  const int64_t* tokens = a.tokens + b * a.token_stride;
  const int64_t* stops = a.stop_ids ? a.stop_ids + b * a.stop_stride : nullptr;
  int64_t available = a.num_emitted[b];
  if (available < 0 || available > a.K1) available = 0;
  // In 64 bits, and capped where lengths end, so that a request at 2^31 - 1 does not wrap.
  const int64_t cap = a.max_lengths ? a.max_lengths[b] : std::numeric_limits<int32_t>::max();
  const int64_t left = cap - a.lengths[b], room = left > 0 ? left : 0;
  const int64_t limit = available < room ? available : room;
  int64_t n = 0;
  int32_t reason = kFinishNone;
  while (n < limit && reason == kFinishNone) {
    const int64_t token = tokens[n++];
    for (int64_t s = 0; s < a.num_stops && stops; ++s)
      if (stops[s] >= 0 && stops[s] == token) reason = kFinishStop;
  }
  if (reason == kFinishNone && n == room) reason = kFinishLength;
  a.lengths[b] = static_cast<int32_t>(a.lengths[b] + n);
  a.num_committed[b] = static_cast<int32_t>(n);
  a.reason[b] = reason;
  a.finished[b] = reason != kFinishNone;
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::commit(const CommitArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  const auto blocks = static_cast<unsigned>((a.batch + FD_ISA::kThreads - 1) / FD_ISA::kThreads);
  FD_LAUNCH(FD_ISA::commit_kernel, blocks, FD_ISA::kThreads, 0, ex.stream, a);
}
