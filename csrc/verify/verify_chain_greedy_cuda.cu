#include "core/cuda/device.cuh"
#include "verify/verify_chain_greedy.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kWarps = 4;

// One warp per request: its lanes compare 32 drafts at a time, up to the first that ends the prefix.
__global__ void __launch_bounds__(kWarps* kWarp) verify_chain_greedy_kernel(VerifyChainGreedyArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kWarps + warp_id();
  if (b >= a.batch) return;
  const int lane = lane_id();
  const int64_t* draft = a.draft_tokens + b * a.draft_stride;
  const int64_t* target = a.target_ids + b * a.target_stride;
  const bool active = !a.active || a.active[b];
  const int64_t len = active && a.draft_lens ? a.draft_lens[b] : a.K;
  const bool bad_length = len < 0 || len > a.K;

  int64_t last = -1;  // the first slot that is not an accepted draft, and so the last one emitted; -1 = nothing is
  bool has_token = false;
  if (active && !bad_length) {
    for (int64_t first = 0; last < 0; first += kWarp) {  // ends, because slot len is none of the drafts
      const int64_t slot = first + lane;
      bool ends = true, valid = false;
      if (slot <= len) {
        const int64_t token = target[slot];
        valid = token >= 0;
        ends = slot == len || !valid || draft[slot] != token;
      }
      const unsigned ended = __ballot_sync(kAllLanes, ends);
      const unsigned with_token = __ballot_sync(kAllLanes, valid);
      if (ended == 0) continue;
      const int winner = __ffs(static_cast<int>(ended)) - 1;
      last = first + winner;
      has_token = (with_token >> winner & 1) != 0;
    }
    if (!has_token) last = -1;
  }

  int64_t* tokens = a.tokens + b * (a.K + 1);
  for (int64_t slot = lane; slot <= a.K; slot += kWarp) tokens[slot] = slot <= last ? target[slot] : -1;
  if (lane != 0) return;
  a.num_accepted[b] = last < 0 ? 0 : static_cast<int32_t>(last);
  a.num_emitted[b] = static_cast<int32_t>(last + 1);
  a.status[b] = !active || last >= 0 ? 0 : bad_length ? kStatusBadLength : kStatusNoMass;
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::verify_chain_greedy(const VerifyChainGreedyArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  const unsigned blocks = FD_ISA::grid_of((a.batch + FD_ISA::kWarps - 1) / FD_ISA::kWarps);
  FD_LAUNCH(FD_ISA::verify_chain_greedy_kernel, blocks, FD_ISA::kWarps * FD_ISA::kWarp, 0, ex.stream, a);
}
