// The one target law: logits -> bias, bans -> temperature -> top-k -> top-p -> min-p. Sampler, drafter and verifier all
// call row_law, so speculation cannot target another law than plain sampling. Each filter sees the renormalised
// result of the one before; the id that crosses top_p is kept; ties at a top-k or top-p threshold keep the lowest ids
// up to the count; min-p keeps all ties.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/dtype.h"
#include "core/enums.h"
#include "core/fmath.h"
#include "core/tiles.h"

namespace fastdecode {

// Per-request parameters as the caller passed them; nullptr = off.
struct FilterArgs {
  const float* temperature = nullptr;    // [batch]; <= 0 or NaN is greedy
  const int32_t* top_k = nullptr;        // [batch]; <= 0 or >= vocab_size: off
  const float* top_p = nullptr;          // [batch]; >= 1: off; <= 0 keeps the most likely id
  const float* min_p = nullptr;          // [batch]; <= 0: off
  const float* bias = nullptr;           // [batch, vocab_size], added to the logits; -inf forbids
  const int64_t* ban_ids = nullptr;      // [batch, num_bans], padded with -1
  const int64_t* min_lengths = nullptr;  // [batch, num_bans]: ban_ids[b, s] holds at positions < this; nullptr = always
  const int64_t* offset = nullptr;       // [batch]: absolute position of the token that row 0 predicts
  int64_t num_bans = 0;
  int64_t bias_stride = 0, ban_stride = 0, min_length_stride = 0;  // elements between requests
};

}  // namespace fastdecode

