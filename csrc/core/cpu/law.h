// The law of core/filter.h on one row of logits. A row is read once from memory, for the largest logit of every 64; the
// filters then look only at the blocks that can hold what they keep. A law is dense (every id, weights computed on
// demand) or, after a filter, a list of the ids that are left.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/cpu/tiles.h"
#include "core/cpu/vector.h"
#include "core/dtype.h"
#include "core/law.h"

namespace fastdecode::FD_ISA {

// Working memory for one row, cut from the adapter's buffer. Most rows touch little of it.
template <class C>
struct RowScratch {
  C* block_max;       // [num_blocks]
  uint32_t* ids;      // [vocab_size + kWide], ids that are left, rising
  C* distance;        // [vocab_size + kWide], of ids
  C* weight;          // [vocab_size], of ids
  C* values;          // [vocab_size], logits after bias, bans and mask
  C* other;           // [vocab_size], weights of a second law: a residual, a truncation
  uint32_t* members;  // [vocab_size], indices during a radix selection
};

namespace detail {
inline int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }
}  // namespace detail

template <class C>
int64_t row_scratch_bytes(int64_t vocab_size) {
  const auto size = static_cast<int64_t>(sizeof(C));
  return detail::round_up(num_blocks(vocab_size) * size) + 2 * detail::round_up((vocab_size + kWide) * 4) +
         4 * detail::round_up((vocab_size + kWide) * size);
}
inline int64_t row_scratch_bytes(int64_t vocab_size, DType dtype) {
  return dtype == DType::kFloat64 ? row_scratch_bytes<double>(vocab_size) : row_scratch_bytes<float>(vocab_size);
}

template <class C>
RowScratch<C> row_scratch(void* buffer, int64_t vocab_size) {
  char* at = static_cast<char*>(buffer);
  auto take = [&](int64_t count, int64_t size) {
    void* taken = at;
    at += detail::round_up(count * size);
    return taken;
  };
  constexpr auto kSize = static_cast<int64_t>(sizeof(C));
  const int64_t padded = vocab_size + kWide;
  RowScratch<C> s;
  s.block_max = static_cast<C*>(take(num_blocks(vocab_size), kSize));
  s.ids = static_cast<uint32_t*>(take(padded, 4));
  s.distance = static_cast<C*>(take(padded, kSize));
  s.weight = static_cast<C*>(take(padded, kSize));
  s.values = static_cast<C*>(take(padded, kSize));
  s.other = static_cast<C*>(take(padded, kSize));
  s.members = static_cast<uint32_t*>(take(padded, 4));
  return s;
}

// Non-negative weights on some ids of a row.
template <class C>
struct Weights {
  const uint32_t* ids;  // [count], rising; nullptr = all ids, 0 .. count - 1
  const C* weight;      // [count]
  int64_t count;

  int64_t id(int64_t j) const { return ids ? ids[j] : j; }
};

// moment_of for sixteen.
template <class N>
FD_INLINE N moment_of(const N& distance, const N& weight) {
  using C = std::remove_cvref_t<decltype(distance[0])>;
  return distance <= kFarthest<C> ? distance * weight : N{};
}

// Calls tile(begin, end, sum) for the entries begin .. end - 1 of every tile that has any, in order, until it returns
// true. value(wide, j) gives the weights of entries j .. j + 15, or that of entry j; it is called once for each.
template <class C, class ValueOf, class OnTile>
void for_each_tile(const uint32_t* ids, int64_t count, const ValueOf& value, const OnTile& tile) {
  if (!ids) {
    for (int64_t start = 0; start < count; start += kTile) {
      const int64_t n = std::min(kTile, count - start);
      TileSum<C> sum(n);
      for_tile(n, [&](auto place, int64_t i) { sum.add(place, value(place.wide, start + i)); });
      if (tile(start, start + n, static_cast<double>(sum.join()))) return;
    }
    return;
  }
  for (int64_t j = 0; j < count;) {
    TileSum<C> sum;
    const int64_t begin = j, which = ids[j] / kTile;
    for (; j < count && ids[j] / kTile == which; ++j) sum.add(ids[j], value(std::false_type{}, j));
    if (tile(begin, j, static_cast<double>(sum.join()))) return;
  }
}

