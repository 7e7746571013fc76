// Drawing from a row that row_law has processed: what `sample` does, and the coupled rule and the bonus token after it.
#pragma once

#include <optional>

#include "core/draw.h"
#include "core/filter.h"

namespace fastdecode::FD_ISA {

// By inverse CDF where `uniform` is given, else by a race on `noise`.
template <class C>
int64_t draw_from_law(const RowLaw<C>& law, const RowScratch<C>& s, int64_t vocab_size, std::optional<double> uniform,
                      const Noise& noise) {
  if (uniform) return inverse_cdf(s.weight, vocab_size, law.sum, *uniform);
  const C* distance = s.distance;
  return race<C>(vocab_size, law.num_kept, noise, [distance](int64_t v) { return -distance[v]; });
}

}  // namespace fastdecode::FD_ISA
