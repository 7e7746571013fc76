// What paged_attention and prefix_attention have in common: sequences of cached keys, each with rows of
// queries.
#pragma once

#include "attention/paged_attention.h"
#include "attention/prefix_attention.h"
#include "core/cpu_level.h"

namespace fastdecode {

struct AttendArgs : PagedAttentionArgs {
  const int32_t* group_start;  // [batch + 1]: sequence b has rows group_start[b] .. group_start[b + 1] - 1 of q, whose
                               // stride is q_slot_stride. nullptr: slots of its own, as paged_attention says
  int64_t num_rows;            // of q, out and lse
};

namespace cpu {
int64_t attend_scratch_bytes(const AttendArgs&, const Exec&);
}
namespace cuda {
int64_t attend_scratch_bytes(const AttendArgs&, const Exec&);
void attend(const AttendArgs&, const Exec&);
}  // namespace cuda
namespace FD_ISA {
int64_t attend_scratch_bytes(const AttendArgs&, const Exec&);
void attend(const AttendArgs&, const Exec&);

inline AttendArgs attend_args(const PrefixAttentionArgs& a) {
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
}  // namespace FD_ISA

}  // namespace fastdecode
