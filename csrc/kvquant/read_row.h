// One head of one cached token as numbers (CPU), wherever it lies.
#pragma once

#include "kvquant/row_codec.h"

namespace fastdecode::FD_ISA {

// Keys of kivi: a channel's codes of a page lie together, so a token's are strided.
template <class C>
FD_ROW void decode_kivi_key(const KVPages& p, int64_t page, int64_t offset, int64_t head, C* to) {
  const int bits = code_bits(p.scheme);
  const int64_t row_bytes = p.page_size * bits / 8, bytes = p.group * bits / 8;
  const int64_t group = offset / p.group, i = offset % p.group;
  const Half* scale = static_cast<const Half*>(p.k.scale) + page * p.k.scale_page_stride +
                      head * p.k.scale_head_stride + group * 2 * p.head_dim;
  const uint8_t* data = static_cast<const uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride +
                        group * bytes + i % bytes;
  const int shift = bits * static_cast<int>(i / bytes);
  for (int64_t d = 0; d < p.head_dim; ++d) {
    const uint32_t code = static_cast<uint32_t>(data[d * row_bytes]) >> shift & ((1u << bits) - 1);
    to[d] = decode_grid<C>(code, static_cast<C>(load(scale[d])), static_cast<C>(load(scale[p.head_dim + d])));
  }
}

// A token in a page.
template <class C>
void read_page_row(const KVPages& p, bool is_key, int64_t page, int64_t offset, int64_t head, C* to) {
  const KVStore& s = is_key ? p.k : p.v;
  if (is_kivi(p.scheme) && is_key) return decode_kivi_key(p, page, offset, head, to);
  const int64_t at = token_at(s, page, offset, head);
  if (p.scheme == kKVPlain) {
    return dispatch_logits(p.dtype, [&](auto tag) {
      using E = typename decltype(tag)::type;
      load_row(static_cast<const E*>(s.data) + at, p.head_dim, to);
    });
  }
  const uint8_t* data = static_cast<const uint8_t*>(s.data) + at;
  const int64_t scale = scale_at(s, page, offset, head);
  if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
    return decode_fp8_row(data, static_cast<const float*>(s.scale) + scale, p.static_scale, p.scheme == kKVFp8E4M3,
                          p.head_dim, p.group, to);
  }
  decode_int_row(data, static_cast<const Half*>(s.scale) + scale, p.head_dim, p.group, code_bits(p.scheme), to);
}

// A token in a ring.
template <class C>
void read_ring_row(const KVPages& p, bool is_key, int64_t row, int64_t position, int64_t head, C* to) {
  const KVStore& s = is_key ? p.k : p.v;
  const int64_t at = tail_at(s, row, position % p.tail_size, head);
  dispatch_logits(p.tail_dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    load_row(static_cast<const E*>(s.tail) + at, p.head_dim, to);
  });
}

}  // namespace fastdecode::FD_ISA
