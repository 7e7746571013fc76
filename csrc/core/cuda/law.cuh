// The law of core/filter.h on one row, worked on by one block of kThreads. A row is read once from memory, for the
// largest logit of every 64; filters then look only at the blocks that can hold what they keep. What they keep is a bit
// per id; weights are computed on demand from the logits. The same ids, masses and sums as core/cpu/law.h.
#pragma once

#include "core/cuda/scan.cuh"
#include "core/cuda/sort.cuh"
#include "core/law.h"

namespace fastdecode::FD_ISA {

// Shared memory of the block.
template <class C>
struct LawShared {
  BlockSlots slots;
  union {
    uint64_t bin_mass[kThreads];  // of a radix digit
    uint32_t bin_count[1 << kDigit];
    C weight[kTile];  // of one tile
    Entry<C> entry[kSharedEntries];
  };
  uint64_t before;  // found by one thread, for all
  int32_t found;
};

// What another kernel needs to go on with a law; `sum` is 0 before normalise.
struct Settled {
  double max, sum;
  bool dense;
};

// Every member function is for all threads of the block together, unless it says otherwise; what it returns is the same
// for all.
template <class E>
class Law {
 public:
  using C = Compute<E>;
  using Row = E;

  // `max` is the largest of block_max, and a number.
  __device__ Law(const E* x, int vocab_size, C max, const RowFilter& f, const RowMemory<C>& memory,
                 LawShared<C>& shared)
      : V(vocab_size), m(memory), s(shared), x_(x), max_(max + C(0)), inverse_temperature_(inverse_temperature<C>(f)) {
    filter(f);
  }

  // The law that an earlier one of the same row left in `memory`.
  __device__ Law(const E* x, int vocab_size, const Settled& settled, const RowFilter& f, const RowMemory<C>& memory,
                 LawShared<C>& shared)
      : V(vocab_size),
        m(memory),
        s(shared),
        x_(x),
        max_(static_cast<C>(settled.max)),
        inverse_temperature_(inverse_temperature<C>(f)),
        kept_(settled.dense ? nullptr : memory.kept),
        sum_(settled.sum),
        inverse_sum_(static_cast<C>(1.0 / settled.sum)) {}

  __device__ Settled settled() const { return {static_cast<double>(max_), sum_, dense()}; }

  const int V;
  const RowMemory<C>& m;
  LawShared<C>& s;

  // By any thread.
  __device__ bool dense() const { return !kept_; }
  __device__ const uint32_t* kept() const { return kept_; }
  __device__ C max() const { return max_; }
  __device__ C logit(int v) const { return load(x_[v]); }
  __device__ bool keeps(int v) const { return !kept_ || (kept_[v / kWord] >> v % kWord & 1); }
  __device__ C distance_of(C logit) const {
    const C distance = (max_ - logit) * inverse_temperature_;
    return !kept_ || distance < kEverywhere<C> ? distance : kEverywhere<C>;
  }
  // Of an id, inf where it was filtered out.
  __device__ C kept_distance(int v) const { return keeps(v) ? distance_of(logit(v)) : kInf<C>; }
  // Of the ids v .. v + kCount - 1, v a multiple of kCount, bit j: v + j is one of the row, and kept.
  template <int kCount>
  __device__ uint32_t bits(int v) const {
    static_assert(kWord % kCount == 0);
    const uint32_t inside = bits_inside<kCount>(v, V);
    return kept_ && inside ? inside & kept_[v / kWord] >> v % kWord : inside;
  }
  // Their distances, inf where the bit is 0.
  template <int kCount>
  __device__ void distances(int v, C (&out)[kCount]) const {
    const uint32_t here = bits<kCount>(v);
    if (here) read(x_, v, V, -kInf<C>, out);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = here >> j & 1 ? distance_of(out[j]) : kInf<C>;
  }
  template <int kCount>
  __device__ void weights(int v, C (&out)[kCount]) const {
    distances(v, out);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = exp_minus(out[j]);
  }

