// Longest draft prefix that greedy target decoding would have produced, and the token after it
// (Stern et al. 2018, "verify" substep).
//   num_accepted[b] = max{ n <= len[b] : draft_tokens[b, :n] == target_ids[b, :n] }
//   tokens[b] = target_ids[b, :num_accepted[b] + 1], then -1
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct VerifyChainGreedyArgs {
  const int64_t* draft_tokens;  // [batch, K]
  // A row without an argmax holds -1: the request that comes to it ends in error.
  const int64_t* target_ids;            // [batch, K + 1], argmax of the target at the root and after each draft token
  const int32_t* draft_lens;            // [batch], 0..K; nullptr = all K
  const bool* active;                   // [batch]; nullptr = all
  int64_t* tokens;                      // [batch, K + 1], written, contiguous, padded with -1
  int32_t* num_accepted;                // [batch], written
  int32_t* num_emitted;                 // [batch], written: num_accepted + 1; 0 where inactive or in error
  int32_t* status;                      // [batch], written: 2 = came to a target id below 0, 32 = length outside 0..K
  int64_t batch, K;                     // either may be 0
  int64_t draft_stride, target_stride;  // elements between rows; last dim contiguous; 0 allowed
};
namespace cpu {
void verify_chain_greedy(const VerifyChainGreedyArgs&, const Exec&);
}
namespace cuda {
void verify_chain_greedy(const VerifyChainGreedyArgs&, const Exec&);
}

}  // namespace fastdecode
