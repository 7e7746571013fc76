// The first reading of a row: the largest logit of every 64, after the bias, bans and mask where there are any.
#pragma once

#include "core/cuda/tiles.cuh"
#include "core/filter.h"
#include "core/fmath.h"

namespace fastdecode::FD_ISA {

// Working memory of one row, in the adapter's scratch.
template <class C>
struct RowMemory {
  C* block_max;      // [num_blocks]; +inf where the block holds NaN or +inf
  uint32_t* kept;    // [num_words]: bit v % 32 of word v / 32
  double* tile_sum;  // [num_tiles]
  C* values;         // [vocab_size], logits after bias, bans and mask; nullptr where nothing edits them
};

// The row's memory begins at `at`; returns its end. Every part is aligned to 16 bytes.
template <class C>
FD_HD int64_t place_row(int64_t vocab_size, bool edits, char* at, RowMemory<C>& m) {
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    char* const taken = at + used;
    used += (bytes + 15) / 16 * 16;
    return taken;
  };
  m.block_max = reinterpret_cast<C*>(take(num_blocks(vocab_size) * static_cast<int64_t>(sizeof(C))));
  m.kept = reinterpret_cast<uint32_t*>(take(num_words(vocab_size) * 4));
  m.tile_sum = reinterpret_cast<double*>(take(num_tiles(vocab_size) * 8));
  m.values = edits ? reinterpret_cast<C*>(take(vocab_size * static_cast<int64_t>(sizeof(C)))) : nullptr;
  return used;
}

FD_HD inline int64_t row_memory_bytes(int64_t vocab_size, bool edits, DType dtype) {
  RowMemory<double> d;
  RowMemory<float> f;
  return dtype == DType::kFloat64 ? place_row(vocab_size, edits, static_cast<char*>(nullptr), d)
                                  : place_row(vocab_size, edits, static_cast<char*>(nullptr), f);
}

// Of the ids begin .. end - 1, begin a multiple of kTile.
template <class E, class C = Compute<E>>
__device__ inline void scan_blocks(const E* x, int begin, int end, C* block_max) {
  constexpr int kPer = kPerVector<E>, kSpan = kWarp * kPer, kAtOnce = 4;
  constexpr int kLanesPerBlock = static_cast<int>(kBlock) / kPer;
  const bool aligned = is_aligned<16>(x);
  for (int first = begin + warp_id() * kAtOnce * kSpan; first < end; first += kWarps * kAtOnce * kSpan) {
    C v[kAtOnce][kPer];
    if (first + kAtOnce * kSpan <= end && aligned) {  // decided once, so that the loads stand side by side
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) read_aligned(x + first + i * kSpan + lane_id() * kPer, v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) read(x, first + i * kSpan + lane_id() * kPer, end, -kInf<C>, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      C max = -kInf<C>;
      bool bad = false;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        bad |= !(v[i][j] < kInf<C>);
        max = v[i][j] > max ? v[i][j] : max;
      }
      if (bad) max = kInf<C>;
#pragma unroll
      for (int step = 1; step < kLanesPerBlock; step *= 2) max = Larger{}(max, __shfl_xor_sync(kAllLanes, max, step));
      const int id = first + i * kSpan + lane_id() * kPer;
      if (lane_id() % kLanesPerBlock == 0 && id < end) block_max[id / kBlock] = max;
    }
  }
}

// Logits after bias, bans and mask, of the ids begin .. end - 1. True where one of them, a forbidden one included, is
// NaN or +inf.
template <class T, class C = Compute<T>>
__device__ inline bool edit(const T* logits, const RowFilter& f, int begin, int end, C* values) {
  constexpr int kPer = kPerVector<T>;
  bool bad = false;
  for (int v = begin + static_cast<int>(threadIdx.x) * kPer; v < end; v += kThreads * kPer) {
    C x[kPer];
    float bias[kPer] = {};
    read(logits, v, end, -kInf<C>, x);
    if (f.bias) read(f.bias, v, end, 0.0f, bias);
    const uint32_t allowed = f.bitmask ? static_cast<uint32_t>(f.bitmask[v / kWord]) >> v % kWord : ~uint32_t{0};
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (f.bias) x[j] += static_cast<C>(bias[j]);
      bad |= !(x[j] < kInf<C>);
      if (!(allowed >> j & 1)) x[j] = -kInf<C>;
    }
    write(values, v, end, x);
  }
  bad = __syncthreads_or(bad) != 0;  // and the values are written
  for (int64_t i = threadIdx.x; i < f.num_bans; i += kThreads) {
    const int64_t id = f.ban_ids[i];
    const bool holds = !f.min_lengths || f.position < f.min_lengths[i];
    if (holds && id >= begin && id < end) values[id] = -kInf<C>;
  }
  __syncthreads();  // the bans are written
  return bad;
}

// Part `part` of `parts` of a row: writes its share of block_max, and of values where something edits the logits.
template <class T, class C = Compute<T>>
__device__ inline void scan_row(const T* logits, int vocab_size, const RowFilter& f, const RowMemory<C>& m, int part,
                                int parts) {
  const auto [begin, end] = part_of(vocab_size, part, parts);
  if (!m.values) return scan_blocks(logits, begin, end, m.block_max);
  const bool bad = edit(logits, f, begin, end, m.values);
  scan_blocks(m.values, begin, end, m.block_max);
  // thread 0 has written the block's true maximum itself
  if (bad && threadIdx.x == 0 && begin < end) m.block_max[begin / kBlock] = kInf<C>;
}

}  // namespace fastdecode::FD_ISA
