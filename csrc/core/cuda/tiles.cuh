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

// What the first n tiles of a row add up to, in order: by one thread.
__device__ inline double sum_tiles(const double* tiles, int n) {
  double sum = 0;
  for (int t = 0; t < n; ++t) sum += tiles[t];
  return sum;
}

}  // namespace fastdecode::FD_ISA
