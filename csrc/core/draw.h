// Drawing one id from a row of weights: an exponential race on counter-based noise, or inverse CDF of a given uniform.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/philox.h"
#include "core/tiles.h"

namespace fastdecode {

// Where a request's randomness comes from: explicit uniforms, or seed and offset.
struct RandomArgs {
  const double* uniforms = nullptr;  // [batch, ...]; excludes seed
  const int64_t* seed = nullptr;     // [batch]
  const int64_t* offset = nullptr;   // [batch]: absolute position of the token that row 0 predicts
  int64_t uniform_stride = 0;        // elements between requests
};

}  // namespace fastdecode

namespace fastdecode::FD_ISA {

// argmax over v of key(v) + gumbel(v); ids with key -inf never win, ties go to the lowest id. -1 if no id can win.
// Every id's noise depends on its index alone, so any split of the row gives the same winner.
template <class C, class KeyOf>
int64_t race(int64_t vocab_size, int64_t num_kept, const Noise& noise, const KeyOf& key) {
  C best = -kInf<C>;
  int64_t winner = -1;
  auto enter = [&](int64_t v, float g) {
    const C total = key(v) + static_cast<C>(g);
    if (total > best) best = total, winner = v;
  };
  if (num_kept < vocab_size / 16) {  // few runners: noise for them alone
    for (int64_t v = 0; v < vocab_size; ++v)
      if (key(v) > -kInf<C>) enter(v, gumbel(noise.word(v)));
    return winner;
  }
  constexpr int64_t kGroups = 16;
  for (int64_t first = 0; first < vocab_size; first += 4 * kGroups) {
    float g[4][kGroups];
    for (int64_t j = 0; j < kGroups; ++j) {
      const Words words = noise.group(static_cast<uint32_t>(first / 4 + j));
      for (int i = 0; i < 4; ++i) g[i][j] = gumbel(words.w[i]);
    }
    const int64_t last = std::min(vocab_size, first + 4 * kGroups);
    for (int64_t v = first; v < last; ++v) enter(v, g[v & 3][(v - first) >> 2]);
  }
  return winner;
}

// First id, in id order, whose cumulative weight exceeds uniform * sum; `sum` is row_sum of the weights and positive.
// Where rounding leaves the walk short of that, the last id with weight.
template <class C>
int64_t inverse_cdf(const C* weight, int64_t vocab_size, double sum, double uniform) {
  const double wanted = uniform * sum;
  double before = 0;
  int64_t end = vocab_size;
  for (int64_t start = 0; start < vocab_size; start += kTile) {
    const int64_t n = std::min(kTile, vocab_size - start);
    const double after = before + static_cast<double>(tile_sum(weight + start, n));
    if (after > wanted) {
      for (int64_t v = start; v < start + n; ++v) {
        before += static_cast<double>(weight[v]);
        if (weight[v] > C(0) && before > wanted) return v;
      }
      end = start + n;
      break;
    }
    before = after;
  }
  while (end > 0 && !(weight[end - 1] > C(0))) --end;
  return end - 1;
}

}  // namespace fastdecode::FD_ISA
