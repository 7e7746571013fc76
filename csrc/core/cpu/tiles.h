// Sums over a row in one fixed order, whatever the machine: tiles of 2048 elements; in a tile 256 lanes, lane l adding
// elements l, l + 256, ... in order; the lanes joined by a balanced binary tree over neighbours; tiles added in double,
// first to last. A warp can own a tile with 8 neighbouring lanes per thread. Elements that are zero change nothing, so
// a row of which few ids have weight may be summed from those alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/vector.h"

namespace fastdecode::FD_ISA {

inline constexpr int64_t kTile = 2048;
inline constexpr int64_t kLanes = 256;

// The tree over kLanes lanes.
template <class C>
C join_lanes(const C* lane) {
  constexpr int64_t kVectors = kLanes / kWide;
  Lanes<C> v[kVectors];
  for (int64_t j = 0; j < kVectors; ++j) v[j] = load_lanes(lane + j * kWide);
  for (int64_t width = kVectors / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) v[j] = add_neighbours<C>(v[2 * j], v[2 * j + 1]);
  for (int step = 0; step < 4; ++step) v[0] = add_neighbours<C>(v[0], v[0]);
  return v[0][0];
}

// Sum over i < n <= kTile of value(i), which is called once per i and may store what it computes.
template <class C, class ValueOf>
C tile_sum(int64_t n, const ValueOf& value) {
  alignas(64) C lane[kLanes];
  if (n < kLanes) {
    for (int64_t l = 0; l < n; ++l) lane[l] = value(l);
    for (int64_t l = n; l < kLanes; ++l) lane[l] = C(0);
    return join_lanes(lane);
  }
  for (int64_t l = 0; l < kLanes; ++l) lane[l] = value(l);
  int64_t i = kLanes;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += value(i + l);
  for (int64_t l = 0; i + l < n; ++l) lane[l] += value(i + l);
  return join_lanes(lane);
}

// Two sums over the same elements: pair(i, a, b) gives both terms.
template <class C, class PairOf>
void tile_sums(int64_t n, const PairOf& pair, C& sum, C& other) {
  alignas(64) C lane[kLanes], lane2[kLanes];
  const int64_t first = std::min(n, kLanes);
  for (int64_t l = 0; l < first; ++l) pair(l, lane[l], lane2[l]);
  for (int64_t l = first; l < kLanes; ++l) lane[l] = lane2[l] = C(0);
  int64_t i = kLanes;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      C a, b;
      pair(i + l, a, b);
      lane[l] += a;
      lane2[l] += b;
    }
  }
  for (int64_t l = 0; i + l < n; ++l) {
    C a, b;
    pair(i + l, a, b);
    lane[l] += a;
    lane2[l] += b;
  }
  sum = join_lanes(lane);
  other = join_lanes(lane2);
}

}  // namespace fastdecode::FD_ISA