template <class C, class ValueOf>
double sum_over(const uint32_t* ids, int64_t count, const ValueOf& value) {
  double sum = 0;
  for_each_tile<C>(ids, count, value, [&](int64_t, int64_t, double tile) { return sum += tile, false; });
  return sum;
}

template <class C>
FD_ROW double sum_of(const Weights<C>& w) {
  const C* weight = w.weight;
  return sum_over<C>(w.ids, w.count, [weight](auto wide, int64_t j) { return take(wide, weight + j); });
}

namespace detail {

// Largest logit of every block, and of the row; false where the row holds NaN or +inf.
template <class E, class C = Compute<E>>
FD_ROW bool scan(const E* x, int64_t vocab_size, C* block_max, C& max) {
  constexpr auto kMagnitude = static_cast<std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>>(-1) >> 1;
  LaneBits<C> magnitude = {};
  auto enter = [&](const Lanes<C>& v) {
    const LaneBits<C> bits = (LaneBits<C>)v & kMagnitude;
    magnitude = bits > magnitude ? bits : magnitude;
  };
  max = -kInf<C>;
  int64_t start = 0;
  for (; start + kBlock <= vocab_size; start += kBlock) {
    Lanes<C> top = load_lanes(x + start);
    enter(top);
    for (int64_t i = kWide; i < kBlock; i += kWide) {
      const Lanes<C> v = load_lanes(x + start + i);
      top = larger<C>(v, top);
      enter(v);
    }
    const C here = largest<C>(top);
    block_max[start / kBlock] = here;
    max = here > max ? here : max;
  }
  C rest = -kInf<C>;
  bool nan = any_bit(magnitude > (LaneBits<C>)(Lanes<C>{} + kInf<C>));
  for (int64_t v = start; v < vocab_size; ++v) {
    const C value = load(x[v]);
    nan |= value != value;
    rest = value > rest ? value : rest;
  }
  if (start < vocab_size) block_max[start / kBlock] = rest;
  max = rest > max ? rest : max;
  return !nan && max < kInf<C>;
}

// Logits after bias, bans and mask; false where a logit, a forbidden one included, is NaN or +inf.
template <class T, class C = Compute<T>>
FD_ROW bool edit(const T* logits, int64_t vocab_size, const RowFilter& f, C* x) {
  for (int64_t v = 0; v < vocab_size; ++v) x[v] = load(logits[v]);
  if (f.bias)
    for (int64_t v = 0; v < vocab_size; ++v) x[v] += static_cast<C>(f.bias[v]);
  int bad = 0;
  for (int64_t v = 0; v < vocab_size; ++v) bad |= !(x[v] < kInf<C>);
  for (int64_t i = 0; i < f.num_bans; ++i) {
    const int64_t id = f.ban_ids[i];
    const bool holds = !f.min_lengths || f.position < f.min_lengths[i];
    if (holds && id >= 0 && id < vocab_size) x[id] = -kInf<C>;
  }
  for (int64_t start = 0; f.bitmask && start < vocab_size; start += 32) {
    const auto word = static_cast<uint32_t>(f.bitmask[start / 32]);
    const int64_t n = std::min<int64_t>(32, vocab_size - start);
    if (word == ~uint32_t{0}) continue;
    for (int64_t i = 0; i < n; ++i) x[start + i] = word >> i & 1 ? x[start + i] : -kInf<C>;
  }
  return !bad;
}

// Keeps entries with key < threshold, and the first `ties` with key == threshold.
template <class C>
struct Cut {
  Key<C> threshold = 0;
  int64_t ties = 0;
};

// Radix selection: the first entries in the order of key(j), then j, that measure at least `target` >= 1 together.
// `members` is working memory; all measures must add up to at least `target`.
template <class C, class KeyOf, class Measure>
Cut<C> radix_select(int64_t count, uint32_t* members, uint64_t target, const KeyOf& key, const Measure& measure) {
  uint64_t bins[1 << kDigit];
  uint64_t before = 0;
  bool listed = false;  // members holds the entries that are still in question; before that, all are
  for (int high = 8 * sizeof(C); high > 0;) {
    const int bits = count < 2048 ? 8 : kDigit;  // few entries: clearing and walking the bins is most of the work
    const int shift = std::max(0, high - bits);
    const Key<C> mask = static_cast<Key<C>>((uint64_t{1} << (high - shift)) - 1);
    std::fill(bins, bins + mask + 1, uint64_t{0});
    auto digit = [&](uint32_t j) { return key(j) >> shift & mask; };
    auto member = [&](int64_t i) { return listed ? members[i] : static_cast<uint32_t>(i); };
    for (int64_t i = 0; i < count; ++i) bins[digit(member(i))] += measure(member(i));
    Key<C> bin = 0;
    while (before + bins[bin] < target) before += bins[bin++];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t j = member(i);
      members[kept] = j;
      kept += digit(j) == bin;
    }
    count = kept;
    listed = true;
    high = shift;
  }
  Cut<C> cut{key(members[0]), 0};
  while (before < target) before += measure(members[cut.ties++]);
  return cut;
}

}  // namespace detail

