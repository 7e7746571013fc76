// paged_attention and prefix_attention. Work is cut three ways: kSplit keys of a request, one kv head, a tile of query
// rows (a row is a slot and one of the query heads that share the kv head). A block of four warps does one piece and
// leaves a softmax state for each row; merge_kernel joins a row's states in order.
//
// Within a block, keys pass through shared memory in tiles. Warp w computes the scores of its quarter of a tile's keys
// for all rows, and its share of the output channels for all rows: so keys and values are brought, decoded and read
// once, and what a row's numbers are made of depends on no other row.
#include "attention/attend.h"

#include "attention/attend.cuh"
#include "attention/attend_plan.cuh"
#include "attention/attend_tiles.cuh"
#include "attention/merge.cuh"

namespace fastdecode::FD_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Checks: a block to a request

__global__ void __launch_bounds__(kBlockThreads) check_kernel(AttendArgs a) {
  for (int64_t request = blockIdx.x; request < a.batch; request += gridDim.x) {
    const int64_t length = a.kv_lens[request], tail = tail_of(a, request), page_size = a.pages.page_size;
    const int64_t capacity = a.max_pages * page_size;
    bool bad_length = false;
    int64_t queries = 0, in_pages = length - tail;
    if (a.group_start) {
      bad_length = a.group_start[request] < 0 || a.group_start[request + 1] > a.num_rows;
      // Rows find their group by bisection: where starts do not rise, no group can be trusted.
      for (int64_t g = threadIdx.x; g < a.batch; g += kBlockThreads)
        bad_length |= a.group_start[g + 1] < a.group_start[g];
    } else {
      queries = queries_of(a, request);
      bad_length = queries < 0 || queries > a.num_slots || queries > length;
    }
    bad_length |= length < 0 || tail < 0 || tail > length || (tail > 0 && tail > a.pages.tail_size) ||
                  (tail > 0 && request >= a.pages.tail_batch);
    int64_t coded = in_pages;
    if (a.coded_lens && !bad_length) {
      for (int64_t i = threadIdx.x; i < queries; i += kBlockThreads) {
        const int64_t own = a.coded_lens[request * a.num_slots + i];
        bad_length |= own < in_pages || own > length;
        coded = own > coded ? own : coded;
      }
    }
    bad_length = __syncthreads_or(bad_length || coded > capacity) != 0;
    bool bad_page = false;
    if (!bad_length) {
      // coded is this thread's share: together they look at every page in use
      const int64_t pages = (coded + page_size - 1) / page_size;
      const bool alone = a.coded_lens != nullptr;  // then each thread must go all the way of its own queries
      for (int64_t p = alone ? 0 : threadIdx.x; p < pages; p += alone ? 1 : kBlockThreads) {
        const int64_t page = a.page_table[request * a.page_table_stride + p];
        bad_page |= page < 0 || page >= a.pages.num_pages;
      }
    }
    bad_page = __syncthreads_or(bad_page) != 0;
    if (threadIdx.x == 0) a.status[request] = bad_length ? kStatusBadLength : bad_page ? kStatusBadPage : 0;
  }
}

