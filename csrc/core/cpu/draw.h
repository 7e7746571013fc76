// Drawing one id from a row: an exponential race on counter-based noise, or inverse CDF of a given uniform.
#pragma once

#include <cstdint>
#include <optional>

#include "core/cpu/law.h"
#include "core/draw.h"
#include "core/philox.h"
#include "core/race.h"

namespace fastdecode::FD_ISA {

namespace detail {

// Noise::group for eight counters, whose low halves are in `group`.
struct Noise8 {
  Words8 w[4];  // words 0 .. 3 of each counter, in the low halves
};
FD_INLINE Noise8 noise8(const Noise& n, const Words8& group) {
#if FD_CPU_LEVEL < 4  // too few and too narrow registers for eight counters at a time
  Noise8 noise;
  for (int64_t l = 0; l < 8; ++l) {
    const Words words = n.group(static_cast<uint32_t>(group[l]));
    for (int i = 0; i < 4; ++i) noise.w[i][l] = words.w[i];
  }
  return noise;
#else
  const Words8 m0 = Words8{} + 0xD2511F53u, m1 = Words8{} + 0xCD9E8D57u;
  Words8 c0 = group, c1 = Words8{} + n.stream_node, c2 = Words8{} + n.offset_lo, c3 = Words8{} + n.offset_hi;
  uint32_t k0 = n.seed_lo, k1 = n.seed_hi;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words8 a = multiply_low(c0, m0), b = multiply_low(c2, m1);
    c0 = b >> 32 ^ c1 ^ (Words8{} + k0);
    c2 = a >> 32 ^ c3 ^ (Words8{} + k1);
    c1 = b;
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
#endif
}

// The words of ids 4 * group .. 4 * group + 31, group a multiple of 8, as two runs of sixteen.
FD_INLINE void noise_of_ids(const Noise& n, uint32_t group, LaneBits<float> (&out)[2]) {
#if FD_CPU_LEVEL < 4
  uint32_t words[32];
  for (uint32_t j = 0; j < 8; ++j) {
    const Words four = n.group(group + j);
    for (int i = 0; i < 4; ++i) words[4 * j + i] = four.w[i];
  }
  std::memcpy(out, words, sizeof(words));
#else
  const Noise8 noise = noise8(n, Words8{0, 1, 2, 3, 4, 5, 6, 7} + group);
  const Words8 low = (noise.w[0] & 0xffffffffu) | noise.w[1] << 32;
  const Words8 high = (noise.w[2] & 0xffffffffu) | noise.w[3] << 32;
  out[0] = (LaneBits<float>)__builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
  out[1] = (LaneBits<float>)__builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

typedef int32_t LogBits __attribute__((vector_size(64)));

FD_INLINE Lanes<float> to_float(const Lanes<float>& x) { return x; }
FD_INLINE Lanes<float> to_float(const Lanes<double>& x) { return __builtin_convertvector(x, Lanes<float>); }

// Lowest index of the largest of n >= 1 numbers.
template <class C>
FD_ROW int64_t argmax(const C* x, int64_t n) {
  Lanes<C> top = Lanes<C>{} - kInf<C>;
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) top = larger<C>(load_lanes(x + i), top);
  C max = largest<C>(top);
  for (; i < n; ++i) max = x[i] > max ? x[i] : max;
  int64_t at = 0;
  while (at + kWide <= n && !any_bit(load_lanes(x + at) == max)) at += kWide;
  while (x[at] != max) ++at;
  return at;
}

}  // namespace detail

// argmax over all ids v < vocab_size of key(v) + gumbel(v); ids with key -inf never win, ties go to the lowest id.
// Every id's noise depends on its index alone, so any split of the row gives the same winner. `leader` has entered one
// id. may_win(v, word, reach), for sixteen ids from v on and their words as floats, is true at least where
// Leader::reach lets an id win; only there is the variate computed.
template <class C, class KeyOf, class MayWin>
int64_t race(int64_t vocab_size, const Noise& noise, Leader<C> leader, const KeyOf& key, const MayWin& may_win) {
  constexpr int64_t kStep = 64;
  auto enter = [&](int64_t v, uint32_t word) {
    const C k = key(v);
    if (k > -kInf<C>) leader.enter(v, k, word);
  };
  int64_t start = 0;
  for (; start + kStep <= vocab_size; start += kStep) {
    LaneBits<float> words[kStep / kWide];
    for (int64_t half = 0; half < 2; ++half) {
      LaneBits<float> two[2];
      detail::noise_of_ids(noise, static_cast<uint32_t>((start + 32 * half) / 4), two);
      words[2 * half] = two[0];
      words[2 * half + 1] = two[1];
    }
    LaneBits<float> may[kStep / kWide], any = {};
    for (int64_t j = 0; j < kStep / kWide; ++j) {
      const Lanes<float> word = __builtin_convertvector(words[j], Lanes<float>);
      may[j] = (LaneBits<float>)may_win(start + j * kWide, word, leader.reach);
      any |= may[j];
    }
    if (!any_bit(any)) continue;
    for (int64_t j = 0; j < kStep / kWide; ++j)
      for (int64_t l = 0; l < kWide; ++l)
        if (may[j][l]) enter(start + j * kWide + l, words[j][l]);
  }
  for (; start < vocab_size; ++start) enter(start, noise.word(start));
  return leader.winner;
}

// The same over listed ids, key(j) belonging to ids[j].
template <class C, class KeyOf>
int64_t race_listed(const uint32_t* ids, int64_t count, const Noise& noise, const KeyOf& key) {
  Leader<C> leader;
  for (int64_t start = 0; start < count; start += 8) {
    const int64_t n = std::min<int64_t>(8, count - start);
    Words8 group = {};
    for (int64_t l = 0; l < n; ++l) group[l] = ids[start + l] >> 2;
    const detail::Noise8 words = detail::noise8(noise, group);
    for (int64_t l = 0; l < n; ++l) {
      const uint32_t id = ids[start + l];
      const C k = key(start + l);
      if (k > -kInf<C>) leader.enter(id, k, static_cast<uint32_t>(words.w[id & 3][l]));
    }
  }
  return leader.winner;
}

// First id, in id order, whose cumulative weight exceeds uniform * sum; `sum` is that of the weights and positive.
// Where rounding leaves the walk short of that, the last id with weight; a uniform below 0 or NaN counts as 0.
template <class C>
FD_ROW int64_t inverse_cdf(const Weights<C>& w, double sum, double uniform) {
  const double wanted = uniform > 0 ? uniform * sum : 0;
  double before = 0;
  int64_t found = -1, end = w.count;
  const C* weight = w.weight;
  for_each_tile<C>(
      w.ids, w.count, [weight](auto wide, int64_t j) { return take(wide, weight + j); },
      [&](int64_t first, int64_t last, double tile) {
        if (before + tile <= wanted) return before += tile, false;
        for (int64_t j = first; j < last && found < 0; ++j) {
          before += static_cast<double>(weight[j]);
          if (weight[j] > C(0) && before > wanted) found = j;
        }
        end = last;
        return true;
      });
  if (found < 0) {
    while (end > 0 && !(weight[end - 1] > C(0))) --end;
    found = end - 1;
  }
  return w.id(found);
}

// One id of a law: what `sample` does, and the coupled rule and the bonus token after it. By inverse CDF where
// `uniform` is given, else by a race on `noise`.
template <class E, class C = Compute<E>>
FD_ROW int64_t draw(Law<E>& law, std::optional<double> uniform, const Noise& noise) {
  if (law.count() == 1) return law.weights().id(0);
  if (uniform) {
    law.store_weights();
    return inverse_cdf(law.weights(), law.sum(), *uniform);
  }
  const C* distance = law.s.distance;
  if (!law.dense()) return race_listed<C>(law.s.ids, law.count(), noise, [=](int64_t j) { return -distance[j]; });
  // the most likely id first: what it draws rules out most others
  Leader<C> leader;
  const int64_t top = law.mode();
  leader.enter(top, C(0), noise.word(top));
  return race<C>(
      law.V, noise, leader, [&](int64_t v) { return -law.distance(v); },
      [&](int64_t v, const Lanes<float>& word, float reach) {
        const auto d = detail::to_float(law.distance(std::true_type{}, v));
        const auto log2_word = __builtin_convertvector((detail::LogBits)word, Lanes<float>) * 0x1p-23f;
        return log2_word + d * kLog2E < reach + (127 + 32);
      });
}

// One id of weights that need not add up to 1; `sum`, their sum, is positive.
template <class C>
FD_ROW int64_t draw(const Weights<C>& w, double sum, std::optional<double> uniform, const Noise& noise) {
  if (uniform) return inverse_cdf(w, sum, *uniform);
  const C* weight = w.weight;
  auto key = [weight](int64_t j) { return log_(weight[j]); };
  if (w.ids) return race_listed<C>(w.ids, w.count, noise, key);
  // the largest first: what it draws rules out most others
  const int64_t top = detail::argmax(weight, w.count);
  Leader<C> leader;
  leader.enter(top, key(top), noise.word(top));
  // float has less range than double: relative to the largest, no weight that could win underflows
  const auto at_top = static_cast<float>(key(top)) * kLog2E;
  const C scale = C(1) / weight[top];
  return race<C>(w.count, noise, leader, key, [=](int64_t v, const Lanes<float>& word, float reach) {
    const auto relative = (detail::LogBits)detail::to_float(load_lanes(weight + v) * scale);
    const float most = std::min(reach + at_top + (32 + kMostBelow), 250.0f);
    return (detail::LogBits)word - relative < static_cast<int32_t>(most * 0x1p23f);
  });
}

}  // namespace fastdecode::FD_ISA
