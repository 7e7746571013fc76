// One number of a cache, wherever it lies, in double: the exact value of its code.
#pragma once

#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {

FD_INLINE FD_HD double value_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<double>(static_cast<const float*>(data)[i]);
    case DType::kFloat16: return static_cast<double>(load(static_cast<const Half*>(data)[i]));
    default: return static_cast<double>(load(static_cast<const BFloat16*>(data)[i]));
  }
}

// Of two numbers the larger, of NaN and anything NaN, in any order.
FD_INLINE FD_HD double larger_or_nan(double a, double b) { return a <= b || b != b ? b : a; }

// Channel d of a token in a page.
FD_INLINE FD_HD double page_value(const KVPages& p, bool is_key, int64_t page, int64_t offset, int64_t head,
                                  int64_t d) {
  const KVStore& s = is_key ? p.k : p.v;
  const int bits = code_bits(p.scheme);
  const uint8_t* bytes = static_cast<const uint8_t*>(s.data);
  if (is_kivi(p.scheme) && is_key) {
    const int64_t group = offset / p.group;
    const Half* scale = static_cast<const Half*>(s.scale) + page * s.scale_page_stride + head * s.scale_head_stride +
                        group * 2 * p.head_dim + d;
    const uint8_t* run = bytes + page * s.page_stride + head * s.head_stride + d * (p.page_size * bits / 8) +
                         group * (p.group * bits / 8);
    return decode_grid<double>(split_code(run, offset % p.group, p.group, bits), static_cast<double>(load(scale[0])),
                               static_cast<double>(load(scale[p.head_dim])));
  }
  const int64_t at = token_at(s, page, offset, head);
  if (p.scheme == kKVPlain) return value_at(s.data, p.dtype, at + d);
  const int64_t scale_of_group = scale_at(s, page, offset, head);
  if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
    const uint8_t code = bytes[at + d];
    const float scale = static_cast<const float*>(s.scale)[scale_of_group + (p.static_scale ? 0 : d / p.group)];
    return static_cast<double>(p.scheme == kKVFp8E4M3 ? decode_e4m3(code) : decode_e5m2(code)) *
           static_cast<double>(scale);
  }
  const Half* scale = static_cast<const Half*>(s.scale) + scale_of_group + 2 * (d / p.group);
  return decode_grid<double>(split_code(bytes + at, d, p.head_dim, bits), static_cast<double>(load(scale[0])),
                             static_cast<double>(load(scale[1])));
}

// Channel d of a token in the ring of a request.
FD_INLINE FD_HD double ring_value(const KVPages& p, bool is_key, int64_t row, int64_t position, int64_t head,
                                  int64_t d) {
  const KVStore& s = is_key ? p.k : p.v;
  return value_at(s.tail, p.tail_dtype, tail_at(s, row, position % p.tail_size, head) + d);
}

}  // namespace fastdecode::FD_ISA
