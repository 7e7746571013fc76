// Speculative verification of a chain of draft tokens against the target law of each row.
// ratio (Leviathan et al. 2023, Chen et al. 2023): accept draft x with min(1, target(x) / draft(x)); at the first
//   rejection draw from norm((target - draft)+), after full acceptance from the next row: the tokens follow the target
//   law. Without draft probabilities the draft law is one-hot at the drafted token.
// block (Sun et al. 2024): the same law, judging prefixes rather than tokens, so at least as many are accepted:
//     w_0 = 1, w_i = min(1, w_{i-1} target_i(x_i) / draft_i(x_i)), h_len = w_len, and for 0 < i < len
//     h_i = S_i / (S_i + 1 - w_i), S_i = sum (w_i target_{i+1} - draft_{i+1})+;
//   the longest prefix i with u_i < h_i is kept, then one token from norm((w_i target_{i+1} - draft_{i+1})+).
// coupled: `sample` of every row at its own position, then greedy match: the tokens are those of plain sampling with
//   the same seed, whatever the drafts are.
// typical (Cai et al. 2024, Medusa): accept x if target(x) > min(eps, delta e^-entropy); then the most likely id of the
//   row's law, or one drawn from those that clear this threshold. No law is kept.
// top_beta (Xia et al. 2023): accept x if it is among the beta largest logits and at most tau below the largest; then
//   the argmax. beta 1, tau 0 is greedy decoding; no law is kept otherwise.
// Row i of the target predicts the token after draft i - 1 (row 0: after the last committed token). Rows after the
// first rejection, and past the draft's length, change nothing (block: rows after the first draft of no weight).
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/enums.h"
#include "core/exec.h"
#include "core/filter.h"

namespace fastdecode {

struct VerifyChainArgs {
  const int64_t* draft_tokens;     // [batch, K], ids of the draft's vocabulary
  const void* draft_probs;         // [batch, K, draft_vocab_size] of `draft_dtype`; nullptr = one-hot. ratio, block
  const int32_t* draft_lens;       // [batch], 0..K; nullptr = all K
  const int64_t* draft_to_target;  // [draft_vocab_size], -1 = no such id in the target; nullptr = the same ids
  const void* target;              // [batch, K + 1, vocab_size] of `dtype`; flat: [num_rows, vocab_size]
  const int32_t* row_start;        // [batch + 1], flat: request b's rows begin at row_start[b]; nullptr = not flat
  bool target_is_probs;            // else logits. Probabilities are used as given, not renormalised; filters are off
  Rule rule;
  FilterArgs filters;     // row i of request b predicts position filters.offset[b] + i
  const float* eps;       // [batch], typical
  const float* delta;     // [batch], typical
  Bonus bonus;            // typical
  const int32_t* beta;    // [batch], top_beta
  const float* tau;       // [batch], top_beta
  RandomArgs random;      // uniforms [batch, K + 1]: i accepts draft i, K the final draw; coupled: row i
  const bool* active;     // [batch]; nullptr = all
  bool emit_bonus;        // false: nothing is emitted after full acceptance
  int64_t* tokens;        // [batch, K + 1], written, contiguous, padded with -1; ids of the target
  int32_t* num_accepted;  // [batch], written: draft tokens kept
  int32_t* num_emitted;   // [batch], written; 0 where inactive or in error
  int32_t* status;        // [batch], written: bits of core/enums.h; an error leaves tokens -1 and counts 0
  void* scratch;          // verify_chain_scratch_bytes
  int64_t batch, K, vocab_size, draft_vocab_size;
  int64_t num_rows;                                  // flat rows of the target
  int64_t draft_stride;                              // elements between requests
  int64_t draft_prob_stride, draft_prob_row_stride;  // elements between requests, between rows
  int64_t target_stride, target_row_stride;          // target_stride 0 where flat
  DType dtype;
  DType draft_dtype;  // `dtype`, or the type rows of `dtype` are computed in (float; double for double)
};

namespace cpu {
int64_t verify_chain_scratch_bytes(const VerifyChainArgs&, const Exec&);
void verify_chain(const VerifyChainArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t verify_chain_scratch_bytes(const VerifyChainArgs&, const Exec&);
void verify_chain(const VerifyChainArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