namespace fastdecode::FD_ISA {

// The parameters of one row.
struct RowFilter {
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;
  const float* bias = nullptr;
  const int64_t* ban_ids = nullptr;
  const int64_t* min_lengths = nullptr;
  int64_t num_bans = 0, position = 0;
};

// Row `row` of request b predicts the token at absolute position offset[b] + row.
inline RowFilter row_filter(const FilterArgs& f, int64_t b, int64_t row) {
  RowFilter r;
  if (f.temperature) r.temperature = f.temperature[b];
  if (f.top_k) r.top_k = f.top_k[b];
  if (f.top_p) r.top_p = f.top_p[b];
  if (f.min_p) r.min_p = f.min_p[b];
  if (f.bias) r.bias = f.bias + b * f.bias_stride;
  if (f.ban_ids) r.ban_ids = f.ban_ids + b * f.ban_stride, r.num_bans = f.num_bans;
  if (f.min_lengths) r.min_lengths = f.min_lengths + b * f.min_length_stride;
  if (f.offset) r.position = f.offset[b] + row;
  return r;
}

// Working memory for one row, cut from the adapter's buffer.
template <class C>
struct RowScratch {
  C* distance;        // [vocab_size], see row_law
  C* weight;          // [vocab_size]
  uint32_t* members;  // [vocab_size], ids during a radix selection
};

inline int64_t row_scratch_bytes(int64_t vocab_size, bool is_double) {
  const int64_t bytes = vocab_size * (2 * (is_double ? 8 : 4) + 4);
  return (bytes + 63) / 64 * 64;
}

template <class C>
RowScratch<C> row_scratch(void* buffer, int64_t vocab_size) {
  C* distance = static_cast<C*>(buffer);
  return {distance, distance + vocab_size, reinterpret_cast<uint32_t*>(distance + 2 * vocab_size)};
}

// What row_law found. With status 0: probability of id v = weight[v] * inverse_sum, distance[v] = -log of its weight.
template <class C>
struct RowLaw {
  int32_t status = 0;
  int64_t num_kept = 0;
  double sum = 0;  // of weight, in the order of tiles.h
  C inverse_sum = 0;
};

namespace detail {

template <class C>
using Key = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;

// Distances are >= +0, so their bit patterns order like the numbers.
template <class C>
Key<C> key_of(C distance) {
  return bit_cast<Key<C>>(distance);
}

// Probability mass as an integer, so that sums do not depend on their order: 40 bits below the largest id's 1.0.
template <class C>
uint64_t fixed_mass(C weight) {
  return static_cast<uint64_t>(static_cast<int64_t>(weight * C(0x1p40)));
}

// Keeps ids with key < threshold, and the first `ties` ids with key == threshold.
template <class C>
struct Cut {
  Key<C> threshold = 0;
  uint64_t ties = 0;
};

// Radix selection over keys, 11 bits at a time from the top: the smallest threshold such that the ids at or below it
// measure at least `target`. `members` holds `count` candidate ids in rising order and is overwritten; their measures
// must add up to at least `target` >= 1. Ids of one key must have one measure.
template <class C, class Measure>
Cut<C> radix_select(const C* distance, uint32_t* members, int64_t count, uint64_t target, const Measure& measure) {
  constexpr int kBits = 8 * sizeof(C) - 1;  // the sign bit is 0
  uint64_t bins[2048];
  uint64_t before = 0;
  for (int high = kBits; high > 0;) {
    const int shift = std::max(0, high - 11);
    const Key<C> mask = static_cast<Key<C>>((uint64_t{1} << (high - shift)) - 1);
    std::memset(bins, 0, (mask + 1) * sizeof(uint64_t));
    for (int64_t i = 0; i < count; ++i) bins[key_of(distance[members[i]]) >> shift & mask] += measure(members[i]);
    Key<C> bin = 0;
    while (before + bins[bin] < target) before += bins[bin++];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
      if ((key_of(distance[members[i]]) >> shift & mask) == bin) members[kept++] = members[i];
    count = kept;
    high = shift;
  }
  const uint64_t each = measure(members[0]);
  return {key_of(distance[members[0]]), (target - before + each - 1) / each};
}

template <class C>
struct CountMeasure {
  uint64_t operator()(uint32_t) const { return 1; }
};

template <class C>
struct MassMeasure {
  const C* weight;
  uint64_t operator()(uint32_t id) const { return fixed_mass(weight[id]); }
};

// Sends every id outside the cut to distance inf.
template <class C>
void apply_cut(C* distance, int64_t vocab_size, const Cut<C>& cut) {
  uint64_t ties = 0;
  for (int64_t v = 0; v < vocab_size; ++v) {
    const Key<C> key = key_of(distance[v]);
    ties += key == cut.threshold;
    const bool keep = key < cut.threshold || (key == cut.threshold && ties <= cut.ties);
    distance[v] = keep ? distance[v] : kInf<C>;
  }
}

template <class C>
int64_t gather_finite(const C* distance, int64_t vocab_size, uint32_t* members) {
  int64_t count = 0;
  for (int64_t v = 0; v < vocab_size; ++v) {
    members[count] = static_cast<uint32_t>(v);
    count += distance[v] < kInf<C>;
  }
  return count;
}

}  // namespace detail

// Reads one row of logits once and leaves its law in s: distance[v] = (max - logit[v]) / temperature, inf where v is
// forbidden or filtered out; weight[v] = e^-distance[v]. Distances, not logits, because they are exact at the top,
// never overflow at small temperatures, and their bits sort. On an error status s holds nothing.
template <class T, class C = Compute<T>>
RowLaw<C> row_law(const T* logits, int64_t vocab_size, const RowFilter& f, const RowScratch<C>& s) {
  C* const x = s.distance;
  for (int64_t v = 0; v < vocab_size; ++v) x[v] = load(logits[v]);
  if (f.bias)
    for (int64_t v = 0; v < vocab_size; ++v) x[v] += static_cast<C>(f.bias[v]);
  int bad = 0;
  for (int64_t v = 0; v < vocab_size; ++v) bad |= !(x[v] < kInf<C>);  // NaN or +inf, in banned ids too
  RowLaw<C> law;
  if (bad) return law.status = kStatusNaN, law;
  for (int64_t i = 0; i < f.num_bans; ++i) {
    const int64_t id = f.ban_ids[i];
    const bool holds = !f.min_lengths || f.position < f.min_lengths[i];
    if (holds && id >= 0 && id < vocab_size) x[id] = -kInf<C>;
  }
  C max = -kInf<C>;
  for (int64_t v = 0; v < vocab_size; ++v) max = x[v] > max ? x[v] : max;
  if (!(max > -kInf<C>)) return law.status = kStatusNoMass, law;

  const bool greedy = !(f.temperature > 0.0f);
  // an infinite one would turn the distance of a forbidden id, inf, into NaN
  const C temperature = greedy ? C(1) : static_cast<C>(std::min(f.temperature, std::numeric_limits<float>::max()));
  for (int64_t v = 0; v < vocab_size; ++v) x[v] = (max - x[v]) / temperature;

  const int64_t top_k = greedy ? 1 : f.top_k;
  if (top_k > 0 && top_k < vocab_size) {
    const int64_t count = detail::gather_finite(x, vocab_size, s.members);
    if (top_k < count) {
      const auto target = static_cast<uint64_t>(top_k);
      detail::apply_cut(x, vocab_size, detail::radix_select(x, s.members, count, target, detail::CountMeasure<C>{}));
    }
  }
  for (int64_t v = 0; v < vocab_size; ++v) s.weight[v] = exp_minus(x[v]);
  bool changed = false;
  if (f.top_p < 1.0f) {
    const int64_t count = detail::gather_finite(x, vocab_size, s.members);
    uint64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += detail::fixed_mass(s.weight[s.members[i]]);
    const double wanted = static_cast<double>(f.top_p > 0.0f ? f.top_p : 0.0f) * static_cast<double>(total);
    const uint64_t target = std::clamp<uint64_t>(static_cast<uint64_t>(std::ceil(wanted)), 1, total);
    const detail::MassMeasure<C> mass{s.weight};
    detail::apply_cut(x, vocab_size, detail::radix_select(x, s.members, count, target, mass));
    changed = true;
  }
  if (f.min_p > 0.0f) {
    const C least = std::min(static_cast<C>(f.min_p), C(1));  // the most likely id always stays
    for (int64_t v = 0; v < vocab_size; ++v) x[v] = s.weight[v] >= least ? x[v] : kInf<C>;
    changed = true;
  }
  if (changed)
    for (int64_t v = 0; v < vocab_size; ++v) s.weight[v] = x[v] < kInf<C> ? s.weight[v] : C(0);
  for (int64_t v = 0; v < vocab_size; ++v) law.num_kept += x[v] < kInf<C>;
  law.sum = row_sum(s.weight, vocab_size);
  law.inverse_sum = static_cast<C>(1.0 / law.sum);
  return law;
}

}  // namespace fastdecode::FD_ISA
