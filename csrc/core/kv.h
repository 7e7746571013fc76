// Paged keys and values, as every op of kvquant/ and attention/ sees them.
//
// A page holds `page_size` tokens of `num_heads` kv heads. Token t of request b lies in page page_table[b, t /
// page_size] at t % page_size; a slot is page * page_size + offset. Several requests may share a page. Ops that treat
// heads alike (flush, keep, dequant) may be given all layers as num_layers * num_heads heads: then strides say so.
//
//   scheme      data of a page (strides are free but for the last dims, in brackets)
//   plain       T     [page_size, num_heads, {head_dim}]
//   fp8, int8   uint8 [page_size, num_heads, {head_dim}]
//   int4        uint8 [page_size, num_heads, {head_dim / 2}]
//   kivi        uint8 keys [num_heads, {head_dim, page_size * b / 8}], values [page_size, num_heads, {head_dim * b /
//   8}]
//
//   scheme      scales of a page
//   fp8         float32 [page_size, num_heads, {head_dim / group}], written by append; or given, [num_heads] for all
//   int8, int4  float16 [page_size, num_heads, {head_dim / group, 2}]: step, offset
//   kivi        float16 keys [num_heads, {page_size / group, 2, head_dim}], values as int4
//
// Codes of fewer than 8 bits lie in split order, which unpacks a vector at a time: of a run of n codes of b bits, byte
// j of n * b / 8 holds codes j, j + n * b / 8, j + 2 * n * b / 8, ..., the i-th of them in bits b * i and up. A run is
// a head's channels, for keys of kivi a group of tokens of one channel (so group g of channel d begins at byte g *
// group * b / 8 of that channel's bytes).
//
// Kivi schemes code tokens only when whole groups of them are committed (kv_flush_). Until then a token lies in its
// request's ring, [batch, tail_size, num_heads, head_dim] of tail_dtype: position p in slot p % tail_size.
#pragma once

#include <cstdint>

#include "core/enums.h"

namespace fastdecode {

// Keys or values of all pages, and of all rings. Strides in elements; those of codes are bytes.
struct KVStore {
  void* data = nullptr;
  void* scale = nullptr;                                                         // nullptr: plain
  void* tail = nullptr;                                                          // nullptr: scheme has no ring
  int64_t page_stride = 0, token_stride = 0, head_stride = 0;                    // keys of kivi: no token_stride
  int64_t scale_page_stride = 0, scale_token_stride = 0, scale_head_stride = 0;  // 0, 0, 1 where a scale is given
  int64_t tail_batch_stride = 0, tail_token_stride = 0, tail_head_stride = 0;
};

struct KVPages {
  KVStore k, v;
  int64_t num_pages = 0, page_size = 0, num_heads = 0, head_dim = 0;
  int64_t group = 0;  // channels per scale; for keys of kivi tokens per scale. Divides head_dim (kivi: page_size too)
  int64_t tail_batch = 0, tail_size = 0;
  KVScheme scheme = kKVPlain;
  DType dtype = DType::kFloat32;       // of plain data
  DType tail_dtype = DType::kFloat32;  // of the rings
  bool static_scale = false;           // fp8: scales are given, one per head
};

// Largest head_dim of the ops of kvquant/.
inline constexpr int64_t kMaxHeadDim = 1024;

constexpr bool is_kivi(KVScheme s) { return s == kKVKivi4 || s == kKVKivi2; }
constexpr int code_bits(KVScheme s) {  // plain: 0
  return s == kKVPlain ? 0 : s == kKVInt4 || s == kKVKivi4 ? 4 : s == kKVKivi2 ? 2 : 8;
}

}  // namespace fastdecode
