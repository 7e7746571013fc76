#include "verify/verify_chain_greedy.h"

#include <algorithm>

#include "core/cpu_level.h"

namespace fastdecode::FD_ISA {

// A request is a few dozen comparisons: threads would cost more than they save.
void verify_chain_greedy(const VerifyChainGreedyArgs& a, const Exec&) {
  for (int64_t b = 0; b < a.batch; ++b) {
    int64_t* tokens = a.tokens + b * (a.K + 1);
    std::fill(tokens, tokens + a.K + 1, int64_t{-1});
    a.num_accepted[b] = a.num_emitted[b] = a.status[b] = 0;
    if (a.active && !a.active[b]) continue;
    const int64_t len = a.draft_lens ? a.draft_lens[b] : a.K;
    if (len < 0 || len > a.K) {
      a.status[b] = kStatusBadLength;
      continue;
    }
    const int64_t* draft = a.draft_tokens + b * a.draft_stride;
    const int64_t* target = a.target_ids + b * a.target_stride;
    int32_t n = 0;
    while (n < len && target[n] >= 0 && draft[n] == target[n]) ++n;
    if (target[n] < 0) {  // the row had no argmax
      a.status[b] = kStatusNoMass;
      continue;
    }
    std::copy(target, target + n + 1, tokens);
    a.num_accepted[b] = n;
    a.num_emitted[b] = n + 1;
  }
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(verify_chain_greedy, VerifyChainGreedyArgs)
