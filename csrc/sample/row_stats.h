// Statistics of rows of logits, from one read: what stopping rules, confidence thresholds and greedy decoding need.
//   logsumexp[r] = log sum_v exp(logits[r, v]);  entropy[r] = -sum_v p log p, p = softmax, natural log
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct RowStatsArgs {
  const void* logits;  // [batch, rows, vocab_size] of `dtype`, last dim contiguous
  const bool* active;  // [batch]; nullptr = all. Inactive rows are not read
  void* max;           // [batch, rows], written; this and the other values float, double for double logits
  int64_t* argmax;     // [batch, rows], written; lowest id among ties; -1 where inactive or in error
  void* second;        // [batch, rows], written; second largest, counted with multiplicity; -inf if vocab_size is 1
  void* logsumexp;     // [batch, rows], written
  void* entropy;       // [batch, rows], written; nats
  int32_t* status;     // [batch, rows], written: 1 = NaN or +inf in the row, 2 = all -inf. Values are then 0
  void* scratch;       // row_stats_scratch_bytes
  int64_t batch, rows, vocab_size;
  int64_t batch_stride, row_stride;  // elements
  DType dtype;
};

namespace cpu {
int64_t row_stats_scratch_bytes(const RowStatsArgs&, const Exec&);
void row_stats(const RowStatsArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t row_stats_scratch_bytes(const RowStatsArgs&, const Exec&);
void row_stats(const RowStatsArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
