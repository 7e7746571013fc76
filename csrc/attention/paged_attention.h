// Attention of a step's queries to a paged cache that holds their own keys already: the last num_queries[b] of
// kv_lens[b]. Query i stands at position kv_lens - num_queries + depth, depth = i in a chain, the number of proper
// ancestors in a tree. It sees key j if
//   chain   j <= its own key's, or any j < kv_lens if not causal
//   tree    j < kv_lens - num_queries, or the bit of node j - (kv_lens - num_queries) in its row of tree_mask
//   window  and also position - key's position < window (a node's position, so siblings see the same prefix)
// score = scale * q.k, with softcap > 0: softcap * tanh(score / softcap); out = softmax(score) v; lse = natural log of
// the sum of exp(score). A query that sees nothing has out 0, lse -inf.
//
// Keys are cut at multiples of a constant, whatever the batch, the length or the machine, and each row is computed by
// itself: on one build its bits do not depend on other rows, on how many there are, or on threads.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

struct PagedAttentionArgs {
  const void* q;  // [batch, num_slots, num_q_heads, head_dim] of `dtype`, last dim contiguous. Head h reads kv head
                  // h / (num_q_heads / num_heads)
  KVPages pages;
  const int32_t* page_table;   // [batch, max_pages]
  const int32_t* kv_lens;      // [batch], 0..max_pages * page_size (kivi: only what lies in pages counts)
  const int32_t* num_queries;  // [batch], 0..num_slots, <= kv_lens; nullptr = num_slots
  const int32_t* tail_lens;    // [batch], 0..tail_size: the newest tokens lie in ring b. nullptr unless kivi
  const int32_t* coded_lens;   // [batch, num_slots]: query i reads keys below it from pages, the others from the ring,
                               // which holds the last tail_lens. nullptr = kv_lens - tail_lens
  const int32_t* tree_mask;    // [batch, num_slots, ceil(num_slots / 32)], contiguous; nullptr = chain
  void* out;                   // [batch, num_slots, num_q_heads, head_dim] of `dtype`, written, contiguous
  void* lse;                   // [batch, num_slots, num_q_heads] float, double for double q, written
  int32_t* status;             // [batch], written: 32 bad length, 64 a page of its tokens (also of those before a
                               // window) outside the cache: out 0, lse -inf
  void* scratch;               // paged_attention_scratch_bytes; need not be initialised
  int64_t batch, num_slots, num_q_heads, max_pages, page_table_stride;
  int64_t q_batch_stride, q_slot_stride, q_head_stride;  // elements
  int64_t window;                                        // 0 = off
  double scale, softcap;                                 // softcap 0 = off
  bool causal;
  DType dtype;
};

namespace cpu {
int64_t paged_attention_scratch_bytes(const PagedAttentionArgs&, const Exec&);
void paged_attention(const PagedAttentionArgs&, const Exec&);
}  // namespace cpu
namespace cuda {
int64_t paged_attention_scratch_bytes(const PagedAttentionArgs&, const Exec&);
void paged_attention(const PagedAttentionArgs&, const Exec&);
}  // namespace cuda

}  // namespace fastdecode
