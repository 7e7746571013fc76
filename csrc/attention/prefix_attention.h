// Attention of many queries to one shared prefix, without a mask (Hydragen, Juravsky et al. 2024): the keys are read
// once for all of a group's queries. Group g is rows group_start[g] .. group_start[g + 1] - 1 of q, its prefix the
// first prefix_lens[g] tokens of row g of page_table. Merge with attention to the rest by merge_states.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

struct PrefixAttentionArgs {
  const void* q;               // [num_rows, num_q_heads, head_dim] of `dtype`, last dim contiguous
  KVPages pages;               // kivi: the prefix lies in pages, no ring is read
  const int32_t* group_start;  // [num_groups + 1], rising, 0..num_rows; rows of no group get out 0, lse -inf
  const int32_t* page_table;   // [num_groups, max_pages]
  const int32_t* prefix_lens;  // [num_groups], 0..max_pages * page_size
  void* out;                   // [num_rows, num_q_heads, head_dim] of `dtype`, written, contiguous
  void* lse;                   // [num_rows, num_q_heads] float, double for double q, written; natural log
  int32_t* status;  // [num_groups], written: 32 bad length (all groups where starts do not rise), 64 page outside the
                    // cache: out 0, lse -inf
  void* scratch;    // prefix_attention_scratch_bytes
  int64_t num_rows, num_groups, num_q_heads, max_pages, page_table_stride;
  int64_t q_row_stride, q_head_stride;
  double scale, softcap;
  DType dtype;
};

namespace cpu {
int64_t prefix_attention_scratch_bytes(const PrefixAttentionArgs&, const Exec&);
void prefix_attention(const PrefixAttentionArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t prefix_attention_scratch_bytes(const PrefixAttentionArgs&, const Exec&);
void prefix_attention(const PrefixAttentionArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
