// The listed ids of a law, most likely first.
#pragma once

#include <algorithm>

#include "core/cpu/law.h"

namespace fastdecode::FD_ISA {

// Indices into the law's list, by logit, then id. They stand in the scratch's members.
template <class E>
const uint32_t* nearest_first(const Law<E>& law) {
  uint32_t* order = law.s.members;
  for (int64_t j = 0; j < law.count(); ++j) order[j] = static_cast<uint32_t>(j);
  const uint32_t* ids = law.s.ids;
  std::sort(order, order + law.count(), [&law, ids](uint32_t i, uint32_t j) {
    const auto left = law.logit(ids[i]), right = law.logit(ids[j]);
    return left > right || (left == right && i < j);
  });
  return order;
}

}  // namespace fastdecode::FD_ISA
