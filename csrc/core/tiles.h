// Sums over a row in one fixed order, whatever the machine: tiles of 2048 elements; in a tile 256 lanes, lane l adding
// elements l, l + 256, ... in order; the lanes joined by a balanced binary tree over neighbours; tiles added in double,
// first to last. A warp can own a tile with 8 neighbouring lanes per thread.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu_level.h"

namespace fastdecode::FD_ISA {

inline constexpr int64_t kTile = 2048;
inline constexpr int64_t kLanes = 256;

// Sum of one tile, n <= kTile elements.
template <class C>
C tile_sum(const C* x, int64_t n) {
  alignas(64) C lane[kLanes];
  const int64_t first = std::min(n, kLanes);
  for (int64_t l = 0; l < first; ++l) lane[l] = x[l];
  for (int64_t l = first; l < kLanes; ++l) lane[l] = C(0);
  int64_t i = kLanes;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += x[i + l];
  for (int64_t l = 0; i + l < n; ++l) lane[l] += x[i + l];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lane[l] = lane[2 * l] + lane[2 * l + 1];
  return lane[0];
}

template <class C>
double row_sum(const C* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kTile) sum += static_cast<double>(tile_sum(x + i, std::min(kTile, n - i)));
  return sum;
}

}  // namespace fastdecode::FD_ISA
