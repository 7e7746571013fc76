// Sums over a row in the order of core/tiles.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cpu/vector.h"
#include "core/tiles.h"

namespace fastdecode::FD_ISA {

// body(std::true_type, i) for sixteen neighbours begin <= i .. i + 15 < end at a time, body(std::false_type, i) for
// each of the rest.
template <class Body>
FD_INLINE void for_lanes(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kWide <= end; i += kWide) body(std::true_type{}, i);
  for (; i < end; ++i) body(std::false_type{}, i);
}

// Where a tile's element goes: vector `at` of the lanes for sixteen neighbours, element `at` of them for one; `first`
// where nothing was added there before.
template <bool kIsWide, bool kIsFirst>
struct Place {
  static constexpr std::bool_constant<kIsWide> wide{};
  static constexpr std::bool_constant<kIsFirst> first{};
  int64_t at;
};

// Sum of one tile, filled by for_tile, or by add one by one in rising order from zero.
template <class C>
class TileSum {
 public:
  FD_INLINE TileSum() {
    for (Lanes<C>& lane : lane_) lane = Lanes<C>{};
  }
  // For for_tile, which gives every lane a first value where it has enough elements.
  FD_INLINE explicit TileSum(int64_t n) {
    if (n >= kLanes) return;
    for (Lanes<C>& lane : lane_) lane = Lanes<C>{};
  }

  FD_INLINE void add(int64_t i, C value) { element(i % kLanes) += value; }

  template <bool kIsFirst>
  FD_INLINE void add(const Place<true, kIsFirst>& place, const Lanes<C>& value) {
    lane_[place.at] = kIsFirst ? value : lane_[place.at] + value;
  }
  FD_INLINE void add(const Place<false, false>& place, C value) { element(place.at) += value; }

  // Adds distance * weight, rounded once, unless the weight is 0 for the distance, which may then be inf.
  template <bool kIsFirst>
  FD_INLINE void add_moment(const Place<true, kIsFirst>& place, const Lanes<C>& distance, const Lanes<C>& weight) {
    Lanes<C>& lane = lane_[place.at];
    const Lanes<C> before = kIsFirst ? Lanes<C>{} : lane;
    lane = distance <= kFarthest<C> ? Number<Lanes<C>>::fma(distance, weight, before) : before;
  }
  FD_INLINE void add_moment(const Place<false, false>& place, C distance, C weight) {
    C& lane = element(place.at);
    lane = distance <= kFarthest<C> ? fma_(distance, weight, lane) : lane;
  }

  // The tree over kLanes lanes.
  FD_INLINE C join() const {
    Lanes<C> v[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) v[j] = lane_[j];
#pragma GCC unroll 4
    for (int64_t width = kVectors / 2; width > 0; width /= 2)
#pragma GCC unroll 8
      for (int64_t j = 0; j < width; ++j) v[j] = add_neighbours<C>(v[2 * j], v[2 * j + 1]);
    for (int step = 0; step < 4; ++step) v[0] = add_neighbours<C>(v[0], v[0]);
    return v[0][0];
  }

 private:
  FD_INLINE C& element(int64_t i) { return reinterpret_cast<C*>(lane_)[i]; }

  static constexpr int64_t kVectors = kLanes / kWide;
  Lanes<C> lane_[kVectors];
};

// body(place, i) for all i < n <= kTile: for sixteen neighbours i .. i + 15 where place.wide, else for one. In rising
// order; or, for a tile that is in the cache already, lane by lane, so that sums stay in registers.
template <bool kCached = false, class Body>
FD_INLINE void for_tile(int64_t n, const Body& body) {
  constexpr int64_t kVectors = kLanes / kWide;
  int64_t i = 0;
  if (kCached && n == kTile) {
    for (int64_t at = 0; at < kVectors; ++at) {
      body(Place<true, true>{at}, at * kWide);
      for (i = kLanes; i < kTile; i += kLanes) body(Place<true, false>{at}, at * kWide + i);
    }
    return;
  }
  if (n >= kLanes) {
    for (; i < kLanes; i += kWide) body(Place<true, true>{i / kWide}, i);
    for (; i + kWide <= n; i += kWide) body(Place<true, false>{i / kWide % kVectors}, i);
  }
  for (; i < n; ++i) body(Place<false, false>{i % kLanes}, i);
}

}  // namespace fastdecode::FD_ISA
