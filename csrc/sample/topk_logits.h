// The k largest logits of each row and their ids, largest first, ties by id.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct TopkLogitsArgs {
  const void* logits;  // [batch, rows, vocab_size] of `dtype`, last dim contiguous
  const bool* active;  // [batch]; nullptr = all. Inactive rows are not read
  void* values;        // [batch, rows, k], written; float, double for double logits; -inf beside -1
  int64_t* ids;        // [batch, rows, k], written; -1 where fewer than k logits are finite, inactive or in error
  int32_t* status;     // [batch, rows], written: 1 = NaN or +inf in the row, 2 = all -inf
  void* scratch;       // topk_logits_scratch_bytes
  int64_t batch, rows, vocab_size;
  int64_t k;                         // 1 .. vocab_size
  int64_t batch_stride, row_stride;  // elements
  DType dtype;
};

namespace cpu {
int64_t topk_logits_scratch_bytes(const TopkLogitsArgs&, const Exec&);
void topk_logits(const TopkLogitsArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t topk_logits_scratch_bytes(const TopkLogitsArgs&, const Exec&);
void topk_logits(const TopkLogitsArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
