// Keys and values of requests as plain tensors: tokens in order, rings included; zero past each request's length.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

struct KVDequantArgs {
  KVPages pages;
  const int32_t* page_table;  // [batch, max_pages]
  const int32_t* kv_lens;     // [batch], 0..length
  const int32_t* tail_lens;   // [batch]: the newest tokens, in the ring; nullptr = none. Only kivi
  void* k;                    // [batch, length, num_heads, head_dim] of `dtype`, written, contiguous
  void* v;                    // as k
  int32_t* status;            // [batch], written: 32 bad length, 64 page outside the cache: the request's output is 0
  int64_t batch, length, max_pages, page_table_stride;
  DType dtype;
};

namespace cpu {
void kv_dequant(const KVDequantArgs&, const Exec&);
}
namespace cuda {
void kv_dequant(const KVDequantArgs&, const Exec&);
}

}  // namespace fastdecode
