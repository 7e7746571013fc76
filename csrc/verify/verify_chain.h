// Speculative verification of a chain of draft tokens against the target law of each row.
// ratio (Leviathan et al. 2023, Chen et al. 2023): accept draft x with min(1, target(x) / draft(x)); at the first
// rejection draw
//   from norm((target - draft)+), after full acceptance from the next row: the tokens follow the target law. Without
//   draft probabilities the draft law is one-hot at the drafted token.
// coupled: `sample` of every row at its own position, then greedy match: the tokens are those of plain sampling with
//   the same seed, whatever the drafts are.
// Row i of the target predicts the token after draft i - 1 (row 0: after the last committed token). Rows after the
// first rejection, and past the draft's length, are not read.
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/enums.h"
#include "core/exec.h"
#include "core/filter.h"

namespace fastdecode {

struct VerifyChainArgs {
  const int64_t* draft_tokens;  // [batch, K]
  const void* draft_probs;      // [batch, K, vocab_size] of `draft_dtype`; nullptr = one-hot. ratio only
  const int32_t* draft_lens;    // [batch], 0..K; nullptr = all K
  const void* target;           // [batch, K + 1, vocab_size] of `dtype`: logits, or probabilities (ratio only)
  bool target_is_probs;         // used as given, not renormalised; filters are then all off
  Rule rule;
  FilterArgs filters;     // row i of request b predicts position filters.offset[b] + i
  RandomArgs random;      // uniforms [batch, K + 1]: ratio: i accepts draft i, K the final draw; coupled: row i
  const bool* active;     // [batch]; nullptr = all
  bool emit_bonus;        // false: nothing is emitted after full acceptance
  int64_t* tokens;        // [batch, K + 1], written, contiguous, padded with -1
  int32_t* num_accepted;  // [batch], written: draft tokens kept
  int32_t* num_emitted;   // [batch], written; 0 where inactive or in error
  int32_t* status;        // [batch], written: bits of core/enums.h; an error leaves tokens -1 and counts 0
  void* scratch;          // verify_chain_scratch_bytes
  int64_t batch, K, vocab_size;
  int64_t draft_stride;                              // elements between requests
  int64_t draft_prob_stride, draft_prob_row_stride;  // elements between requests, between rows
  int64_t target_stride, target_row_stride;
  DType dtype;
  DType draft_dtype;  // `dtype`, or the type rows of `dtype` are computed in (float; double for double)
};

int64_t verify_chain_scratch_bytes(const VerifyChainArgs&, const Exec&);

namespace cpu {
void verify_chain(const VerifyChainArgs&, const Exec&);
}

}  // namespace fastdecode