template <class T>
__device__ void load_queries(const AttendArgs& a, const Part& part, int rows, T* q) {
  constexpr int kPer = kPerVector<T>;
  const auto head_dim = static_cast<int>(a.pages.head_dim), group = static_cast<int>(group_size(a));
  const int per_row = head_dim / kPer;
  for (int i = static_cast<int>(threadIdx.x); i < rows * per_row; i += kBlockThreads) {
    const int row = i / per_row, channel = i % per_row * kPer, flat = part.first_row + row;
    T* to = q + row * (head_dim + Tile<T>::kPad) + channel;
    if (row >= part.rows) {
      store_chunk<16>(to, {});
      continue;
    }
    const T* from = static_cast<const T*>(a.q) + flat / group * a.q_slot_stride +
                    (part.head * group + flat % group) * a.q_head_stride + channel;
    from += a.group_start ? part.out_row * a.q_slot_stride : part.request * a.q_batch_stride;
    if (is_aligned<16>(from)) {
      store_chunk<16>(to, load_chunk<16>(from));
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) to[e] = from[e];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores and sums. A warp's scores: rows 16 i + g, + 8 and keys 8 n + 2q, + 1 of its quarter.

inline constexpr int kChunk = 16;  // products that are added up before their sum is, as tensor cores do

template <class T>
using Scores = Compute<T>[Tile<T>::kRowTiles][Tile<T>::kKeyTiles][4];
// The sums of its share of the channels: of each 64, warp w has 16, from 16 w on, as two matrices.
template <class T, int kHeadDim>
using Sums = Compute<T>[Tile<T>::kRowTiles][kHeadDim / 32][4];

template <class T>
__device__ void multiply_keys(const T* q, const T* k, int head_dim, int row_tiles, Scores<T>& s) {
  const int stride = head_dim + Tile<T>::kPad, lane = lane_id();
  if constexpr (kTensorCores<T>) {
    const T* keys = k + (16 * warp_id() + lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
    const T* rows = q + lane % 16 * stride + lane / 16 * 8;
    for (int c = 0; c < head_dim; c += 16) {
      uint32_t b[4];
      load_matrices(keys + c, b);
#pragma unroll
      for (int i = 0; i < Tile<T>::kRowTiles; ++i) {
        if (i >= row_tiles) break;
        uint32_t rows_i[4];
        load_matrices(rows + 16 * i * stride + c, rows_i);
        multiply_add<T>(s[i][0], rows_i, b[0], b[1]);
        multiply_add<T>(s[i][1], rows_i, b[2], b[3]);
      }
    }
  } else {
    const T* rows = q + lane / 4 * stride;
    const T* keys = k + (8 * Tile<T>::kKeyTiles * warp_id() + lane % 4 * 2) * stride;
    for (int first = 0; first < head_dim; first += kChunk) {
      T part[Tile<T>::kKeyTiles][4] = {};
      for (int c = first; c < first + kChunk; ++c)
#pragma unroll
        for (int n = 0; n < Tile<T>::kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            part[n][e] = fma_(rows[e / 2 * 8 * stride + c], keys[(8 * n + e % 2) * stride + c], part[n][e]);
#pragma unroll
      for (int n = 0; n < Tile<T>::kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][n][e] += part[n][e];
    }
  }
}

template <class T, int kHeadDim>
__device__ void add_values(const T* p, const T* v, int head_dim, int row_tiles, Sums<T, kHeadDim>& sum) {
  constexpr int kKeys = Tile<T>::kKeys, kStride = kKeys + Tile<T>::kPad;
  const int stride = head_dim + Tile<T>::kPad, lane = lane_id();
  if constexpr (kTensorCores<T>) {
    const T* rows = p + lane % 16 * kStride + lane / 16 * 8;
    const T* keys = v + lane % 16 * stride + lane / 16 * 8 + 16 * warp_id();
#pragma unroll 1
    for (int key = 0; key < kKeys; key += 16) {
      uint32_t a[Tile<T>::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < Tile<T>::kRowTiles; ++i)
        if (i < row_tiles) load_matrices(rows + 16 * i * kStride + key, a[i]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 64; ++n) {
        if (64 * n + 16 * warp_id() >= head_dim) break;
        uint32_t b[4];
        load_matrices<true>(keys + key * stride + 64 * n, b);
#pragma unroll
        for (int i = 0; i < Tile<T>::kRowTiles; ++i) {
          if (i >= row_tiles) break;
          multiply_add<T>(sum[i][2 * n], a[i], b[0], b[1]);
          multiply_add<T>(sum[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }
  } else {
    for (int first = 0; first < kKeys; first += kChunk)
#pragma unroll
      for (int n = 0; n < kHeadDim / 32; ++n) {
        const int channel = n / 2 * 64 + 16 * warp_id() + n % 2 * 8 + lane % 4 * 2;
        if (channel >= head_dim) break;
        T part[4] = {};
        for (int key = first; key < first + kChunk; ++key)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const T weight = p[(lane / 4 + e / 2 * 8) * kStride + key];
            if (weight != 0) part[e] = fma_(weight, v[key * stride + channel + e % 2], part[e]);  // see add_broken
          }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[0][n][e] += part[e];
      }
  }
}

template <class T>
__device__ inline bool is_broken(T x) {
  const float value = load(x);
  return !(value - value == 0);
}

// Whether a value of the tile is inf or NaN. All threads must call it; it is a barrier.
template <class T>
__device__ bool any_broken(const T* v, int head_dim) {
  bool any = false;
  for (int i = static_cast<int>(threadIdx.x); i < Tile<T>::kKeys * head_dim; i += kBlockThreads)
    any |= is_broken(v[i / head_dim * (head_dim + Tile<T>::kPad) + i % head_dim]);
  return __syncthreads_or(any) != 0;
}

// A row must not meet the inf of a key that it does not see: 0 * inf is NaN. So what is not finite is added first,
// where it has a weight, and is 0 when tensor cores add the rest.
template <class T, int kHeadDim>
__device__ void add_broken(const T* p, T* v, int head_dim, int row_tiles, Sums<T, kHeadDim>& sum) {
  constexpr int kKeys = Tile<T>::kKeys, kStride = kKeys + Tile<T>::kPad;
  const int stride = head_dim + Tile<T>::kPad, lane = lane_id();
#pragma unroll 1
  for (int key = 0; key < kKeys; ++key)
#pragma unroll
    for (int n = 0; n < kHeadDim / 32; ++n) {
      const int channel = n / 2 * 64 + 16 * warp_id() + n % 2 * 8 + lane % 4 * 2;
      if (channel >= head_dim) break;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T value = v[key * stride + channel + e];
        if (!is_broken(value)) continue;
#pragma unroll
        for (int i = 0; i < Tile<T>::kRowTiles; ++i) {
          if (i >= row_tiles) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float weight = load(p[(16 * i + lane / 4 + 8 * half) * kStride + key]);
            if (weight != 0) sum[i][n][2 * half + e] += weight * load(value);
          }
        }
      }
    }
  __syncthreads();  // all have seen the tile as it was
  for (int i = static_cast<int>(threadIdx.x); i < kKeys * head_dim; i += kBlockThreads) {
    T& value = v[i / head_dim * stride + i % head_dim];
    if (is_broken(value)) value.bits = 0;
  }
  __syncthreads();  // all of it is finite
}

template <class C, class Op>
__device__ inline C over_row(C value, const Op& op) {  // of the four lanes that share a row
  value = op(value, __shfl_xor_sync(kAllLanes, value, 1));
  return op(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
constexpr int kBlocksWanted = sizeof(T) == 8 ? 1 : 2;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kBlockThreads, kBlocksWanted<T>) attend_kernel(AttendArgs a, Plan plan) {
  using C = Compute<T>;
  constexpr int kKeys = Tile<T>::kKeys, kKeyTiles = Tile<T>::kKeyTiles, kRowTiles = Tile<T>::kRowTiles;
  FD_SHARED(Shared<T>, shared);
  FD_DYNAMIC_SHARED(unsigned char, memory);
  if (threadIdx.x == 0) shared.part = part_of_block(a, plan);
  __syncthreads();  // part is written
  const Part& part = shared.part;
  if (part.rows == 0) return;
  const auto head_dim = static_cast<int>(a.pages.head_dim), group = static_cast<int>(group_size(a));
  const int lane = lane_id(), warp = warp_id(), row_tiles = (part.rows + 15) / 16;
  const Source &k_source = plan.sources[part.ring][0], &v_source = plan.sources[part.ring][1];
  T* const q = reinterpret_cast<T*>(memory);
  T* const p = reinterpret_cast<T*>(memory + plan.p);
  auto for_rows = [&](auto&& body) {  // body(i, half, row): the rows of this thread
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (i < row_tiles) body(i, half, 16 * i + lane / 4 + 8 * half);
  };
  auto state_of = [&](int row) {  // of the states: out row, head, split
    const int flat = part.first_row + row;
    return ((part.out_row + flat / group) * a.num_q_heads + part.head * group + flat % group) * plan.splits +
           part.split;
  };

  if (part.begin >= part.end) {
    for (int row = static_cast<int>(threadIdx.x); row < part.rows; row += kBlockThreads)
      static_cast<C*>(plan.lse)[state_of(row)] = -kInf<C>;
    return;
  }
  for (int row = static_cast<int>(threadIdx.x); row < 16 * row_tiles; row += kBlockThreads)
    shared.rows[row] = make_row(a, part, row);
  for (int key = part.begin + static_cast<int>(threadIdx.x); key < part.end; key += kBlockThreads) {
    const int size = static_cast<int>(part.ring ? a.pages.tail_size : a.pages.page_size);
    const int32_t* pages = a.page_table + part.request * a.page_table_stride;
    KeySlot& slot = shared.keys[key % kSplit];
    slot.page = part.ring ? static_cast<int>(part.request) : pages[key / size];
    slot.offset = key % size;
  }
  load_queries(a, part, 16 * row_tiles, q);
  __syncthreads();  // rows, keys and queries are written

  const int first = part.begin / kKeys * kKeys;
  auto stage_of = [&](int key) { return memory + plan.stage + key / kKeys % plan.stages * plan.stage_bytes; };
  auto bring = [&](int key) {
    if (key < part.end) {
      fetch<T>(k_source, part, shared.keys, key, stage_of(key));
      fetch<T>(v_source, part, shared.keys, key, stage_of(key));
    }
    cp_async_commit();  // also without copies, so that the number of groups tells which tile has arrived
  };
  auto tile_of = [&](const Source& source, int at, int key) {
    return reinterpret_cast<T*>(source.as_is ? stage_of(key) + source.at : memory + at);
  };

  C max[kRowTiles][2], total[kRowTiles][2] = {};
  Sums<T, kHeadDim> sum = {};
  for_rows([&](int i, int half, int) { max[i][half] = -kInf<C>; });
#pragma unroll 1
  for (int t = 0; t < plan.stages - 1; ++t) bring(first + t * kKeys);
#pragma unroll 1
  for (int key = first; key < part.end; key += kKeys) {
    if (plan.stages == kMaxStages) {
      cp_async_wait<kMaxStages - 2>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // the tile is there for all, and none still reads the one before it
    bring(key + (plan.stages - 1) * kKeys);
    T* const k = tile_of(k_source, plan.k, key);
    T* const v = tile_of(v_source, plan.v, key);
    if (!k_source.as_is) decode(k_source, part, shared.keys, key, stage_of(key), k);
    if (!v_source.as_is) decode(v_source, part, shared.keys, key, stage_of(key), v);
    if (!k_source.as_is || !v_source.as_is) __syncthreads();  // the tile is decoded

    Scores<T> s = {};
    multiply_keys<T>(q, k, head_dim, row_tiles, s);
    const C scale = static_cast<C>(a.scale), softcap = static_cast<C>(a.softcap);
    for_rows([&](int i, int half, int) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          C& score = s[i][n][2 * half + e];
          score *= scale;
          if (a.softcap > 0) score = softcap * tanh_(score / softcap);
        }
    });
    const bool mixed = key < part.clean_begin || key + kKeys > part.clean_end;
    if (mixed) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int own = key + 8 * (kKeyTiles * warp + n) + lane % 4 * 2 + e;
          const bool node = a.tree_mask && own >= part.base && own < part.length;
          const int position = node && a.window ? part.base + depth_of(a, part.request, own - part.base) : own;
          for_rows([&](int i, int half, int row) {
            if (!visible(a, part, shared.rows[row], own, position)) s[i][n][2 * half + e] = -kInf<C>;
          });
        }
    }
    for_rows([&](int i, int half, int row) {
      C most = -kInf<C>;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) most = Larger{}(most, s[i][n][2 * half + e]);
      most = over_row(most, Larger{});
      if (lane % 4 == 0) shared.max[warp][row] = most;
    });
    __syncthreads();  // all quarters' maxima are written
    for_rows([&](int i, int half, int row) {
      C most = max[i][half];
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) most = Larger{}(most, shared.max[w][row]);
      const C from = most == -kInf<C> ? C(0) : most, factor = weight_of(from - max[i][half]);
      max[i][half] = most;
      total[i][half] *= factor;
#pragma unroll
      for (int n = 0; n < kHeadDim / 32; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[i][n][2 * half + e] *= factor;
      C quarter = 0;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        C x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) x[e] = weight_of(from - s[i][n][2 * half + e]);
        quarter += x[0] + x[1];
        T* const to = p + row * (kKeys + Tile<T>::kPad) + 8 * (kKeyTiles * warp + n) + lane % 4 * 2;
        if constexpr (kTensorCores<T>) {
          store_chunk<4>(to, {{pack<T>(x[0], x[1])}});
        } else {
          to[0] = x[0];
          to[1] = x[1];
        }
      }
      quarter = over_row(quarter, Plus{});
      if (lane % 4 == 0) shared.sum[warp][row] = quarter;
    });
    __syncthreads();  // weights and their sums are written
    if constexpr (kTensorCores<T>) {
      if (mixed && any_broken(v, head_dim)) add_broken<T, kHeadDim>(p, v, head_dim, row_tiles, sum);
    }
    for_rows([&](int i, int half, int row) {
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) total[i][half] += shared.sum[w][row];
    });
    add_values<T, kHeadDim>(p, v, head_dim, row_tiles, sum);
  }

  for_rows([&](int i, int half, int row) {
    if (row >= part.rows) return;
    const int64_t state = state_of(row);
    const C all = total[i][half], inverse = all == 0 ? C(0) : C(1) / all;
    if (warp == 0 && lane % 4 == 0)
      static_cast<C*>(plan.lse)[state] = all == 0 ? -kInf<C> : all == all ? max[i][half] + log_(all) : all;
#pragma unroll
    for (int n = 0; n < kHeadDim / 32; ++n) {
      const int channel = n / 2 * 64 + 16 * warp + n % 2 * 8 + lane % 4 * 2;
      if (channel >= head_dim) break;
      struct Pair {
        C x[2];
      } pair{{sum[i][n][2 * half] * inverse, sum[i][n][2 * half + 1] * inverse}};
      store_chunk<2 * sizeof(C)>(static_cast<C*>(plan.out) + state * head_dim + channel,
                                 bit_cast<Chunk<2 * sizeof(C)>>(pair));
    }
  });
}

