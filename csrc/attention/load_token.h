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

template <class C>
void load_key(const AttendArgs& a, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  load_token(a, true, s, ring, position, head, to);
}

template <class C>
void load_value(const AttendArgs& a, const Sequence& s, bool ring, int64_t position, int64_t head, C* to) {
  load_token(a, false, s, ring, position, head, to);
}

}  // namespace fastdecode::FD_ISA
