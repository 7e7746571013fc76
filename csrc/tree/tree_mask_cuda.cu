#include "tree/tree_error.cuh"
#include "tree/tree_mask.h"

namespace fastdecode::FD_ISA {
namespace {

struct MaskShared {
  BlockSlots slots;
  int32_t parents[kMaxTreeSlots];
};

// A block per tree, a thread per slot: it walks up to the root. Ancestors fall, so each word of the row is complete,
// and written once, when the walk leaves it.
__global__ void __launch_bounds__(kThreads) tree_mask_kernel(TreeMaskArgs a) {
  FD_SHARED(MaskShared, shared);
  const int64_t b = blockIdx.x;
  const int N = static_cast<int>(a.num_slots), W = (N + 31) / 32;
  const int32_t* parents = a.parents + b * a.parent_stride;
  const int64_t count = a.num_nodes ? a.num_nodes[b] : N;
  const bool valid = block_tree_error(shared.slots, parents, count, N) == kTreeValid;
  const int nodes = valid ? static_cast<int>(count) : 0;
  for (int i = threadIdx.x; i < nodes; i += kThreads) shared.parents[i] = parents[i];
  __syncthreads();  // the walks read what other threads stored
  for (int i = threadIdx.x; i < N; i += kThreads) {
    int32_t* row = a.mask + (b * N + i) * W;
    int depth = -1, word = W - 1;
    uint32_t bits = 0;
    for (int node = i < nodes ? i : -1; node >= 0; node = shared.parents[node], ++depth) {
      for (; word > node >> 5; --word, bits = 0) row[word] = static_cast<int32_t>(bits);
      bits |= 1u << (node & 31);
    }
    for (; word >= 0; --word, bits = 0) row[word] = static_cast<int32_t>(bits);
    a.depths[b * N + i] = depth;
  }
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::tree_mask(const TreeMaskArgs& a, const Exec& ex) {
  if (a.batch == 0) return;
  FD_LAUNCH(FD_ISA::tree_mask_kernel, FD_ISA::grid_of(a.batch), FD_ISA::kThreads, 0, ex.stream, a);
}
