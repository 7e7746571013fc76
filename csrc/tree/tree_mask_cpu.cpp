#include "tree/tree_mask.h"

#include "core/cpu_level.h"
#include "tree/tree_error.h"

namespace fastdecode::FD_ISA {

// A row is its parent's and one bit more. A thousand slots are done before a second thread wakes.
void tree_mask(const TreeMaskArgs& a, const Exec&) {
  const int64_t N = a.num_slots, W = (N + 31) / 32;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int32_t* parents = a.parents + b * a.parent_stride;
    const int64_t count = a.num_nodes ? a.num_nodes[b] : N;
    const int64_t nodes = tree_error(parents, count, N) == kTreeValid ? count : 0;
    int32_t* mask = a.mask + b * N * W;
    int32_t* depths = a.depths + b * N;
    for (int64_t i = 0; i < N; ++i, mask += W) {
      const int64_t parent = i < nodes ? parents[i] : -1;
      const int32_t* from = parent < 0 ? nullptr : mask - (i - parent) * W;
      for (int64_t w = 0; w < W; ++w) mask[w] = from ? from[w] : 0;
      if (i < nodes) mask[i >> 5] |= static_cast<int32_t>(1u << (i & 31));
      depths[i] = i >= nodes ? -1 : parent < 0 ? 0 : depths[parent] + 1;
    }
  }
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(tree_mask, TreeMaskArgs)
