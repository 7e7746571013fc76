// Cached keys and values of a token of a sequence as numbers, wherever they lie.
#pragma once

#include "attention/sequence.h"
#include "core/cpu/kv_rows.h"

namespace fastdecode::FD_ISA {

template <class C>
void load_plain(DType dtype, const void* from, int64_t n, C* to) {
  dispatch_logits(dtype, [&](auto tag) { load_row(static_cast<const typename decltype(tag)::type*>(from), n, to); });
}

template <class C>
void load_token(const AttendArgs& a, bool is_key, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  const KVPages& p = a.pages;
  if (ring) return read_ring_row(p, is_key, s.index, position, head, to);
  read_page_row(p, is_key, s.table[position / p.page_size], position % p.page_size, head, to);
}

// Keys of a tile that are coded per channel, as to [head_dim, kKeys]; `any` says which are seen, the others become 0.
template <class C>
FD_ROW void load_channel_coded(const AttendArgs& a, const Sequence& s, int64_t first, uint64_t any, int64_t head,
                               C* to) {
  const KVPages& p = a.pages;
  const int bits = code_bits(p.scheme);
  const int64_t bytes = p.group * bits / 8, width = p.page_size * bits / 8;
  const uint32_t mask = (1u << bits) - 1;
  C scale[2 * kMaxHeadDim];  // steps, then offsets
  for (int64_t key = 0, count; key < kKeys; key += count) {
    const int64_t position = first + key, offset = position % p.page_size;
    const int64_t group = offset / p.group, at = offset % p.group;
    count = std::min(p.group - at, kKeys - key);
    if (!(any & bits_between(key, key + count))) {
      for (int64_t d = 0; d < p.head_dim; ++d)
        for (int64_t i = 0; i < count; ++i) to[d * kKeys + key + i] = 0;
      continue;
    }
    const int64_t page = s.table[position / p.page_size];
    const uint8_t* code = static_cast<const uint8_t*>(p.k.data) + token_at(p.k, page, 0, head) + group * bytes;
    load_row(static_cast<const Half*>(p.k.scale) + scale_at(p.k, page, 0, head) + group * 2 * p.head_dim,
             2 * p.head_dim, scale);
    for (int64_t d = 0; d < p.head_dim; ++d, code += width) {
      const C step = scale[d], low = scale[p.head_dim + d];
      C* row = to + d * kKeys + key;
      for (int64_t from = at, end; from < at + count; from = end) {  // codes of one place in the bytes
        const int64_t part = from / bytes;
        end = std::min((part + 1) * bytes, at + count);
        const uint8_t* run = code + from % bytes;
        C* here = row + from - at;
        for (int64_t i = 0; i < end - from; ++i)
          here[i] = static_cast<C>(static_cast<int32_t>(uint32_t{run[i]} >> bits * part & mask)) * step + low;
      }
    }
    for (int64_t i = key; i < key + count; ++i)
      if (!(any >> i & 1))
        for (int64_t d = 0; d < p.head_dim; ++d) to[d * kKeys + i] = 0;
  }
}

}  // namespace fastdecode::FD_ISA
