// What penalize does to one logit, on every backend.
#pragma once

#include "core/fmath.h"
#include "sample/penalize.h"

namespace fastdecode::FD_ISA {

template <class C>
struct Penalties {
  C repetition, presence, frequency;

  FD_HD bool any() const { return repetition != C(1) || presence != C(0) || frequency != C(0); }  // NaN counts

  // count: how often the output holds the id; the text holds it at least once.
  FD_HD C apply(C x, int32_t count) const {
    if (x == -kInf<C>) return x;
    x = x > C(0) ? x / repetition : x * repetition;
    if (count == 0) return x;
    x = x - frequency * static_cast<C>(count);
    return x - presence;
  }
};

template <class C>
FD_HD Penalties<C> penalties_of(const PenalizeArgs& a, int64_t b) {
  Penalties<C> p{1, 0, 0};
  if (a.repetition && !(a.repetition[b] <= 0.0f)) p.repetition = static_cast<C>(a.repetition[b]);
  if (a.presence) p.presence = static_cast<C>(a.presence[b]);
  if (a.frequency) p.frequency = static_cast<C>(a.frequency[b]);
  return p;
}

}  // namespace fastdecode::FD_ISA