  // The weights for sums and walks: value(v, out).
  __device__ auto as_weights() const {
    return [this](int v, auto& out) { weights(v, out); };
  }

  // Computes the sum that probabilities are divided by, and leaves the tiles' sums in m.tile_sum; `weighed`: they are
  // there already.
  __device__ void normalise(bool weighed = false) {
    if (!weighed) weigh(0, 1);
    __syncthreads();  // the tiles' sums are written
    sum_ = add_tiles(s.slots, m.tile_sum, V);
    inverse_sum_ = static_cast<C>(1.0 / sum_);
  }
  // The tiles' sums of part `part` of `parts`.
  __device__ void weigh(int part, int parts) const { sum_part<E, C>(V, kept_, m.tile_sum, part, parts, as_weights()); }
  // After normalise; by any thread.
  __device__ double sum() const { return sum_; }
  __device__ C inverse_sum() const { return inverse_sum_; }
  __device__ C prob(int v) const { return exp_minus(kept_distance(v)) * inverse_sum_; }

  // Entropy in nats, after normalise. Overwrites m.tile_sum.
  __device__ double entropy() { return log_(sum_) + moment() / sum_; }

  // The most likely id, ties by id. Only typical_p can take the largest logit away.
  __device__ int mode() const {
    if (!kept_) return argmax();
    Key<C> nearest = ~Key<C>{0};
    for_kept([&](int v) { nearest = Smaller{}(nearest, rising_key(distance_of(logit(v)))); });
    nearest = block_reduce(s.slots, nearest, Smaller{});
    int first = V;
    for_kept([&](int v) {
      if (rising_key(distance_of(logit(v))) == nearest) first = Smaller{}(first, v);
    });
    return block_reduce(s.slots, first, Smaller{});
  }

  // Lowest id of the largest logit.
  __device__ int argmax() const {
    const auto blocks = static_cast<int>(num_blocks(V));
    int block = blocks;
    for (int g = static_cast<int>(threadIdx.x); g < blocks && block == blocks; g += kThreads)
      if (m.block_max[g] == max_) block = g;
    block = block_reduce(s.slots, block, Smaller{});
    const int v = block * static_cast<int>(kBlock) + static_cast<int>(threadIdx.x);
    const bool largest = threadIdx.x < kBlock && v < V && logit(v) == max_;
    return block_reduce(s.slots, largest ? v : V, Smaller{});
  }

  // Leaves only the k most likely ids, ties by id.
  __device__ void keep_top(int64_t k) {
    if (const uint64_t target = gather_top(k)) keep(By::kLogit, C(0), target);
  }

  // How many ids a law that is not dense keeps.
  __device__ int count() const {
    int mine = 0;
    for (int w = static_cast<int>(threadIdx.x); w < words(); w += kThreads) mine += __popc(kept_[w]);
    return block_reduce(s.slots, mine, Plus{});
  }

  // body(v) for every id kept, each by one thread; not in order.
  template <class Body>
  __device__ void for_kept(const Body& body) const {
#pragma unroll 1
    for (int w = static_cast<int>(threadIdx.x); w < words(); w += kThreads)
#pragma unroll 1
      for (uint32_t left = kept_[w]; left != 0; left &= left - 1) body(w * kWord + __ffs(static_cast<int>(left)) - 1);
  }

 private:
  // What a selection goes by: the largest logits, the smallest distances, those nearest a mean distance. The first is
  // measured by the number of ids, the others by their mass.
  enum class By { kLogit, kDistance, kMean };

  __device__ Key<C> key_of(By by, C mean, int v) const {
    if (by == By::kLogit) return falling_key(logit(v));
    const C d = distance_of(logit(v));
    if (by == By::kDistance) return rising_key(d);
    return rising_key(d > mean ? d - mean : mean - d);  // |-log p - entropy|: the normaliser cancels
  }
  __device__ uint64_t measure_of(By by, int v) const { return by == By::kLogit ? 1 : fixed_mass(weight(v)); }

  __device__ int words() const { return static_cast<int>(num_words(V)); }
  __device__ C weight(int v) const { return exp_minus(distance_of(logit(v))); }

