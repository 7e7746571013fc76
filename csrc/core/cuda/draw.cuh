// Drawing one id from a row by a block of kThreads: an exponential race on counter-based noise, or inverse CDF of a
// given uniform. The same ids as core/cpu/draw.h.
#pragma once

#include "core/cuda/law.cuh"
#include "core/draw.h"
#include "core/philox.h"
#include "core/race.h"

namespace fastdecode::FD_ISA {

// One request's randomness: its uniform where uniforms are given, else its noise.
struct Draw {
  bool has_uniform;
  double uniform;
  Noise noise;
};

// The best of all threads' leaders.
template <class C>
__device__ inline Leader<C> join_leaders(BlockSlots& slots, const Leader<C>& mine) {
  Leader<C> leader;
  leader.best = block_reduce(slots, mine.best, Larger{});
  constexpr int64_t kNobody = int64_t{1} << 40;
  const bool leads = mine.winner >= 0 && mine.best == leader.best;
  leader.winner = block_reduce(slots, leads ? mine.winner : kNobody, Smaller{});
  if (leader.winner == kNobody) leader.winner = -1;
  return leader;
}

// The leader of one part of a race that is cut over blocks; winner -1 where no id of the part can win.
struct RacePart {
  double best;
  int64_t winner;
  bool bad;  // a number of the part is none
};

// The winner of all parts, -1 where there is none; by a block. `bad` is set where one of the parts is.
__device__ inline int64_t join_parts(BlockSlots& slots, const RacePart* part, int parts, bool& bad) {
  Leader<double> leader;
  int any_bad = 0;
  for (int p = static_cast<int>(threadIdx.x); p < parts; p += kThreads) {
    any_bad |= part[p].bad;
    if (part[p].winner >= 0) leader.enter_total(part[p].winner, part[p].best);
  }
  bad = __syncthreads_or(any_bad) != 0;
  return join_leaders(slots, leader).winner;
}

// log2 of a word times 2^-32, plus 127 and 32: a lower bound.
__device__ inline float log2_of_word(uint32_t word) {
  return static_cast<float>(bit_cast<int32_t>(static_cast<float>(word))) * 0x1p-23f;
}

inline constexpr int kGroup = 4;  // ids whose words come from one counter

// Race over a law's ids of a span of whole tiles, on the keys -distance. Each thread's own leader.
template <class E, class C = Compute<E>>
__device__ inline Leader<C> race(const Law<E>& law, const Noise& noise, const Span& span) {
  Leader<C> leader;
  if (!law.dense()) {
    law.for_kept([&](int v) {
      if (v >= span.begin && v < span.end) leader.enter(v, -law.distance_of(law.logit(v)), noise.word(v));
    });
    return leader;
  }
  // the most likely id first: what it draws rules out most others
  const int top = law.argmax();
  leader.enter(top, C(0), noise.word(top));
  constexpr int kAtOnce = 2, kStep = kThreads * kGroup;  // loads side by side
  static_assert(kTile % (kAtOnce * kStep) == 0);
  for (int first = span.begin + static_cast<int>(threadIdx.x) * kGroup; first < span.end; first += kAtOnce * kStep) {
    C distance[kAtOnce][kGroup];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) law.distances(first + i * kStep, distance[i]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int v = first + i * kStep;
      const Words words = noise.group(static_cast<uint32_t>(v) / kGroup);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const C d = distance[i][j];
        const bool may_win = log2_of_word(words.w[j]) + static_cast<float>(d) * kLog2E < leader.reach + (127 + 32);
        if (d < kInf<C> && may_win) leader.enter(v + j, -d, words.w[j]);
      }
    }
  }
  return leader;
}

// The same over weights that need not add up to 1, on the keys log(weight); value as in sum_part.
template <class C, class ValueOf>
__device__ inline Leader<C> race_weights(const ValueOf& value, const Noise& noise, const Span& span) {
  Leader<C> leader;
  for (int v = span.begin + static_cast<int>(threadIdx.x) * kGroup; v < span.end; v += kThreads * kGroup) {
    C weight[kGroup];
    value(v, weight);
    bool any = false;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) any |= weight[j] > C(0);
    if (!any) continue;
    const Words words = noise.group(static_cast<uint32_t>(v) / kGroup);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (!(weight[j] > C(0))) continue;
      const auto narrow = static_cast<float>(weight[j]);
      const float log2_weight = static_cast<float>(bit_cast<int32_t>(narrow)) * 0x1p-23f + kMostBelow;
      // below the normal floats the bits say nothing of the logarithm
      const bool may_win = !(narrow >= 0x1p-126f) || log2_of_word(words.w[j]) - log2_weight < leader.reach + 32;
      if (may_win) leader.enter(v + j, log_(weight[j]), words.w[j]);
    }
  }
  return leader;
}

// First id, in id order, whose cumulative weight exceeds uniform * sum; `sum` is that of the weights and positive, and
// tile_sums what it was added up from. Where rounding leaves the walk short of that, the last id with weight; a uniform
// below 0 or NaN counts as 0.
template <class C, class ValueOf>
__device__ inline int inverse_cdf(LawShared<C>& s, int vocab_size, const double* tile_sums, double sum, double uniform,
                                  const ValueOf& value) {
  const double wanted = uniform > 0 ? uniform * sum : 0;
  const auto tiles = static_cast<int>(num_tiles(vocab_size));
  double before = 0;
  bool reached = false;
  int tile = 0;
  if (threadIdx.x == 0) {
    int last = 0;  // tile with weight
    for (; tile < tiles; ++tile) {
      if (tile_sums[tile] > 0) last = tile;
      if (before + tile_sums[tile] > wanted) break;
      before += tile_sums[tile];
    }
    reached = tile < tiles;
    if (!reached) tile = last;
  }
  tile = block_broadcast(s.slots, threadIdx.x == 0, tile);
  const int start = tile * static_cast<int>(kTile);
  const int n = start + static_cast<int>(kTile) < vocab_size ? static_cast<int>(kTile) : vocab_size - start;
  for (int v = static_cast<int>(threadIdx.x) * kGroup; v < static_cast<int>(kTile); v += kThreads * kGroup) {
    C weight[kGroup];
    value(start + v, weight);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) s.weight[v + j] = weight[j];
  }
  __syncthreads();  // the tile's weights are there
  int found = -1;
  if (threadIdx.x == 0) {
    for (int j = 0; reached && j < n && found < 0; ++j) {
      before += static_cast<double>(s.weight[j]);
      if (s.weight[j] > C(0) && before > wanted) found = j;
    }
    for (int j = n - 1; j >= 0 && found < 0; --j)
      if (s.weight[j] > C(0)) found = j;
  }
  return start + block_broadcast(s.slots, threadIdx.x == 0, found);
}

// One id of a law: what `sample` does, and the coupled rule and the bonus token after it.
template <class E, class C = Compute<E>>
__device__ inline int draw(Law<E>& law, const Draw& d) {
  if (d.has_uniform) {
    law.normalise();
    return inverse_cdf(law.s, law.V, law.m.tile_sum, law.sum(), d.uniform, law.as_weights());
  }
  return static_cast<int>(join_leaders(law.s.slots, race(law, d.noise, {0, law.V})).winner);
}

}  // namespace fastdecode::FD_ISA
