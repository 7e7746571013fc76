#include "attention/paged_attention.h"

#include "attention/attend.h"

int64_t fastdecode::cuda::paged_attention_scratch_bytes(const PagedAttentionArgs& a, const Exec& ex) {
  return attend_scratch_bytes({a, /*group_start=*/nullptr, /*num_rows=*/a.batch * a.num_slots}, ex);
}

void fastdecode::cuda::paged_attention(const PagedAttentionArgs& a, const Exec& ex) {
  attend({a, /*group_start=*/nullptr, /*num_rows=*/a.batch * a.num_slots}, ex);
}
