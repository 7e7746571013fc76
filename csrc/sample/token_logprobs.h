// Natural-log probabilities of given tokens, and of the most likely ones, under the target law of the filters; with no
// filters: of log_softmax(logits) at temperature 1, which is what APIs report.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"
#include "core/filter.h"

namespace fastdecode {

struct TokenLogprobsArgs {
  const void* logits;        // [batch, rows, vocab_size] of `dtype`, last dim contiguous; flat: [rows, vocab_size]
  const int64_t* tokens;     // [batch, rows] or [rows], last dim contiguous; -1 = padding: logprob 0, not read if top 0
  const int32_t* row_start;  // [batch + 1], flat: request b has rows row_start[b] .. row_start[b + 1] - 1; else nullptr
  FilterArgs filters;
  const bool* active;  // [batch]; nullptr = all. Inactive rows, and rows of no request, are not read
  void* logprobs;      // one per row, written; float, double for double logits; -inf where the law gives 0
  int64_t* top_ids;    // [.., top], written, most likely first, ties by id; -1 where fewer ids are left
  void* top_logprobs;  // [.., top], written; -inf beside -1
  int32_t* status;     // one per row, written: 1 = NaN or +inf, 2 = no id left, 4 = token outside the vocabulary
  void* scratch;       // token_logprobs_scratch_bytes
  int64_t batch, rows, vocab_size, top;
  int64_t batch_stride, row_stride, token_stride;  // elements; token_stride between requests
  DType dtype;
};

namespace cpu {
int64_t token_logprobs_scratch_bytes(const TokenLogprobsArgs&, const Exec&);
void token_logprobs(const TokenLogprobsArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t token_logprobs_scratch_bytes(const TokenLogprobsArgs&, const Exec&);
void token_logprobs(const TokenLogprobsArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
