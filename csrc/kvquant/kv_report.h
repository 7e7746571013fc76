// How far a cache is from the keys and values that were put into it, without a dequantised copy.
// Sums have one order everywhere: of kReportTile tokens, lane l of kReportLanes adds channels l, l + kReportLanes, ...
// of one token after the other; lanes are joined as neighbours, then as neighbours of those; tiles in order.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

inline constexpr int kReportTile = 32, kReportLanes = 32;

struct KVReportArgs {
  const void* k;  // [batch, length, num_heads, head_dim] of `dtype`, last dim contiguous
  const void* v;  // as k
  KVPages pages;
  const int32_t* page_table;  // [batch, max_pages]
  const int32_t* kv_lens;     // [batch], 0..length
  const int32_t* tail_lens;   // [batch]; nullptr = none
  double* errors;             // [2, batch, num_heads, 3], written: of keys and of values, sum of squared errors, sum of
                              // squared values, largest |error|; NaN where status is not 0, or
                              // where k, v or the cache has NaN or inf
  int32_t* status;            // [batch], written: 32 bad length, 64 page outside the cache
  int64_t batch, length, max_pages, page_table_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride, v_batch_stride, v_token_stride, v_head_stride;
  DType dtype;
};

namespace cpu {
void kv_report(const KVReportArgs&, const Exec&);
}
namespace cuda {
void kv_report(const KVReportArgs&, const Exec&);
}

}  // namespace fastdecode
