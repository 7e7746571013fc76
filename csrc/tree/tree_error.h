// Whether one tree is well formed, for ops that refuse the ones that are not.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/enums.h"

namespace fastdecode::FD_ISA {

// Of one slot below `count`, whose parent this is.
FD_HD inline TreeError slot_error(int64_t slot, int32_t parent) {
  if (slot == 0) return parent == -1 ? kTreeValid : kTreeBadRoot;
  return parent >= 0 && parent < slot ? kTreeValid : kTreeBadParent;
}

inline TreeError tree_error(const int32_t* parents, int64_t count, int64_t num_slots) {
  if (count < 0 || count > num_slots) return kTreeBadCount;
  for (int64_t slot = 0; slot < count; ++slot)
    if (const TreeError error = slot_error(slot, parents[slot])) return error;
  return kTreeValid;
}

}  // namespace fastdecode::FD_ISA
