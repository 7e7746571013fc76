// One token per row from the target law (core/filter.h), by the random-number contract (core/philox.h, core/draw.h).
#pragma once

#include <cstdint>

#include "core/draw.h"
#include "core/enums.h"
#include "core/exec.h"
#include "core/filter.h"

namespace fastdecode {

struct SampleArgs {
  const void* logits;  // [batch, vocab_size] of `dtype`, last dim contiguous
  FilterArgs filters;
  RandomArgs random;   // uniforms [batch], or seed and offset
  const bool* active;  // [batch]; nullptr = all. Inactive rows are not read
  int64_t* tokens;     // [batch], written; -1 where inactive or in error
  int32_t* status;     // [batch], written: 1 = NaN or +inf in the row, 2 = no id left
  void* scratch;       // sample_scratch_bytes
  int64_t batch, vocab_size;
  int64_t batch_stride;  // elements of logits
  int64_t stream, node;  // second word of the counter
  DType dtype;
};

namespace cpu {
int64_t sample_scratch_bytes(const SampleArgs&, const Exec&);
void sample(const SampleArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t sample_scratch_bytes(const SampleArgs&, const Exec&);
void sample(const SampleArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
