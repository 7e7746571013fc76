// What the ops on whole requests check of the lengths and pages that they are given on the device.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/kv.h"
#include "kvquant/kv_flush.h"
#include "kvquant/kv_keep.h"

namespace fastdecode::FD_ISA {

// Whether pages first .. last of a request's table lie in the cache.
FD_INLINE FD_HD bool pages_exist(const int32_t* table, int64_t first, int64_t last, int64_t num_pages) {
  bool all = true;
  for (int64_t i = first; i <= last; ++i) all &= table[i] >= 0 && table[i] < num_pages;
  return all;
}

// Of a request with kv_len tokens, the newest tail_len in its ring and all others in pages.
FD_INLINE FD_HD int32_t read_status(const KVPages& p, const int32_t* table, int64_t max_pages, int64_t kv_len,
                                    int64_t tail_len, int64_t length) {
  if (kv_len < 0 || kv_len > length || tail_len < 0 || tail_len > kv_len || tail_len > p.tail_size)
    return kStatusBadLength;
  const int64_t coded = kv_len - tail_len, pages = (coded + p.page_size - 1) / p.page_size;
  if (pages > max_pages) return kStatusBadLength;
  return pages_exist(table, 0, pages - 1, p.num_pages) ? 0 : kStatusBadPage;
}

FD_INLINE FD_HD int32_t flush_status(const KVFlushArgs& a, int64_t b) {
  const KVPages& p = a.pages;
  const int64_t begin = a.begin[b], end = a.end[b];
  if (end <= begin) return 0;
  if (begin < 0 || begin % p.group || end % p.group || end - begin > p.tail_size || end > a.max_pages * p.page_size)
    return kStatusBadLength;
  const int32_t* table = a.page_table + b * a.page_table_stride;
  return pages_exist(table, begin / p.page_size, (end - 1) / p.page_size, p.num_pages) ? 0 : kStatusBadPage;
}

FD_INLINE FD_HD int32_t keep_status(const KVKeepArgs& a, int64_t b) {
  const KVPages& p = a.pages;
  const int64_t num_keep = a.num_keep[b], base = a.base_lens[b];
  if (num_keep < 0 || num_keep > a.max_keep || base < 0) return kStatusBadLength;
  const int64_t room =
      is_kivi(p.scheme) ? p.tail_size : a.max_pages * p.page_size - base;  // a ring holds the last ones
  const int32_t* path = a.path + b * a.path_stride;
  for (int64_t i = 0, before = -1; i < num_keep; before = path[i++])
    if (path[i] <= before || path[i] >= room) return kStatusBadLength;
  if (is_kivi(p.scheme)) return 0;
  const int32_t* table = a.page_table + b * a.page_table_stride;
  for (int64_t i = 0; i < num_keep; ++i) {
    const int64_t from = (base + path[i]) / p.page_size, to = (base + i) / p.page_size;
    if (path[i] != i && !(pages_exist(table, from, from, p.num_pages) && pages_exist(table, to, to, p.num_pages)))
      return kStatusBadPage;
  }
  return 0;
}

}  // namespace fastdecode::FD_ISA