// The law of a row whose status is 0.
template <class E>
class Law {
 public:
  using C = Compute<E>;

  Law(const E* x, int64_t vocab_size, C max, const RowFilter& f, const RowScratch<C>& scratch)
      : V(vocab_size), s(scratch), x_(x), max_(max + C(0)) {  // never -0, so that no distance is
    greedy_ = is_greedy(f);
    inverse_temperature_ = inverse_temperature<C>(f);
    filter(f);
  }

  // The law of the same row again, from what it had after normalise: sum. Only for a filter without cuts or edits.
  Law(const E* x, int64_t vocab_size, C max, double sum, const RowFilter& f, const RowScratch<C>& scratch)
      : Law(x, vocab_size, max, f, scratch) {
    sum_ = sum;
    inverse_sum_ = static_cast<C>(1.0 / sum);
    scanned_ = false;
  }

  // ids and weights; of a dense law only after store_weights.
  bool dense() const { return !listed_; }
  Weights<C> weights() const { return {listed_ ? s.ids : nullptr, s.weight, count()}; }
  int64_t count() const { return listed_ ? count_ : V; }

  C max() const { return max_; }
  FD_INLINE C distance(int64_t v) const { return distance(std::false_type{}, v); }
  template <class Wide>
  FD_INLINE auto distance(Wide wide, int64_t v) const {
    return (max_ - take(wide, x_ + v)) * inverse_temperature_;
  }
  C logit(int64_t v) const { return load(x_[v]); }

  // The most likely id, ties by id. Only typical_p can take the largest logit out of a list.
  FD_ROW int64_t mode() const {
    if (!listed_) return argmax();
    int64_t best = 0;
    for (int64_t j = 1; j < count_; ++j) best = s.distance[j] < s.distance[best] ? j : best;
    return s.ids[best];
  }

  // Distance of an id, inf where it was filtered out.
  C kept_distance(int64_t v) const {
    if (!listed_) return distance(v);
    const int64_t j =
        std::lower_bound(s.ids, s.ids + count_, v, [](uint32_t id, int64_t at) { return id < at; }) - s.ids;
    return j < count_ && s.ids[j] == v ? s.distance[j] : kInf<C>;
  }

  // Computes the sum that probabilities are divided by. Writes a dense law's weights to `store` where it is given.
  FD_ROW void normalise(C* store = nullptr) {
    if (listed_) {
      sum_ = sum_of(weights());
    } else if (store) {
      sum_ = sum_over<C>(nullptr, V, [this, store](auto wide, int64_t v) {
        const auto weight = exp_minus(distance(wide, v));
        put(wide, store + v, weight);
        return weight;
      });
    } else {
      sum_ = sum_over<C>(nullptr, V, [this](auto wide, int64_t v) { return exp_minus(distance(wide, v)); });
    }
    inverse_sum_ = static_cast<C>(1.0 / sum_);
  }
  void store_weights() { normalise(listed_ ? nullptr : s.weight); }

  // Leaves only the k most likely ids, ties by id.
  FD_ROW void keep_top(int64_t k) {
    if (!listed_) gather(limit_for(k));
    if (k < count_) {  // by logit: distances of logits far from the top may round to one number
      auto key = [this](int64_t j) { return falling_key(load(x_[s.ids[j]])); };
      keep(key, static_cast<uint64_t>(k), [](uint32_t) { return uint64_t{1}; });
    }
  }

  // After normalise.
  double sum() const { return sum_; }
  C inverse_sum() const { return inverse_sum_; }
  C prob(int64_t v) const { return exp_minus(kept_distance(v)) * inverse_sum_; }

