// What both backends compute the same way, number by number, in the law of core/filter.h. Every logit is measured from
// the largest: distance = (max - logit) / temperature is exact at the top, never overflows at small temperatures, and
// its bits sort; weight = e^-distance.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/filter.h"
#include "core/fmath.h"

namespace fastdecode::FD_ISA {

// A distance limit that leaves out only forbidden ids, also those whose distance is beyond any number.
template <class C>
inline constexpr C kEverywhere = std::numeric_limits<C>::max();

FD_HD inline bool is_greedy(const RowFilter& f) { return !(f.temperature > 0.0f); }

template <class C>
FD_HD C inverse_temperature(const RowFilter& f) {
  // neither an infinite temperature nor an infinite inverse may meet a distance of inf or 0
  constexpr float kMost = std::numeric_limits<float>::max();
  if (is_greedy(f)) return C(1);
  const C inverse = C(1) / static_cast<C>(f.temperature < kMost ? f.temperature : kMost);
  return inverse < static_cast<C>(kMost) ? inverse : static_cast<C>(kMost);
}

// How much of `mass` a top-p or typical-p of `part` asks for: at least the first id, at most everything.
FD_HD inline uint64_t share_of(float part, uint64_t mass) {
  const double wanted = static_cast<double>(part > 0.0f ? part : 0.0f) * static_cast<double>(mass);
  auto target = static_cast<uint64_t>(wanted);
  if (static_cast<double>(target) < wanted) ++target;
  return target < 1 ? 1 : target > mass ? mass : target;
}

// Distances to look within for a nucleus, in turn: i = 0, 1, .. until kEverywhere.
template <class C>
FD_HD C nucleus_limit(int i) {
  switch (i) {  // an array would stand in local memory on a GPU
    case 0: return C(4);
    case 1: return C(6);
    case 2: return C(8);
    case 3: return C(11);
    case 4: return C(15);
    case 5: return C(21);
    default: return kEverywhere<C>;
  }
}

// A distance that holds every id of weight `least` or more: a little beyond -log(least), so that rounding loses none.
template <class C>
FD_HD C limit_of_weight(C least) {
  return -log_(least) * C(1.001) + C(0.001);
}

// distance * weight, 0 where the weight is 0 for the distance, which may then be inf.
FD_INLINE FD_HD float moment_of(float d, float weight) { return d <= kFarthest<float> ? d * weight : 0.0f; }
FD_INLINE FD_HD double moment_of(double d, double weight) { return d <= kFarthest<double> ? d * weight : 0.0; }

template <class C>
using Key = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;

// Distances are >= +0, so their bit patterns order like the numbers.
template <class C>
FD_HD Key<C> rising_key(C distance) {
  return bit_cast<Key<C>>(distance);
}

// Larger numbers first; -0 is +0.
template <class C>
FD_HD Key<C> falling_key(C x) {
  const Key<C> bits = bit_cast<Key<C>>(x + C(0));
  constexpr Key<C> kSign = Key<C>{1} << (8 * sizeof(C) - 1);
  return bits & kSign ? bits : ~bits & (kSign - 1);
}

inline constexpr int kDigit = 11;  // most bits of a radix digit

// By the first digit of a distance, for counting blocks; and the largest distance of the digits below `end`.
template <class C>
FD_HD Key<C> first_digit(C distance) {
  return rising_key(distance) >> (8 * sizeof(C) - 1 - kDigit);  // the sign bit is 0
}
template <class C>
FD_HD C limit_of_digits(Key<C> end) {
  const C limit = bit_cast<C>(static_cast<Key<C>>((end << (8 * sizeof(C) - 1 - kDigit)) - 1));
  return limit < kEverywhere<C> ? limit : kEverywhere<C>;
}

}  // namespace fastdecode::FD_ISA