// A warp to a row of out.
template <class T>
__global__ void __launch_bounds__(kBlockThreads) merge_kernel(AttendArgs a, Plan plan) {
  using C = Compute<T>;
  const auto head_dim = static_cast<int>(a.pages.head_dim);
  for (int64_t at = int64_t{blockIdx.x} * kBlockWarps + warp_id(); at < a.num_rows * a.num_q_heads;
       at += int64_t{gridDim.x} * kBlockWarps) {
    const int64_t row = at / a.num_q_heads;
    int64_t request, slot;
    if (a.group_start) {
      request = last_at_most(a.batch, row, [&](int64_t g) { return a.group_start[g]; });
      slot = request < 0 ? 0 : row - a.group_start[request];
    } else {
      request = row / a.num_slots;
      slot = row % a.num_slots;
    }
    int states = 0, unused = 0;  // of the pages' splits those behind the request's keys are unused
    if (request >= 0 && !a.status[request] && slot < queries_of(a, request)) {
      const int in_pages = (a.kv_lens[request] + kSplit - 1) / kSplit;
      unused = in_pages < plan.page_splits ? plan.page_splits - in_pages : 0;
      states = plan.splits - unused;
    }
    auto state = [&](int s) { return at * plan.splits + s + (s < plan.page_splits - unused ? 0 : unused); };
    const C* lses = static_cast<const C*>(plan.lse);
    const C* outs = static_cast<const C*>(plan.out);
    C result[kChannels];
    const C lse = merge_row<C>(
        states, head_dim, [&](int s) { return lses[state(s)]; },
        [&](int s, int c) { return outs[state(s) * head_dim + c]; }, result);
    if (lane_id() == 0) static_cast<C*>(a.lse)[at] = lse;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      if (const int c = lane_id() + kWarp * i; c < head_dim)
        static_cast<T*>(a.out)[at * head_dim + c] = round_to<T>(result[i]);
  }
}