  // Entropy in nats, after normalise.
  FD_ROW double entropy() const {
    auto term = [](const auto& d) { return moment_of(d, exp_minus(d)); };
    const C* far = s.distance;
    const double moment =
        listed_ ? sum_over<C>(s.ids, count_, [=](auto wide, int64_t j) { return term(take(wide, far + j)); })
                : sum_over<C>(nullptr, V, [&](auto wide, int64_t v) { return term(distance(wide, v)); });
    return log_(sum_) + moment / sum_;
  }

  const int64_t V;
  const RowScratch<C>& s;

 private:
  FD_ROW void filter(const RowFilter& f) {
    if (greedy_) {
      listed_ = true;
      count_ = 1;
      s.ids[0] = static_cast<uint32_t>(argmax());
      s.distance[0] = C(0);
      s.weight[0] = C(1);
      return;
    }
    const bool k = f.top_k > 0 && f.top_k < V, p = f.top_p < 1.0f;
    uint64_t row_mass = 0;
    if (p && (!k || f.order == kOrderJoint)) row_mass = mass_of_row();
    if (k) {
      keep_top(f.top_k);
      weigh();
    }
    if (p) {
      uint64_t mass = listed_ ? list_mass() : 0;
      const uint64_t target = share_of(f.top_p, row_mass > 0 ? row_mass : mass);
      // the list has to hold the nucleus; most of the time that lies near the top
      for (int i = 0; !k && mass < target; ++i) {
        gather(nucleus_limit<C>(i));
        mass = weigh();
        if (nucleus_limit<C>(i) == kEverywhere<C>) break;
      }
      if (mass >= target) keep(by(s.distance), target, fixed());
    }
    if (f.min_p > 0.0f) {
      const C least = std::min(static_cast<C>(f.min_p), C(1));  // the most likely id always stays
      if (!listed_) {
        gather(limit_of_weight(least));
        weigh();
      }
      compact([&](int64_t j) { return s.weight[j] >= least; });
    }
    if (f.typical_p < 1.0f) {
      if (!listed_) gather(kEverywhere<C>), weigh();
      const C *d = s.distance, *w = s.weight;
      const double moment = sum_over<C>(
          s.ids, count_, [d, w](auto wide, int64_t j) { return moment_of(take(wide, d + j), take(wide, w + j)); });
      const auto mean = static_cast<C>(moment / sum_of(weights()));
      // |-log p - entropy|: the normaliser cancels
      for (int64_t j = 0; j < count_; ++j) s.other[j] = d[j] > mean ? d[j] - mean : mean - d[j];
      keep(by(s.other), share_of(f.typical_p, list_mass()), fixed());
    }
  }

  static auto by(const C* distance) {
    return [distance](int64_t j) { return rising_key(distance[j]); };
  }
  auto fixed() const {
    return [weight = s.weight](int64_t j) { return fixed_mass(weight[j]); };
  }

  // Lowest id of the largest logit.
  FD_ROW int64_t argmax() const {
    int64_t v = 0;
    if (scanned_)
      while (s.block_max[v / kBlock] != max_) v += kBlock;
    while (load(x_[v]) != max_) ++v;
    return v;
  }

  FD_ROW uint64_t mass_of_row() const {
    typedef uint64_t Mass __attribute__((vector_size(8 * kWide)));
    typedef int64_t SignedMass __attribute__((vector_size(8 * kWide)));
    Mass mass = {};
    uint64_t total = 0;
    for_lanes(0, V, [&](auto wide, int64_t v) {
      const auto weight = exp_minus(distance(wide, v));
      if constexpr (wide) {
        mass += __builtin_convertvector(__builtin_convertvector(weight * C(0x1p40), SignedMass), Mass);
      } else {
        total += fixed_mass(weight);
      }
    });
    for (int64_t l = 0; l < kWide; ++l) total += mass[l];
    return total;
  }

  uint64_t list_mass() const {
    uint64_t mass = 0;
    for (int64_t j = 0; j < count_; ++j) mass += fixed_mass(s.weight[j]);
    return mass;
  }

  // Weights of the listed ids, and their mass.
  FD_ROW uint64_t weigh() {
    for (int64_t j = 0; j < count_; ++j) s.weight[j] = exp_minus(s.distance[j]);
    return list_mass();
  }

