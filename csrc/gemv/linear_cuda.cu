#include "core/cuda/async.cuh"
#include "core/cuda/device.cuh"
#include "gemv/linear.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kColumns = kWarp;  // of a panel, to a block: with half of them, 4096 columns keep 128 processors busy
constexpr int kStages = 4;       // tiles in shared memory: one at work, the others on their way
constexpr int kStep = 8;         // values of k that a thread holds at once

// Values of x that one thread reads at once.
template <class C>
struct alignas(16) Values {
  static constexpr int kCount = 16 / sizeof(C);
  C k[kCount];
};

// kDepth values of k of the weights and of x.
template <class C>
constexpr int kDepth = 256 / sizeof(C);
template <class C, int kRows>
struct Tile {
  alignas(16) C weight[kDepth<C>][kColumns];
  Values<C> x[kRows][kDepth<C> / Values<C>::kCount];

  __device__ C& x_at(int row, int k) { return x[row][k / Values<C>::kCount].k[k % Values<C>::kCount]; }
  __device__ C x_at(int row, int k) const { return x[row][k / Values<C>::kCount].k[k % Values<C>::kCount]; }
};

template <int kBytes, class C, int kRows>
__device__ void fetch_weight(Tile<C, kRows>& tile, const C* weight, int depth) {
  constexpr int kWidth = kBytes / sizeof(C), kCopies = kColumns / kWidth, kPass = kThreads / kCopies;
  const int first = static_cast<int>(threadIdx.x) / kCopies, column = static_cast<int>(threadIdx.x) % kCopies * kWidth;
#pragma unroll
  for (int i = 0; i < kDepth<C> / kPass; ++i) {
    const int k = first + i * kPass;
    if (k < depth) cp_async<kBytes>(&tile.weight[k][column], weight + k * kPanel + column);
  }
}

template <class C, int kRows>
__device__ void fetch_x(Tile<C, kRows>& tile, const C* x, int64_t stride, int rows, int depth) {
  constexpr int kPass = kThreads / kDepth<C>;
  const int first = static_cast<int>(threadIdx.x) / kDepth<C>, k = static_cast<int>(threadIdx.x) % kDepth<C>;
#pragma unroll
  for (int i = 0; i < kRows / kPass; ++i) {
    const int row = first + i * kPass;
    if (row < rows && k < depth) cp_async<sizeof(C)>(&tile.x_at(row, k), x + row * stride + k);
  }
}

// What a thread needs for kStep values of k. Its sum is a chain of additions, the time of the kernel where M is small:
// so that no addition waits for shared memory, a step is loaded while the one before it is added.
template <class C, int kRowsPerWarp>
struct Step {
  C weight[kStep];
  Values<C> x[kRowsPerWarp][kStep / Values<C>::kCount];

  template <int kRows>
  __device__ void load(const Tile<C, kRows>& tile, int k) {
#pragma unroll
    for (int i = 0; i < kStep; ++i) weight[i] = tile.weight[k + i][lane_id()];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r)
#pragma unroll
      for (int i = 0; i < kStep / Values<C>::kCount; ++i)
        x[r][i] = tile.x[warp_id() + r * kWarps][k / Values<C>::kCount + i];
  }

  __device__ void add_to(C (&sum)[kRowsPerWarp]) const {
#pragma unroll
    for (int i = 0; i < kStep; ++i)
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) sum[r] += weight[i] * x[r][i / Values<C>::kCount].k[i % Values<C>::kCount];
  }
};

