// Whether draft trees are well formed: 0 <= num_nodes <= N, parents[0] = -1, 0 <= parents[i] < i for the others. The
// code is the first error found, by rising slot.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct TreeCheckArgs {
  const int32_t* parents;    // [batch, num_slots], last dim contiguous; slots past num_nodes are not read
  const int32_t* num_nodes;  // [batch]; nullptr = num_slots
  int32_t* code;             // [batch], written: a TreeError
  int64_t batch, num_slots, parent_stride;
};

namespace cpu {
void tree_check(const TreeCheckArgs&, const Exec&);
}
namespace cuda {
void tree_check(const TreeCheckArgs&, const Exec&);
}

}  // namespace fastdecode