  // A distance within which there are at least min(k, finite) ids, from the first digit of the blocks' distances.
  FD_ROW C limit_for(int64_t k) const {
    uint32_t bins[1 << kDigit] = {};
    const int64_t blocks = num_blocks(V);
    if (k > blocks) return kEverywhere<C>;
    for (int64_t g = 0; g < blocks; ++g) ++bins[first_digit((max_ - s.block_max[g]) * inverse_temperature_)];
    int64_t seen = 0;
    Key<C> bin = 0;
    while (seen < k) seen += bins[bin++];
    return limit_of_digits<C>(bin);
  }

  // Lists the ids within `limit` of the top; kEverywhere<C> lists all that are not forbidden, also those whose distance
  // is beyond any number.
  FD_ROW void gather(C limit) {
    const bool everywhere = limit == kEverywhere<C>;
    listed_ = true;
    count_ = 0;
    for (int64_t start = 0; start < V; start += kBlock) {
      const C top = s.block_max[start / kBlock];
      if (everywhere ? top == -kInf<C> : !((max_ - top) * inverse_temperature_ <= limit)) continue;
      int64_t v = start;
      const int64_t end = std::min(start + kBlock, V);
#if FD_CPU_LEVEL >= 4
      if constexpr (std::is_same_v<C, float>) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 most = _mm512_set1_ps(limit);
        for (; v + kWide <= end; v += kWide) {
          const __m512 d = (__m512)distance(std::true_type{}, v);
          const __mmask16 near =
              everywhere ? _mm512_cmp_ps_mask((__m512)load_lanes(x_ + v), _mm512_set1_ps(-kInf<float>), _CMP_GT_OQ)
                         : _mm512_cmp_ps_mask(d, most, _CMP_LE_OQ);
          const __m512i here = _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int>(v)));
          // compressed in registers: storing compressed is slow on some machines
          _mm512_storeu_si512(s.ids + count_, _mm512_maskz_compress_epi32(near, here));
          _mm512_storeu_ps(s.distance + count_, _mm512_maskz_compress_ps(near, _mm512_maskz_min_ps(0xffff, d, most)));
          count_ += std::popcount(static_cast<uint16_t>(near));
        }
      }
#endif
      for (; v < end; ++v) {
        const C d = distance(v);
        s.ids[count_] = static_cast<uint32_t>(v);
        s.distance[count_] = d < limit ? d : limit;
        count_ += everywhere ? load(x_[v]) > -kInf<C> : d <= limit;
      }
    }
  }

  // Keeps the entries that come first by key, then id, until they measure `target`.
  template <class KeyOf, class Measure>
  void keep(const KeyOf& key, uint64_t target, const Measure& measure) {
    const detail::Cut<C> cut = detail::radix_select<C>(count_, s.members, target, key, measure);
    int64_t ties = 0;
    compact([&](int64_t j) {
      const Key<C> here = key(j);
      return here < cut.threshold || (here == cut.threshold && ties++ < cut.ties);
    });
  }

  template <class Keep>
  void compact(const Keep& keeps) {
    int64_t kept = 0;
    for (int64_t j = 0; j < count_; ++j) {
      const bool stays = keeps(j);
      s.ids[kept] = s.ids[j];
      s.distance[kept] = s.distance[j];
      s.weight[kept] = s.weight[j];
      kept += stays;
    }
    count_ = kept;
  }

  const E* x_;
  const C max_;
  C inverse_temperature_;
  bool greedy_, listed_ = false, scanned_ = true;
  int64_t count_ = 0;
  double sum_ = 0;
  C inverse_sum_ = 0;
};

// Reads a row and calls use(law) if it has one. Returns the row's status bits.
template <class T, class Use, class C = Compute<T>>
int32_t with_law(const T* logits, int64_t vocab_size, const RowFilter& f, const RowScratch<C>& s, const Use& use) {
  auto run = [&](const auto* x) -> int32_t {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    C max;
    if (!detail::scan(x, vocab_size, s.block_max, max)) return kStatusNaN;
    if (!(max > -kInf<C>)) return kStatusNoMass;
    Law<E> law(x, vocab_size, max, f, s);
    use(law);
    return 0;
  };
  if (!f.edits()) return run(logits);
  if (!detail::edit(logits, vocab_size, f, s.values)) return kStatusNaN;
  return run(static_cast<const C*>(s.values));
}

}  // namespace fastdecode::FD_ISA
