// Cached keys and values of a token as numbers, wherever they lie.
#pragma once

#include "attention/sequence.h"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {

template <class C, class T>
FD_INLINE void load_run(const T* from, int64_t n, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <class C>
void load_plain(DType dtype, const void* from, int64_t n, C* to) {
  dispatch_logits(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<C, double> || !std::is_same_v<T, double>) {
      load_run(static_cast<const T*>(from), n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(static_cast<const T*>(from)[i]);
    }
  });
}

// Channels of one head of one token, coded per token.
template <class C>
void load_coded(const KVPages& p, const std::byte* data, const std::byte* scale, C* to) {
  const auto* code = reinterpret_cast<const uint8_t*>(data);
  if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
    const auto* scales = reinterpret_cast<const float*>(scale);
    for (int64_t d = 0; d < p.head_dim; ++d)
      to[d] = static_cast<C>(p.scheme == kKVFp8E4M3 ? decode_e4m3(code[d]) : decode_e5m2(code[d])) *
              scales[p.static_scale ? 0 : d / p.group];
    return;
  }
  const auto* steps = reinterpret_cast<const Half*>(scale);
  const int64_t bits = code_bits(p.scheme), bytes = p.head_dim * bits / 8;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    const int64_t g = d / p.group;
    const int n = code[d % bytes] >> bits * (d / bytes) & ((1 << bits) - 1);
    to[d] = static_cast<C>(n) * static_cast<C>(load(steps[2 * g])) + static_cast<C>(load(steps[2 * g + 1]));
  }
}

// Where keys or values of a token lie in its page.
struct Spot {
  const std::byte *data, *scale;
};

int64_t data_size(const KVPages& p) { return p.scheme == kKVPlain ? element_size(p.dtype) : 1; }
int64_t scale_size(const KVPages& p) { return p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2 ? 4 : 2; }

Spot spot_in_page(const KVPages& p, const KVStore& s, int64_t page, int64_t offset, int64_t head) {
  const auto* data = static_cast<const std::byte*>(s.data);
  const auto* scale = static_cast<const std::byte*>(s.scale);
  return {data + (page * s.page_stride + offset * s.token_stride + head * s.head_stride) * data_size(p),
          scale ? scale + (page * s.scale_page_stride + offset * s.scale_token_stride + head * s.scale_head_stride) *
                              scale_size(p)
                : nullptr};
}

// Channels of a token's key that is coded per channel.
template <class C>
void load_channel_coded(const KVPages& p, int64_t page, int64_t offset, int64_t head, C* to) {
  const int64_t bits = code_bits(p.scheme), bytes = p.group * bits / 8, width = p.page_size * bits / 8;
  const int64_t group = offset / p.group, at = offset % p.group;
  const auto* code = static_cast<const uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride +
                     group * bytes + at % bytes;
  const auto* step = static_cast<const Half*>(p.k.scale) + page * p.k.scale_page_stride + head * p.k.scale_head_stride +
                     group * 2 * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d) {
    const int n = code[d * width] >> bits * (at / bytes) & ((1 << bits) - 1);
    to[d] = static_cast<C>(n) * static_cast<C>(load(step[d])) + static_cast<C>(load(step[p.head_dim + d]));
  }
}

template <class C>
void load_key(const AttendArgs& a, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  const KVPages& p = a.pages;
  if (ring) {
    const int64_t at =
        s.index * p.k.tail_batch_stride + position % p.tail_size * p.k.tail_token_stride + head * p.k.tail_head_stride;
    return load_plain(p.tail_dtype, static_cast<const std::byte*>(p.k.tail) + at * element_size(p.tail_dtype),
                      p.head_dim, to);
  }
  const int64_t page = s.table[position / p.page_size], offset = position % p.page_size;
  if (is_kivi(p.scheme)) return load_channel_coded(p, page, offset, head, to);
  const Spot spot = spot_in_page(p, p.k, page, offset, head);
  if (p.scheme == kKVPlain) return load_plain(p.dtype, spot.data, p.head_dim, to);
  load_coded(p, spot.data, spot.scale, to);
}

template <class C>
void load_value(const AttendArgs& a, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  const KVPages& p = a.pages;
  if (ring) {
    const int64_t at =
        s.index * p.v.tail_batch_stride + position % p.tail_size * p.v.tail_token_stride + head * p.v.tail_head_stride;
    return load_plain(p.tail_dtype, static_cast<const std::byte*>(p.v.tail) + at * element_size(p.tail_dtype),
                      p.head_dim, to);
  }
  const Spot spot = spot_in_page(p, p.v, s.table[position / p.page_size], position % p.page_size, head);
  if (p.scheme == kKVPlain) return load_plain(p.dtype, spot.data, p.head_dim, to);
  load_coded(p, spot.data, spot.scale, to);
}

}  // namespace fastdecode::FD_ISA
