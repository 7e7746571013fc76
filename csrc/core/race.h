// What decides the exponential race on every backend: the id with the largest key plus Gumbel variate, ties by id.
#pragma once

#include <cstdint>

#include "core/fmath.h"
#include "core/philox.h"

namespace fastdecode::FD_ISA {

inline constexpr float kLog2E = 0x1.715476p0f;

// The bits of a positive float, read as a number and times 2^-23, are its log2 plus 127 with straight lines between the
// powers of two: at most 0.0861 too low. So logarithms can be bounded, and compared, without computing them.
inline constexpr float kMostBelow = 0.0862f;

// The leader of a race. Ids enter in any order; a tie goes to the lowest.
template <class C>
struct Leader {
  C best = -kInf<C>;
  int64_t winner = -1;
  // An id can only win if log2(v) - log2(its weight) stays below this, v its word times 2^-32: its Gumbel variate
  // -log(-log(1 - v)) is at most -log(v). A little more, for the roundings.
  float reach = kInf<float>;

  FD_HD void enter(int64_t v, C key, uint32_t word) { enter_total(v, key + static_cast<C>(gumbel(word))); }

  FD_HD void enter_total(int64_t v, C total) {
    if (total > best || (total == best && v < winner)) {
      best = total;
      winner = v;
      reach = 0.02f - static_cast<float>(best) * kLog2E;
    }
  }
};

}  // namespace fastdecode::FD_ISA
