#include "attention/paged_attention.h"

#include "attention/attend.h"

namespace fastdecode::FD_ISA {

void paged_attention(const PagedAttentionArgs& a, const Exec& ex) {
  attend({a, /*group_start=*/nullptr, /*num_rows=*/a.batch * a.num_slots}, ex);
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(paged_attention, PagedAttentionArgs)

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::paged_attention_scratch_bytes(const PagedAttentionArgs& a, const Exec& ex) {
  return attend_scratch_bytes({a, /*group_start=*/nullptr, /*num_rows=*/a.batch * a.num_slots}, ex);
}
#endif
