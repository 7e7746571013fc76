// Ancestor masks and depths of draft trees (SpecInfer, Miao et al. 2024, section 4.2: tree attention).
//   mask[i] = mask[parents[i]] | bit i; depths[i] = depths[parents[i]] + 1, 0 at the root
// A tree that tree_check refuses gets mask 0, depths -1 in all its slots, as do slots past num_nodes.
#pragma once

#include <cstdint>

#include "core/exec.h"

namespace fastdecode {

struct TreeMaskArgs {
  const int32_t* parents;    // [batch, num_slots], last dim contiguous
  const int32_t* num_nodes;  // [batch]; nullptr = num_slots
  int32_t* mask;    // [batch, num_slots, ceil(num_slots / 32)], written; bit j & 31 of word j >> 5 of row i: j is
                    // i or an ancestor of it
  int32_t* depths;  // [batch, num_slots], written
  int64_t batch, num_slots, parent_stride;
};

namespace cpu {
void tree_mask(const TreeMaskArgs&, const Exec&);
}
namespace cuda {
void tree_mask(const TreeMaskArgs&, const Exec&);
}

}  // namespace fastdecode
