#include "attention/prefix_attention.h"

#include "attention/attend.h"

int64_t fastdecode::cuda::prefix_attention_scratch_bytes(const PrefixAttentionArgs& a, const Exec& ex) {
  return attend_scratch_bytes(FD_ISA::attend_args(a), ex);
}

void fastdecode::cuda::prefix_attention(const PrefixAttentionArgs& a, const Exec& ex) {
  attend(FD_ISA::attend_args(a), ex);
}
