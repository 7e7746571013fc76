// Forbids the ids that a grammar does not allow, in place: logits[r, v] = -inf where bit v of the row's mask is 0.
// Bit v is bit v % 32, from the least significant, of word v / 32, as XGrammar, llguidance and outlines-core fill it.
// Ids past the mask's last word are forbidden: a mask is as wide as the tokenizer, logits may be padded.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct ApplyTokenBitmaskArgs {
  void* logits;            // [batch, rows, vocab_size] of `dtype`, changed; last dim contiguous, rows do not overlap
  const int32_t* bitmask;  // [batch, rows, words], or [num_indices, words] with indices; last dim contiguous
  const int32_t* indices;  // [num_indices]: mask j is for logits row indices[j], and is skipped outside 0..batch - 1;
                           // several masks of one row all hold
  const bool* active;      // [batch]; nullptr = all. Inactive rows are neither read nor changed
  bool indexed;            // false: mask r is for row r; true: by `indices`, and rows is 1
  int64_t batch, rows, vocab_size;
  int64_t words, num_indices;            // words <= ceil(vocab_size / 32)
  int64_t batch_stride, row_stride;      // elements
  int64_t mask_stride, mask_row_stride;  // elements; between requests (or indices) and between rows; 0 allowed
  DType dtype;
};
namespace cpu {
void apply_token_bitmask(const ApplyTokenBitmaskArgs&, const Exec&);
}
namespace cuda {
void apply_token_bitmask(const ApplyTokenBitmaskArgs&, const Exec&);
}

}  // namespace fastdecode
