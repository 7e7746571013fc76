// Stores new keys and values: an optional rotary embedding, the scheme's code, a scatter; one read, one write.
// Kivi schemes write to the rings only (core/kv.h); all others to pages.
//
// Coding of x, which is what the rotation gave, rounded to k's dtype:
//   int8, int4  over a group's finite values, clamped to +-65504: offset = the largest float16 <= min, step = the
//               smallest float16 >= (max - offset) / (2^b - 1), code = round((x - offset) / step), ties to even; all
//               exactly, in no arithmetic's rounding. So |x - (code * step + offset)| <= step / 2, always; a group of
//               one value that float16 has gets step 0 and is exact. inf is coded as max, -inf as min, NaN as 0
//               clamped to min .. max. A group without finite values has min = max = 0
//   fp8         scale = max |x| / 448 (57344) over a group's finite values in float32, at least the smallest normal
//               number, or as given; code = x / scale (in float, double for double k), round to nearest even. Beyond
//               the format, inf too: the largest number. NaN is NaN, 0x7f
//   plain, ring the nearest number of their dtype; finite values beyond it: the largest. One NaN, the positive one
// status 1 tells of NaN and inf, 128 of finite values that were clamped, in any head of k or v.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

struct KVAppendArgs {
  const void* k;         // [num_tokens, num_heads, head_dim] of `dtype`, last dim contiguous
  const void* v;         // as k
  const int64_t* slots;  // [num_tokens]: page * page_size + offset; kivi: row * tail_size + slot of the ring; -1 =
                         // skip. No slot may stand twice
  void* q;               // [num_tokens, num_q_heads, head_dim] of `dtype`, rotated in place; nullptr = none
  const void* rope;  // [num_positions, 2, head_dim / 2]: cos, sin; float, double for double k. nullptr = no rotation
  const void* positions;  // [num_tokens], int64, or int32 if positions_are_32; nullptr without rope
  int32_t* status;  // [num_tokens], written: 1 NaN or inf, 64 slot or position outside, nothing stored, 128 saturated
  KVPages pages;    // written
  int64_t num_tokens, num_q_heads, num_positions;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride, q_token_stride, q_head_stride;  // elements
  DType dtype;
  bool positions_are_32;
  bool interleaved;  // pairs are channels (2i, 2i + 1), not (i, i + head_dim / 2)
};

namespace cpu {
void kv_append(const KVAppendArgs&, const Exec&);
}
namespace cuda {
void kv_append(const KVAppendArgs&, const Exec&);
}

}  // namespace fastdecode
