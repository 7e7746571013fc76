#include "attention/prefix_attention.h"

#include "attention/attend.h"

namespace fastdecode::FD_ISA {
namespace {

AttendArgs attend_args(const PrefixAttentionArgs& a) {
  AttendArgs args = {};
  args.q = a.q;
  args.pages = a.pages;
  args.page_table = a.page_table;
  args.kv_lens = a.prefix_lens;
  args.out = a.out;
  args.lse = a.lse;
  args.status = a.status;
  args.scratch = a.scratch;
  args.batch = a.num_groups;
  args.num_q_heads = a.num_q_heads;
  args.max_pages = a.max_pages;
  args.page_table_stride = a.page_table_stride;
  args.q_slot_stride = a.q_row_stride;
  args.q_head_stride = a.q_head_stride;
  args.scale = a.scale;
  args.softcap = a.softcap;
  args.dtype = a.dtype;
  args.group_start = a.group_start;
  args.num_rows = a.num_rows;
  return args;
}

}  // namespace

void prefix_attention(const PrefixAttentionArgs& a, const Exec& ex) { attend(attend_args(a), ex); }

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(prefix_attention, PrefixAttentionArgs)

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::prefix_attention_scratch_bytes(const PrefixAttentionArgs& a, const Exec& ex) {
  return attend_scratch_bytes(FD_ISA::attend_args(a), ex);
}
#endif