  __device__ void filter(const RowFilter& f) {
    if (is_greedy(f)) return keep_one(argmax());
    const bool k = f.top_k > 0 && f.top_k < V, p = f.top_p < 1.0f;
    uint64_t row_mass = 0;
    if (p && (!k || f.order == kOrderJoint)) row_mass = mass_of_row();
    // A loop, so that the code of a selection stands in the kernel once: what is fetched but once is slow to fetch.
#pragma unroll 1
    for (int stage = 0; stage < 3; ++stage) {
      uint64_t target = 0;  // 0: nothing to select
      C mean = 0;
      if (stage == 0 && k) {
        target = gather_top(f.top_k);
      } else if (stage == 1 && p) {
        target = nucleus(f.top_p, row_mass, k);
      } else if (stage == 2) {
        if (f.min_p > 0.0f) keep_likely(static_cast<C>(f.min_p));
        if (f.typical_p < 1.0f) {
          if (!kept_) gather(kEverywhere<C>);
          mean = mean_distance();
          target = share_of(f.typical_p, mass_kept());
        }
      }
      if (target > 0) keep(stage == 0 ? By::kLogit : stage == 1 ? By::kDistance : By::kMean, mean, target);
    }
  }

  // How many of the ids kept to select for the k most likely; 0 where these are all. They are selected by logit:
  // distances of logits far from the top may round to one number.
  __device__ uint64_t gather_top(int64_t k) {
    if (!kept_) gather(limit_for(k));
    return k < count() ? static_cast<uint64_t>(k) : 0;
  }

  // What a nucleus must weigh, its ids among those kept; 0 where all that are kept weigh less.
  __device__ uint64_t nucleus(float top_p, uint64_t row_mass, bool listed) {
    uint64_t mass = listed ? mass_kept() : 0;
    const uint64_t target = share_of(top_p, row_mass > 0 ? row_mass : mass);
    // the bits have to hold the nucleus; most of the time that lies near the top
#pragma unroll 1
    for (int i = 0; !listed && mass < target; ++i) {
      gather(nucleus_limit<C>(i));
      mass = mass_kept();
      if (nucleus_limit<C>(i) == kEverywhere<C>) break;
    }
    return mass >= target ? target : 0;
  }

  // min-p, all ties.
  __device__ void keep_likely(C min_p) {
    const C least = min_p < C(1) ? min_p : C(1);  // the most likely id always stays
    if (!kept_) gather(limit_of_weight(least));
    for (int w = static_cast<int>(threadIdx.x); w < words(); w += kThreads) {
      uint32_t bits = kept_[w];
      for (uint32_t left = bits; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1;
        if (!(weight(w * kWord + bit) >= least)) bits &= ~(uint32_t{1} << bit);
      }
      m.kept[w] = bits;
    }
    __syncthreads();  // the bits are written
  }

  // Several blocks may be at work on one row (weigh_kernel, races in parts): all of them write the same words, and read
  // none before they have.
  __device__ void keep_one(int id) {
    for (int w = static_cast<int>(threadIdx.x); w < words(); w += kThreads)
      m.kept[w] = w == id / kWord ? uint32_t{1} << id % kWord : 0;
    kept_ = m.kept;
    __syncthreads();  // the bits are written
  }

  // Of the kept ids, under the law: entropy minus the logarithm of the normaliser.
  __device__ C mean_distance() {
    const double above = moment();
    return static_cast<C>(above / sum_row<E, C>(s.slots, V, kept_, m.tile_sum, as_weights()));
  }

  // Sum of distance * weight.
  __device__ double moment() const {
    return sum_row<E, C>(s.slots, V, kept_, m.tile_sum, [&](int v, auto& out) {
      distances(v, out);
      for (C& value : out) value = moment_of(value, exp_minus(value));
    });
  }

  __device__ uint64_t mass_kept() const {
    uint64_t mass = 0;
    for_kept([&](int v) { mass += fixed_mass(weight(v)); });
    return block_reduce(s.slots, mass, Plus{});
  }

