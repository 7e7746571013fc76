#include "core/cuda/tiles.cuh"
#include "core/rows.h"
#include "sample/row_stats.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int32_t kNoId = 0x7fffffff;

// One instruction each. A NaN is passed over: rows that hold one are in error.
__device__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ double larger(double a, double b) { return fmax(a, b); }
__device__ float smaller(float a, float b) { return fminf(a, b); }
__device__ double smaller(double a, double b) { return fmin(a, b); }

// The two largest numbers so far.
template <class C>
struct TopTwo {
  C max = -kInf<C>, second = -kInf<C>;

  __device__ void enter(C value) {
    second = larger(second, smaller(max, value));
    max = larger(max, value);
  }
  __device__ void enter(const TopTwo& other) {
    second = larger(larger(second, other.second), smaller(max, other.max));
    max = larger(max, other.max);
  }
};

// One tile, relative to its own maximum: sum of e^-d and of d e^-d, d = max - logit.
struct TileStats {
  double max, second, sum, moment;
  int32_t argmax;
  int32_t good;
};

// A tile in the registers of a warp. Doubles are too many: they are read again, from the L1 cache.
template <class T, class C = Compute<T>>
class Tile {
 public:
  using Shape = TileShape<T>;

  __device__ Tile(const T* x, int start, int vocab_size) : x_(x), start_(start), V_(vocab_size) {
    if constexpr (kHeld) {
      // decided once, so that the loads of a whole tile stand side by side
      if (start + static_cast<int>(kTile) <= vocab_size && is_aligned<16>(x + start)) {
        for_vectors([&](int i, int q) { read_aligned(x_ + id(i, q), held_[i][q]); });
      } else {
        for_vectors([&](int i, int q) { read(x_, id(i, q), V_, -kInf<C>, held_[i][q]); });
      }
    }
  }

  __device__ int id(int i, int q) const { return start_ + Shape::first(i, q); }

  // body(i, q, values) for every vector of this thread; -inf beyond the row.
  template <class Body>
  __device__ void for_each(const Body& body) const {
    for_vectors([&](int i, int q) {
      if constexpr (kHeld) {
        body(i, q, held_[i][q]);
      } else {
        C values[Shape::kPer];
        read(x_, id(i, q), V_, -kInf<C>, values);
        body(i, q, values);
      }
    });
  }

 private:
  static constexpr bool kHeld = sizeof(C) == 4;

  template <class Body>
  __device__ static void for_vectors(const Body& body) {
#pragma unroll
    for (int i = 0; i < Shape::kSteps; ++i)
#pragma unroll
      for (int q = 0; q < Shape::kVectors; ++q) body(i, q);
  }

  const T* x_;
  int start_, V_;
  C held_[kHeld ? Shape::kSteps : 1][Shape::kVectors][Shape::kPer];
};

// By a warp; all of its threads get it. The argmax of a tile that does not exceed `before`, the largest of tiles with
// smaller ids, is left out.
template <class T, class C = Compute<T>>
__device__ TileStats tile_stats(const T* x, int start, int vocab_size, double before) {
  using Shape = TileShape<T>;
  const Tile<T> tile(x, start, vocab_size);
  TopTwo<C> top;
  bool bad = false;
  tile.for_each([&](int, int, const C(&values)[Shape::kPer]) {
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) {
      bad |= !(values[j] < kInf<C>);
      top.enter(values[j]);
    }
  });
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2)
    top.enter({__shfl_xor_sync(kAllLanes, top.max, step), __shfl_xor_sync(kAllLanes, top.second, step)});
  TileStats stats{static_cast<double>(top.max), static_cast<double>(top.second), 0, 0, kNoId, 1};
  stats.good = !__any_sync(kAllLanes, bad);
  if (!stats.good || top.max == -kInf<C>) return stats;
  if (stats.max > before) {
    int id = kNoId;
    tile.for_each([&](int i, int q, const C(&values)[Shape::kPer]) {
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j)
        if (values[j] == top.max) id = Smaller{}(id, tile.id(i, q) + j);
    });
    stats.argmax = warp_reduce(id, Smaller{});
  }
  LaneSums<T, C> sum, moment;
  tile.for_each([&](int, int q, const C(&values)[Shape::kPer]) {
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) {
      const C d = top.max - values[j], e = exp_minus(d);
      C& lane = moment.lane[q][j];
      sum.lane[q][j] += e;
      lane = d <= kFarthest<C> ? fma_(d, e, lane) : lane;
    }
  });
  stats.sum = static_cast<double>(sum.join());
  stats.moment = static_cast<double>(moment.join());
  return stats;
}

// Shared memory of the block that joins a row's tiles.
struct JoinShared {
  BlockSlots slots;
  double sum[kThreads], moment[kThreads];
};

