#include "tree/tree_check.h"

#include "core/cpu_level.h"
#include "tree/tree_error.h"

namespace fastdecode::FD_ISA {

void tree_check(const TreeCheckArgs& a, const Exec&) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t count = a.num_nodes ? a.num_nodes[b] : a.num_slots;
    a.code[b] = tree_error(a.parents + b * a.parent_stride, count, a.num_slots);
  }
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(tree_check, TreeCheckArgs)