  __device__ uint64_t mass_of_row() const {
    constexpr int kPer = kPerVector<E>;
    uint64_t mass = 0;
    for (int v = static_cast<int>(threadIdx.x) * kPer; v < V; v += kThreads * kPer) {
      C w[kPer];
      weights(v, w);
#pragma unroll
      for (int j = 0; j < kPer; ++j) mass += fixed_mass(w[j]);
    }
    return block_reduce(s.slots, mass, Plus{});
  }

  // A distance within which there are at least min(k, finite) ids, from the first digit of the blocks' distances.
  __device__ C limit_for(int64_t k) const {
    constexpr int kEach = (1 << kDigit) / kThreads;
    const auto blocks = static_cast<int>(num_blocks(V));
    if (k > blocks) return kEverywhere<C>;
    for (int i = static_cast<int>(threadIdx.x); i < 1 << kDigit; i += kThreads) s.bin_count[i] = 0;
    __syncthreads();  // the bins are empty
    for (int g = static_cast<int>(threadIdx.x); g < blocks; g += kThreads)
      atomicAdd(&s.bin_count[first_digit((max_ - m.block_max[g]) * inverse_temperature_)], 1u);
    __syncthreads();  // and full
    uint32_t bins[kEach];
    uint64_t mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) mine += bins[i] = s.bin_count[threadIdx.x * kEach + i];
    const uint64_t before = block_scan(s.slots, mine).before, wanted = static_cast<uint64_t>(k);
    const bool here = before < wanted && wanted <= before + mine;
    int end = static_cast<int>(threadIdx.x) * kEach;
    uint64_t seen = before;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      end += seen < wanted;
      seen += bins[i];
    }
    end = block_broadcast(s.slots, here, end);
    return limit_of_digits<C>(static_cast<Key<C>>(end));
  }

  // Keeps the ids within `limit` of the top; kEverywhere keeps all that are not forbidden, also those whose distance is
  // beyond any number.
  __device__ void gather(C limit) {
    const bool everywhere = limit == kEverywhere<C>;
    const auto blocks = static_cast<int>(num_blocks(V));
    const auto near = [&](C logit) {
      return everywhere ? logit > -kInf<C> : (max_ - logit) * inverse_temperature_ <= limit;
    };
    constexpr int kPerBlock = static_cast<int>(kBlock) / kWord;
    for (int first = warp_id() * kWarp; first < blocks; first += kWarps * kWarp) {
      const int mine = first + lane_id();
      const bool may = mine < blocks && near(m.block_max[mine]);
      if (mine < blocks && !may) {
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i)
          if (mine * kPerBlock + i < words()) m.kept[mine * kPerBlock + i] = 0;
      }
      for (unsigned left = __ballot_sync(kAllLanes, may); left != 0; left &= left - 1) {
        const int block = first + __ffs(static_cast<int>(left)) - 1;
#pragma unroll
        for (int i = 0; i < kPerBlock; ++i) {
          const int word = block * kPerBlock + i, v = word * kWord + lane_id();
          const unsigned bits = __ballot_sync(kAllLanes, v < V && near(logit(v)));
          if (lane_id() == 0 && word < words()) m.kept[word] = bits;
        }
      }
    }
    kept_ = m.kept;
    __syncthreads();  // the bits are written
  }

  // Radix selection: keeps the first ids in the order of their keys, then of the ids, that measure at least `target` >=
  // 1 together; all that are kept so far must.
  __device__ void keep(By by, C mean, uint64_t target) {
    const auto key = [&](int v) { return key_of(by, mean, v); };
    const auto measure = [&](int v) { return measure_of(by, v); };
    constexpr int kBits = 8;
    static_assert(1 << kBits == kThreads);  // a bin to each thread
    Key<C> prefix = 0;                      // the digits so far of the key at which the target is reached
    uint64_t before = 0;                    // measure of the ids with smaller keys
#pragma unroll 1
    for (int shift = 8 * static_cast<int>(sizeof(C)) - kBits; shift >= 0; shift -= kBits) {
      s.bin_mass[threadIdx.x] = 0;
      __syncthreads();  // the bins are empty
      for_kept([&](int v) {
        const Key<C> k = key(v);
        // in two steps, for a shift by all bits is none
        if (((k ^ prefix) >> shift) >> kBits == 0)
          atomicAdd(reinterpret_cast<unsigned long long*>(&s.bin_mass[k >> shift & (kThreads - 1)]),
                    static_cast<unsigned long long>(measure(v)));
      });
      __syncthreads();  // and full
      const uint64_t mine = s.bin_mass[threadIdx.x], below = before + block_scan(s.slots, mine).before;
      if (below < target && target <= below + mine) {
        s.found = static_cast<int32_t>(threadIdx.x);
        s.before = below;
      }
      __syncthreads();  // found
      prefix |= static_cast<Key<C>>(s.found) << shift;
      before = s.before;
    }
    // Ids at the threshold stay in order of id until the target is reached: each thread walks neighbouring words.
    const int each = (words() + kThreads - 1) / kThreads;
    const int begin = static_cast<int>(threadIdx.x) * each, end = begin + each < words() ? begin + each : words();
    uint64_t ties = 0;
#pragma unroll 1
    for (int w = begin; w < end; ++w)
#pragma unroll 1
      for (uint32_t left = kept_[w]; left != 0; left &= left - 1) {
        const int v = w * kWord + __ffs(static_cast<int>(left)) - 1;
        if (key(v) == prefix) ties += measure(v);
      }
    uint64_t reached = before + block_scan(s.slots, ties).before;
    for (int w = begin; w < end; ++w) {
      uint32_t bits = kept_[w];
      for (uint32_t left = bits; left != 0; left &= left - 1) {
        const int bit = __ffs(static_cast<int>(left)) - 1, v = w * kWord + bit;
        const Key<C> k = key(v);
        bool stays = k < prefix;
        if (k == prefix) {
          stays = reached < target;
          reached += measure(v);
        }
        if (!stays) bits &= ~(uint32_t{1} << bit);
      }
      m.kept[w] = bits;
    }
    __syncthreads();  // the bits are written
  }

  const E* const x_;
  const C max_, inverse_temperature_;
  const uint32_t* kept_ = nullptr;
  double sum_ = 0;
  C inverse_sum_ = 0;
};

