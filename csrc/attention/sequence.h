// What each query of a sequence sees, and whether its lengths and pages can be.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>

#include "attention/attend.h"

namespace fastdecode::FD_ISA {

inline constexpr int64_t kKeys = 64;  // of a tile; tiles begin at its multiples

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bits low .. high - 1 of a word.
FD_INLINE uint64_t bits_between(int64_t low, int64_t high) {
  low = std::clamp<int64_t>(low, 0, kKeys);
  high = std::clamp<int64_t>(high, low, kKeys);
  const uint64_t below_high = high == kKeys ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  const uint64_t below_low = low == kKeys ? ~uint64_t{0} : (uint64_t{1} << low) - 1;
  return below_high & ~below_low;
}

struct Sequence {
  const int32_t* table;
  const std::byte* q;    // of its first node
  const uint32_t* tree;  // [num_nodes, words]; nullptr = chain
  const int32_t* coded;  // [num_nodes]; nullptr = `coded_end` for all
  int64_t index, first_row, num_nodes, length, words;
  int64_t base;                    // position of the first node: keys below it are seen by all, but for a window
  int64_t coded_begin, coded_end;  // keys below coded_begin lie in pages, from coded_end on in the ring, else in both
  int64_t window;
  bool causal;

  // Ancestors of a node.
  int64_t depth(int64_t node) const {
    if (!tree) return node;
    int64_t count = -int64_t(tree[node * words + node / 32] >> node % 32 & 1);
    for (int64_t n = 0; n < num_nodes; n += 32) {
      const uint32_t used = num_nodes - n >= 32 ? ~0u : (1u << (num_nodes - n)) - 1;
      count += std::popcount(tree[node * words + n / 32] & used);
    }
    return count;
  }

  // Bit i: whether the node sees key first + i.
  uint64_t seen(int64_t node, int64_t first) const {
    const int64_t depth_here = window ? depth(node) : 0;
    const int64_t low = window ? base + depth_here - window + 1 : 0;
    if (!tree) return bits_between(low - first, (causal ? base + node + 1 : length) - first);
    uint64_t bits = bits_between(low - first, base - first);
    for (int64_t n = std::max<int64_t>(0, first - base); n < num_nodes && base + n < first + kKeys; ++n) {
      const bool seen = tree[node * words + n / 32] >> n % 32 & 1;
      if (seen && (!window || depth_here - depth(n) < window)) bits |= uint64_t{1} << (base + n - first);
    }
    return bits;
  }
};

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t tail_of(const AttendArgs& a, int64_t b) { return a.tail_lens ? a.tail_lens[b] : 0; }

inline Sequence sequence_of(const AttendArgs& a, int64_t b) {
  Sequence s = {};
  s.index = b;
  s.table = a.page_table + b * a.page_table_stride;
  s.length = a.kv_lens[b];
  s.window = a.window;
  s.causal = a.causal;
  int64_t q_row;  // elements
  if (a.group_start) {
    s.first_row = a.group_start[b];
    s.num_nodes = a.group_start[b + 1] - s.first_row;
    q_row = s.first_row * a.q_slot_stride;
  } else {
    s.first_row = b * a.num_slots;
    s.num_nodes = a.num_queries ? a.num_queries[b] : a.num_slots;
    q_row = b * a.q_batch_stride;
  }
  s.q = static_cast<const std::byte*>(a.q) + q_row * element_size(a.dtype);
  s.base = s.length - s.num_nodes;
  s.coded_begin = s.coded_end = s.length - tail_of(a, b);
  if (a.coded_lens && s.num_nodes > 0 && s.num_nodes <= a.num_slots) {
    s.coded = a.coded_lens + b * a.num_slots;
    s.coded_begin = s.coded_end = s.coded[0];
    for (int64_t i = 1; i < s.num_nodes; ++i) {
      s.coded_begin = std::min<int64_t>(s.coded_begin, s.coded[i]);
      s.coded_end = std::max<int64_t>(s.coded_end, s.coded[i]);
    }
  }
  if (a.tree_mask) {
    s.words = ceil_div(a.num_slots, 32);
    s.tree = reinterpret_cast<const uint32_t*>(a.tree_mask) + b * a.num_slots * s.words;
  }
  return s;
}

inline int32_t check(const AttendArgs& a, int64_t b) {
  // Where starts do not rise, groups may share rows: none can be trusted.
  for (int64_t g = 0; a.group_start && g < a.batch; ++g)
    if (a.group_start[g + 1] < a.group_start[g]) return kStatusBadLength;
  const Sequence s = sequence_of(a, b);
  if (s.num_nodes < 0) return kStatusBadLength;
  if (a.group_start ? s.first_row < 0 || s.first_row + s.num_nodes > a.num_rows
                    : s.num_nodes > a.num_slots || s.num_nodes > s.length)
    return kStatusBadLength;
  const int64_t room = a.max_pages * a.pages.page_size, tail = tail_of(a, b);
  if (s.length < 0 || tail < 0 || tail > std::min(s.length, a.pages.tail_size)) return kStatusBadLength;
  if (s.coded_begin < s.length - tail || s.coded_end > std::min(s.length, room)) return kStatusBadLength;
  for (int64_t i = 0; i < ceil_div(s.coded_end, a.pages.page_size); ++i)
    if (s.table[i] < 0 || s.table[i] >= a.pages.num_pages) return kStatusBadPage;
  return 0;
}

}  // namespace fastdecode::FD_ISA
