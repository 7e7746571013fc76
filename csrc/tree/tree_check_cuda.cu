#include "tree/tree_check.h"
#include "tree/tree_error.cuh"

namespace fastdecode::FD_ISA {
namespace {

// A block per tree.
__global__ void __launch_bounds__(kThreads) tree_check_kernel(TreeCheckArgs a) {
  FD_SHARED(BlockSlots, slots);
  const int64_t b = blockIdx.x;
  const int64_t count = a.num_nodes ? a.num_nodes[b] : a.num_slots;
  const TreeError error = block_tree_error(slots, a.parents + b * a.parent_stride, count, a.num_slots);
  if (threadIdx.x == 0) a.code[b] = error;
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::tree_check(const TreeCheckArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  FD_LAUNCH(FD_ISA::tree_check_kernel, FD_ISA::grid_of(a.batch), FD_ISA::kThreads, 0, ex.stream, a);
}