template <class T, int kHeadDim>
void launch(const AttendArgs& a, const Plan& plan, const Exec& ex) {
  const unsigned blocks = grid_of(plan.num_tiles * plan.splits * a.pages.num_heads);
  // The same for all calls: another thread may be about to launch one.
  FD_ALLOW_SHARED((attend_kernel<T, kHeadDim>), shared_limit() - static_cast<int64_t>(sizeof(Shared<T>)));
  FD_LAUNCH((attend_kernel<T, kHeadDim>), blocks, kBlockThreads, plan.shared_bytes, ex.stream, a, plan);
}

template <class T>
void run(const AttendArgs& a, const Exec& ex) {
  if (a.num_rows == 0 || a.num_q_heads == 0) return;
  const Plan plan = make_plan<T>(a);
  if (plan.num_tiles > 0 && plan.splits > 0) {
    if constexpr (kTensorCores<T>) {
      a.pages.head_dim <= 128 ? launch<T, 128>(a, plan, ex) : launch<T, 256>(a, plan, ex);
    } else {
      launch<T, 256>(a, plan, ex);
    }
  }
  const int64_t blocks = divide_up(a.num_rows * a.num_q_heads, kBlockWarps);
  FD_LAUNCH((merge_kernel<T>), capped_grid(blocks), kBlockThreads, 0, ex.stream, a, plan);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::attend_scratch_bytes(const AttendArgs& a, const Exec&) {
  using namespace fastdecode::FD_ISA;
  const int64_t states = a.num_rows * a.num_q_heads * (num_page_splits(a) + num_ring_splits(a));
  return states * (a.pages.head_dim + 1) * (a.dtype == DType::kFloat64 ? 8 : 4);
}

void fastdecode::cuda::attend(const AttendArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.batch > 0) FD_LAUNCH(check_kernel, capped_grid(a.batch), kBlockThreads, 0, ex.stream, a);
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}