// Rows first_row .. of x times the columns first_column .. of W^T. Threads copy together; then lane c of warp w has
// column c of rows w, w + kWarps, ... and adds its products in the order of k, as the contract asks.
template <class C, int kRowsPerWarp>
__global__ void __launch_bounds__(kThreads) linear_kernel(LinearArgs a) {
  constexpr int kRows = kWarps * kRowsPerWarp;
  struct Shared {
    Tile<C, kRows> tiles[kStages];
  };
  FD_SHARED(Shared, shared);
  const int64_t groups = (a.M + kRows - 1) / kRows;
  const int64_t first_row = blockIdx.x % groups * kRows, first_column = blockIdx.x / groups * kColumns;
  const int rows = static_cast<int>(a.M - first_row < kRows ? a.M - first_row : kRows);
  const C* x = static_cast<const C*>(a.x) + first_row * a.x_stride;
  const C* weight = static_cast<const C*>(a.weight) + first_column / kPanel * a.K * kPanel + first_column % kPanel;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  const int64_t tiles = (a.K + kDepth<C> - 1) / kDepth<C>;
  const int lane = lane_id(), warp = warp_id();
  auto depth_of = [&](int64_t t) {
    const int64_t left = a.K - t * kDepth<C>;
    return static_cast<int>(left < kDepth<C> ? left : kDepth<C>);
  };

  auto fetch = [&](int64_t t) {
    if (t < tiles) {
      Tile<C, kRows>& tile = shared.tiles[t % kStages];
      const int depth = depth_of(t);
      if (aligned) {
        fetch_weight<16>(tile, weight + t * kDepth<C> * kPanel, depth);
      } else {
        fetch_weight<sizeof(C)>(tile, weight + t * kDepth<C> * kPanel, depth);
      }
      fetch_x(tile, x + t * kDepth<C>, a.x_stride, rows, depth);
    }
    cp_async_commit();  // also without copies, so that the number of groups tells which tile has arrived
  };

  C sum[kRowsPerWarp] = {};
#pragma unroll 1
  for (int t = 0; t < kStages - 1; ++t) fetch(t);
  for (int64_t t = 0; t < tiles; ++t) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // tile t is there for all, and none still reads the one that the next copies overwrite
    fetch(t + kStages - 1);
    if (warp >= rows) continue;
    const Tile<C, kRows>& tile = shared.tiles[t % kStages];
    const int depth = depth_of(t);
    if (depth == kDepth<C>) {
      Step<C, kRowsPerWarp> steps[2];
      steps[0].load(tile, 0);
#pragma unroll
      for (int k = 0; k < kDepth<C>; k += kStep) {
        if (k + kStep < kDepth<C>) steps[(k / kStep + 1) % 2].load(tile, k + kStep);
        steps[k / kStep % 2].add_to(sum);
      }
    } else {
#pragma unroll 1  // the last tile alone is not worth its code
      for (int k = 0; k < depth; ++k)
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) sum[r] += tile.weight[k][lane] * tile.x_at(warp + r * kWarps, k);
    }
  }

  const int64_t column = first_column + lane;
  if (column >= a.N) return;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (warp + r * kWarps >= rows) break;
    const int64_t row = first_row + warp + r * kWarps;
    C value = sum[r];
    if (a.bias) value += static_cast<const C*>(a.bias)[column];
    if (a.residual) value += static_cast<const C*>(a.residual)[row * a.residual_stride + column];
    static_cast<C*>(a.y)[row * a.N + column] = value;
  }
}

template <class C, int kRowsPerWarp>
void launch(const LinearArgs& a, const Exec& ex) {
  const int64_t groups = (a.M + kWarps * kRowsPerWarp - 1) / (kWarps * kRowsPerWarp);
  const unsigned blocks = grid_of(groups * ((a.N + kColumns - 1) / kColumns));
  FD_LAUNCH((linear_kernel<C, kRowsPerWarp>), blocks, kThreads, 0, ex.stream, a);
}

template <class C>
void run(const LinearArgs& a, const Exec& ex) {
  if (a.M <= kWarps) return launch<C, 1>(a, ex);
  launch<C, 2>(a, ex);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::linear(const LinearArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.M == 0 || a.N == 0) return;
  if (a.dtype == DType::kFloat64) return run<double>(a, ex);
  run<float>(a, ex);
}