// By a block.
template <class C>
__device__ void join(const RowStatsArgs& a, int64_t r, const TileStats* tiles, JoinShared& s) {
  const auto count = static_cast<int>(num_tiles(a.vocab_size)), thread = static_cast<int>(threadIdx.x);
  TopTwo<double> top;
  int good = 1, argmax = kNoId;
  for (int t = thread; t < count; t += kThreads) {
    good &= tiles[t].good;
    if (tiles[t].max > top.max) argmax = tiles[t].argmax;
    top.enter({tiles[t].max, tiles[t].second});
  }
  good = __syncthreads_and(good);
  const double max = block_reduce(s.slots, top.max, Larger{});
  argmax = block_reduce(s.slots, top.max == max ? argmax : kNoId, Smaller{});
  // one thread that knows the largest brings its second largest, the others their largest
  const int leader = block_reduce(s.slots, top.max == max ? thread : kThreads, Smaller{});
  const double second = block_reduce(s.slots, thread == leader ? top.second : top.max, Larger{});
  double sum = 0, moment = 0;  // thread 0's
  const int32_t status = !good ? kStatusNaN : !(max > -kInf<double>) ? kStatusNoMass : 0;
  for (int first = 0; first < count && status == 0; first += kThreads) {
    const int t = first + thread;
    s.sum[thread] = s.moment[thread] = 0;
    if (t < count && tiles[t].sum > 0) {
      const double drop = max - tiles[t].max, scale = exp_minus(drop);
      s.sum[thread] = scale * tiles[t].sum;
      s.moment[thread] = scale * (tiles[t].moment + drop * tiles[t].sum);
    }
    __syncthreads();  // the terms are written
    for (int i = 0; thread == 0 && i < kThreads && first + i < count; ++i) {
      sum += s.sum[i];
      moment += s.moment[i];
    }
    __syncthreads();  // the terms are read
  }
  if (thread != 0) return;
  const bool fine = status == 0;
  const double log_sum = fine ? log_(sum) : 0;
  a.status[r] = status;
  a.argmax[r] = fine ? argmax : -1;
  // of two zeros +0, whichever was met
  static_cast<C*>(a.max)[r] = fine ? static_cast<C>(max + 0.0) : C(0);
  static_cast<C*>(a.second)[r] = fine ? static_cast<C>(second + 0.0) : C(0);
  static_cast<C*>(a.logsumexp)[r] = fine ? static_cast<C>(max + log_sum) : C(0);
  static_cast<C*>(a.entropy)[r] = fine ? static_cast<C>(log_sum + moment / sum) : C(0);
}

template <class C>
__device__ void clear(const RowStatsArgs& a, int64_t r) {
  a.status[r] = 0;
  a.argmax[r] = -1;
  for (void* out : {a.max, a.second, a.logsumexp, a.entropy}) static_cast<C*>(out)[r] = C(0);
}

// Part blockIdx.x % parts of a row's tiles, a warp to each; with one part, the row to its end.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) tiles_kernel(RowStatsArgs a, int parts) {
  FD_SHARED(JoinShared, s);
  const int64_t r = blockIdx.x / parts, b = r / a.rows;
  const auto V = static_cast<int>(a.vocab_size);
  if (a.active && !a.active[b]) {
    if (parts == 1 && threadIdx.x == 0) clear<C>(a, r);
    return;
  }
  const T* const x = static_cast<const T*>(a.logits) + b * a.batch_stride + r % a.rows * a.row_stride;
  TileStats* const tiles = static_cast<TileStats*>(a.scratch) + r * num_tiles(V);
  double before = -kInf<double>;
  for_tiles(V, static_cast<int>(blockIdx.x % parts), parts, [&](int t) {
    const TileStats stats = tile_stats(x, t * static_cast<int>(kTile), V, before);
    before = larger(before, stats.max);
    if (lane_id() == 0) tiles[t] = stats;
  });
  if (parts > 1) return;
  __syncthreads();  // the tiles are written
  join<C>(a, r, tiles, s);
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) join_kernel(RowStatsArgs a) {
  FD_SHARED(JoinShared, s);
  const int64_t r = blockIdx.x;
  if (a.active && !a.active[r / a.rows]) {
    if (threadIdx.x == 0) clear<C>(a, r);
    return;
  }
  join<C>(a, r, static_cast<const TileStats*>(a.scratch) + r * num_tiles(a.vocab_size), s);
}

template <class T, class C = Compute<T>>
void run(const RowStatsArgs& a, const Exec& ex) {
  const int64_t rows = a.batch * a.rows;
  const int parts = num_row_parts(rows, a.vocab_size, ex);
  FD_LAUNCH((tiles_kernel<T>), grid_of(rows * parts), kThreads, 0, ex.stream, a, parts);
  if (parts > 1) FD_LAUNCH((join_kernel<C>), grid_of(rows), kThreads, 0, ex.stream, a);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::row_stats_scratch_bytes(const RowStatsArgs& a, const Exec&) {
  return a.batch * a.rows * FD_ISA::num_tiles(a.vocab_size) * static_cast<int64_t>(sizeof(FD_ISA::TileStats));
}

void fastdecode::cuda::row_stats(const RowStatsArgs& a, const Exec& ex) {
  if (a.batch * a.rows == 0) return;
  FD_ISA::dispatch_logits(a.dtype, [&](auto tag) { FD_ISA::run<typename decltype(tag)::type>(a, ex); });
}
