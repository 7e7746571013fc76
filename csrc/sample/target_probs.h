// The target law of a row of logits (core/filter.h) as probabilities. Plain sampling, drafting and verification all
// speak of this law.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"
#include "core/filter.h"

namespace fastdecode {

struct TargetProbsArgs {
  const void* logits;        // [batch, rows, vocab_size] of `dtype`, last dim contiguous; flat: [rows, vocab_size]
  const int32_t* row_start;  // [batch + 1], flat: request b has rows row_start[b] .. row_start[b + 1] - 1; else nullptr
  FilterArgs filters;        // row i of request b predicts position filters.offset[b] + i
  const bool* active;        // [batch]; nullptr = all. Inactive rows, and rows of no request, are not read: probs 0
  void* probs;               // shape of logits, written, contiguous; float, double for double logits
  int32_t* status;           // one per row, written: 1 = NaN or +inf in the row, 2 = no id left. probs are then 0
  void* scratch;             // target_probs_scratch_bytes
  int64_t batch, rows, vocab_size;
  int64_t batch_stride, row_stride;  // elements of logits
  DType dtype;
};

namespace cpu {
int64_t target_probs_scratch_bytes(const TargetProbsArgs&, const Exec&);
void target_probs(const TargetProbsArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t target_probs_scratch_bytes(const TargetProbsArgs&, const Exec&);
void target_probs(const TargetProbsArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
