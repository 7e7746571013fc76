// Logits with penalties for what the text has already said. For an id that the text holds, in this order:
//   repetition (Keskar et al. 2019, CTRL):  x = x > 0 ? x / repetition : x * repetition    prompt and output
//   frequency, presence (OpenAI API):       x = x - frequency * count - presence           where count > 0, the number
//                                                                                          of times in the output
// Row i of a verification counts the first i draft tokens as output, so that it is the row that plain decoding would
// have after emitting them.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct PenalizeArgs {
  const void* logits;             // [batch, rows, vocab_size] of `dtype`, last dim contiguous
  const int64_t* tokens;          // [batch, max_length]: prompt and output; ids outside the vocabulary are ignored
  const int32_t* lengths;         // [batch], 0..max_length tokens in use
  const int32_t* prompt_lengths;  // [batch], 0..lengths: where the output begins; nullptr = 0
  const int64_t* draft_tokens;    // [batch, rows - 1]; nullptr = rows count no drafts
  const float* repetition;        // [batch]; <= 0 is off, as 1 is. nullptr = off, for presence and frequency too
  const float* presence;          // [batch]
  const float* frequency;         // [batch]
  const bool* active;             // [batch]; nullptr = all. Inactive requests are not read, their output is 0
  void* penalized;                // [batch, rows, vocab_size], written, contiguous; float, double for double logits.
                                  // -inf stays -inf
  int32_t* status;                // [batch], written: 32 = a length outside its range. The rows are then NaN
  void* scratch;                  // penalize_scratch_bytes; need not be initialised
  int64_t batch, rows, vocab_size, max_length;
  int64_t batch_stride, row_stride, token_stride, draft_stride;  // elements
  DType dtype;
};

namespace cpu {
int64_t penalize_scratch_bytes(const PenalizeArgs&, const Exec&);
void penalize(const PenalizeArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t penalize_scratch_bytes(const PenalizeArgs&, const Exec&);
void penalize(const PenalizeArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
