// Sums of tiles (core/tiles.h), a warp to each.
#pragma once

#include "core/cuda/reduce.cuh"
#include "core/cuda/vector.cuh"
#include "core/tiles.h"

namespace fastdecode::FD_ISA {

// How a warp holds a tile whose elements of type E it reads by 16-byte loads: vector (i, q) of thread t covers elements
// 256 i + 32 kPer q + kPer t + j, j < kPer.
template <class E>
struct TileShape {
  static constexpr int kPer = kPerVector<E>;
  static constexpr int kVectors = static_cast<int>(kLanes) / (kWarp * kPer);  // of one thread, per 256 elements
  static constexpr int kSteps = static_cast<int>(kTile / kLanes);

  // first element of vector (i, q) of this thread
  __device__ static int first(int i, int q) {
    return i * static_cast<int>(kLanes) + q * kWarp * kPer + lane_id() * kPer;
  }
};

// A thread's share of the 256 lanes.
template <class E, class C>
struct LaneSums {
  using Shape = TileShape<E>;
  C lane[Shape::kVectors][Shape::kPer] = {};

  // The tree over all lanes; every thread of the warp gets it.
  __device__ C join() const {
    C sum[Shape::kVectors];
#pragma unroll
    for (int q = 0; q < Shape::kVectors; ++q) {
      C part[Shape::kPer];
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) part[j] = lane[q][j];
#pragma unroll
      for (int width = Shape::kPer / 2; width > 0; width /= 2)
#pragma unroll
        for (int j = 0; j < width; ++j) part[j] = part[2 * j] + part[2 * j + 1];
      sum[q] = warp_reduce(part[0], Plus{});
    }
#pragma unroll
    for (int width = Shape::kVectors / 2; width > 0; width /= 2)
#pragma unroll
      for (int q = 0; q < width; ++q) sum[q] = sum[2 * q] + sum[2 * q + 1];
    return sum[0];
  }
};

// Sum of one tile; value(v, out) gives the elements v .. v + kPer - 1, zeros beyond the row's end.
template <class E, class C, class ValueOf>
__device__ inline C tile_sum(int start, int vocab_size, const ValueOf& value) {
  using Shape = TileShape<E>;
  LaneSums<E, C> sums;
#pragma unroll 1
  for (int i = 0; i < Shape::kSteps && start + i * static_cast<int>(kLanes) < vocab_size; ++i) {
#pragma unroll
    for (int q = 0; q < Shape::kVectors; ++q) {
      C out[Shape::kPer];
      value(start + Shape::first(i, q), out);
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) sums.lane[q][j] += out[j];
    }
  }
  return sums.join();
}

// Parts, of whole tiles, into which each row is cut so that few rows still occupy all multiprocessors.
inline int num_row_parts(int64_t num_rows, int64_t vocab_size, const Exec& ex) {
  const int64_t blocks = 4 * int64_t{ex.num_sms}, tiles = num_tiles(vocab_size);
  if (num_rows == 0 || num_rows >= blocks) return 1;
  const int64_t wanted = (blocks + num_rows - 1) / num_rows;
  return static_cast<int>(wanted < tiles ? wanted : tiles);
}

inline constexpr int kWord = 32;  // ids per word of `kept`
FD_HD inline int64_t num_words(int64_t vocab_size) { return (vocab_size + kWord - 1) / kWord; }

// First and past-the-last id of part `part` of `parts`: whole tiles.
struct Span {
  int begin, end;
};
__device__ inline Span part_of(int vocab_size, int part, int parts) {
  const int64_t tiles = num_tiles(vocab_size), last = tiles * (part + 1) / parts * kTile;
  return {static_cast<int>(tiles * part / parts * kTile), last < vocab_size ? static_cast<int>(last) : vocab_size};
}

// body(t) for the tiles of part `part` of `parts`, a warp to each.
template <class Body>
__device__ inline void for_tiles(int vocab_size, int part, int parts, const Body& body) {
  const auto tiles = static_cast<int>(num_tiles(vocab_size));
  const auto end = static_cast<int>(int64_t{tiles} * (part + 1) / parts);
  for (int t = static_cast<int>(int64_t{tiles} * part / parts) + warp_id(); t < end; t += kWarps) body(t);
}

// Of the ids v .. v + kCount - 1, bit j: v + j is one of the row's.
template <int kCount>
__device__ inline uint32_t bits_inside(int v, int vocab_size) {
  static_assert(kCount < kWord);
  const int left = vocab_size - v;
  return (uint32_t{1} << (left < 0 ? 0 : left < kCount ? left : kCount)) - 1;
}

// Whether any of the tile's ids is kept; the same for all threads of the warp.
__device__ inline bool keeps_any(const uint32_t* kept, int vocab_size, int tile) {
  constexpr int kWordsPerTile = static_cast<int>(kTile) / kWord;
  const int words = static_cast<int>(num_words(vocab_size));
  uint32_t any = 0;
  for (int w = tile * kWordsPerTile + lane_id(); w < (tile + 1) * kWordsPerTile && w < words; w += kWarp)
    any |= kept[w];
  return __any_sync(kAllLanes, any != 0) != 0;
}

// Sums of part `part` of `parts` of the row's tiles. value(v, out) gives as many elements from v on as `out` has,
// zeros beyond the row; it is not asked about tiles of which `kept` (nullptr = all) keeps no id.
template <class E, class C, class ValueOf>
__device__ inline void sum_part(int vocab_size, const uint32_t* kept, double* tile_sums, int part, int parts,
                                const ValueOf& value) {
  for_tiles(vocab_size, part, parts, [&](int t) {
    C sum = 0;
    if (!kept || keeps_any(kept, vocab_size, t)) sum = tile_sum<E, C>(t * static_cast<int>(kTile), vocab_size, value);
    if (lane_id() == 0) tile_sums[t] = static_cast<double>(sum);
  });
}

// The tiles' sums added up, for all threads, once all of them are written.
__device__ inline double add_tiles(BlockSlots& slots, const double* tile_sums, int vocab_size) {
  double sum = 0;
  for (int t = 0; threadIdx.x == 0 && t < num_tiles(vocab_size); ++t) sum += tile_sums[t];  // in order
  return block_broadcast(slots, threadIdx.x == 0, sum);
}

template <class E, class C, class ValueOf>
__device__ inline double sum_row(BlockSlots& slots, int vocab_size, const uint32_t* kept, double* tile_sums,
                                 const ValueOf& value) {
  sum_part<E, C>(vocab_size, kept, tile_sums, 0, 1, value);
  __syncthreads();  // the tiles' sums are written
  return add_tiles(slots, tile_sums, vocab_size);
}

}  // namespace fastdecode::FD_ISA