// use(x) on the row that the law is of: the edited values where there are any, else the logits.
template <class T, class Use, class C = Compute<T>>
__device__ inline void with_values(const T* logits, const RowMemory<C>& m, const Use& use) {
  if constexpr (std::is_same_v<T, C>) {
    use(m.values ? m.values : logits);
  } else if (m.values) {
    use(static_cast<const C*>(m.values));
  } else {
    use(logits);
  }
}

// The law of a row that was scanned, given to use(law) if it has one. Returns the row's status bits.
template <class T, class Use, class C = Compute<T>>
__device__ inline int32_t with_law(const T* logits, int vocab_size, const RowFilter& f, const RowMemory<C>& m,
                                   LawShared<C>& s, const Use& use) {
  C max = -kInf<C>;
  for (int g = static_cast<int>(threadIdx.x); g < num_blocks(vocab_size); g += kThreads)
    max = Larger{}(max, m.block_max[g]);
  max = block_reduce(s.slots, max, Larger{});
  if (!(max < kInf<C>)) return kStatusNaN;
  if (!(max > -kInf<C>)) return kStatusNoMass;
  with_values(logits, m, [&](const auto* x) {
    Law law(x, vocab_size, max, f, m, s);
    use(law);
  });
  return 0;
}

// The same law again, from another kernel.
template <class T, class Use, class C = Compute<T>>
__device__ inline void with_settled_law(const T* logits, int vocab_size, const Settled& settled, const RowFilter& f,
                                        const RowMemory<C>& m, LawShared<C>& s, const Use& use) {
  with_values(logits, m, [&](const auto* x) {
    Law law(x, vocab_size, settled, f, m, s);
    use(law);
  });
}

}  // namespace fastdecode::FD_ISA
