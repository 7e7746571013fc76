// What paged_attention and prefix_attention of the CPU have in common: sequences of cached keys, each with rows of
// queries.
#pragma once

#include "attention/paged_attention.h"
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
namespace FD_ISA {
void attend(const AttendArgs&, const Exec&);
}

}  // namespace fastdecode
