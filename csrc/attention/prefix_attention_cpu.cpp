#include "attention/prefix_attention.h"

#include "attention/attend.h"

namespace fastdecode::FD_ISA {
void prefix_attention(const PrefixAttentionArgs& a, const Exec& ex) { attend(attend_args(a), ex); }

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(prefix_attention, PrefixAttentionArgs)

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::prefix_attention_scratch_bytes(const PrefixAttentionArgs& a, const Exec& ex) {
  return attend_scratch_bytes(FD_ISA::attend_args(a), ex);
}
#endif
