// paged_attention and prefix_attention. Work is cut three ways: kSplit keys of a request, one kv head, a tile of query
// rows (a row is a slot and one of the query heads that share the kv head). A block of four warps does one piece and
// leaves a softmax state for each row; merge_kernel joins a row's states in order.
//
// Within a block, keys pass through shared memory in tiles. Warp w computes the scores of its quarter of a tile's keys
// for all rows, and its share of the output channels for all rows: so keys and values are brought, decoded and read
// once, and what a row's numbers are made of depends on no other row.
#include "attention/attend.h"

#include "attention/merge.cuh"
#include "core/cuda/async.cuh"
#include "core/cuda/device.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/vector.cuh"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kBlockWarps = 4, kBlockThreads = kBlockWarps * kWarp;
constexpr int kSplit = 512;  // keys
constexpr int kMaxStages = 3;
constexpr int64_t kMaxSharedBytes = 225 << 10, kHalfSharedBytes = 112 << 10;  // one block to a multiprocessor, two

// Scores and sums are held as tensor cores leave them (core/cuda/mma.cuh); float and double, which have none that keep
// their precision, get them from ordinary loops.
template <class T>
constexpr bool kTensorCores = sizeof(T) == 2;

template <class T>
struct Tile {
  static constexpr int kKeys = sizeof(T) == 8 ? 32 : 64;
  static constexpr int kKeyTiles = kKeys / (8 * kBlockWarps);  // of 8 keys, in a warp's quarter
  static constexpr int kRowTiles = kTensorCores<T> ? 4 : 1;    // of 16 rows
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kPad = 16 / sizeof(T);  // elements behind each row in shared memory: eight rows, eight banks
};

// Keys or values, of pages or of rings, as the kernel reads them. Strides in bytes.
struct Source {
  const unsigned char* data;
  const unsigned char* scale;
  int64_t page_stride, token_stride, head_stride, scale_page_stride, scale_token_stride, scale_head_stride;
  int row_bytes, scale_bytes;  // of one token of a head
  int copy_bytes;              // of one asynchronous copy; 0: decoded from where it lies
  int at, stride, scale_at;    // in a stage
  KVScheme scheme;
  DType dtype;        // of plain data
  bool as_is;         // a stage's rows are the tile
  bool static_scale;  // one for all tokens
  bool by_channel;    // keys of kivi
};

struct Plan {
  Source sources[2][2];                  // pages, rings; keys, values
  void* lse;                             // [rows, num_q_heads, splits]: of the states
  void* out;                             // [rows, num_q_heads, splits, head_dim]
  int64_t num_tiles, tiles_per_request;  // of query rows
  int page_splits, splits;
  int row_tiles;
  int stages, stage_bytes;
  int p, k, v, stage;  // where they begin in shared memory; q is first
  int shared_bytes;
};

// One block's part.
struct Part {
  int64_t request, out_row;  // row of q, out and lse of slot 0
  int first_row, rows;       // of the request's num_queries * (q heads per kv head)
  int head, split;
  int length, base;            // keys, and those before the first query's own
  int begin, end;              // keys that any of the rows may see
  int clean_begin, clean_end;  // keys that all of them see
  bool ring;
};

struct Row {
  int slot, low, high, coded;  // see visible()
};
struct KeySlot {
  int page, offset;
};

template <class T>
struct Shared {
  Part part;
  Compute<T> max[kBlockWarps][Tile<T>::kRows], sum[kBlockWarps][Tile<T>::kRows];  // of a tile's quarters
  Row rows[Tile<T>::kRows];
  KeySlot keys[kSplit];
};

__device__ inline int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
__device__ inline int most(int64_t a, int64_t b) { return static_cast<int>(a > b ? a : b); }

FD_HD inline int64_t group_size(const AttendArgs& a) { return a.num_q_heads / a.pages.num_heads; }

__device__ inline int tail_of(const AttendArgs& a, int64_t request) { return a.tail_lens ? a.tail_lens[request] : 0; }
__device__ inline int queries_of(const AttendArgs& a, int64_t request) {
  if (a.group_start) return a.group_start[request + 1] - a.group_start[request];
  return a.num_queries ? a.num_queries[request] : static_cast<int>(a.num_slots);
}

// The last index whose value is <= x; values rise. -1 if there is none.
template <class ValueAt>
__device__ inline int64_t last_at_most(int64_t count, int64_t x, const ValueAt& value_at) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (value_at(middle) <= x) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

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

// ---------------------------------------------------------------------------------------------------------------------
// A block's part

__device__ inline Part part_of_block(const AttendArgs& a, const Plan& plan) {
  const int kRows = 16 * plan.row_tiles;
  const int64_t group = group_size(a);
  Part part = {};
  int64_t tile = blockIdx.x % plan.num_tiles;
  const int64_t rest = blockIdx.x / plan.num_tiles;
  part.split = static_cast<int>(rest % plan.splits);
  part.head = static_cast<int>(rest / plan.splits);
  if (a.group_start) {
    // Group g has tiles from start * group / kRows + g on: at least as many as it needs, whatever comes before it.
    auto first_tile = [&](int64_t g) { return a.group_start[g] * group / kRows + g; };
    part.request = last_at_most(a.batch, tile, first_tile);
    if (part.request < 0) return part;
    tile -= first_tile(part.request);
    part.out_row = a.group_start[part.request];
  } else {
    part.request = tile / plan.tiles_per_request;
    tile %= plan.tiles_per_request;
    part.out_row = part.request * a.num_slots;
  }
  if (a.status[part.request]) return part;
  const int64_t first = tile * kRows, rows = queries_of(a, part.request) * group;
  part.first_row = static_cast<int>(first);
  part.rows = rows > first ? least(rows - first, kRows) : 0;
  if (part.rows == 0) return part;

  const int first_slot = static_cast<int>(first / group);
  const int last_slot = static_cast<int>((first + part.rows - 1) / group);
  const int tail = tail_of(a, part.request);
  part.length = a.kv_lens[part.request];
  part.base = a.group_start ? part.length : part.length - queries_of(a, part.request);
  part.ring = part.split >= plan.page_splits;
  const int64_t from = part.ring ? int64_t{(part.length - tail) / kSplit + part.split - plan.page_splits} * kSplit
                                 : int64_t{part.split} * kSplit;
  int low = 0, high = part.length;  // that some row sees
  if (a.causal && !a.tree_mask) high = part.base + last_slot + 1;
  if (a.window) low = most(0, part.base + (a.tree_mask ? 0 : first_slot) + 1 - a.window);
  part.clean_begin = a.window ? most(0, part.length - a.window) : 0;
  part.clean_end = a.tree_mask ? part.base : a.causal ? part.base + first_slot + 1 : part.length;
  if (part.ring) {
    low = most(low, part.length - tail);
    part.clean_end = 0;
  } else {
    part.clean_end = least(part.clean_end, part.length - tail);
    int coded = part.length - tail;
    if (a.coded_lens)
      for (int i = first_slot; i <= last_slot; ++i) coded = most(coded, a.coded_lens[part.request * a.num_slots + i]);
    high = least(high, coded);
  }
  part.begin = most(from, low);
  part.end = least(from + kSplit, high);
  return part;
}

__device__ inline int words_of(const AttendArgs& a) { return static_cast<int>((a.num_slots + 31) / 32); }
__device__ inline const int32_t* mask_of(const AttendArgs& a, int64_t request, int node) {
  return a.tree_mask + (request * a.num_slots + node) * words_of(a);
}

// Proper ancestors of a node.
__device__ inline int depth_of(const AttendArgs& a, int64_t request, int node) {
  const int32_t* mask = mask_of(a, request, node);
  const int nodes = queries_of(a, request);
  int count = 0;
  for (int first = 0; first < nodes; first += 32) {
    auto word = static_cast<uint32_t>(mask[first / 32]);
    if (first + 32 > nodes) word &= (1u << (nodes - first)) - 1;
    if (first == node / 32 * 32) word &= ~(1u << node % 32);
    count += __popc(word);
  }
  return count;
}

__device__ inline Row make_row(const AttendArgs& a, const Part& part, int row) {
  constexpr int kNever = 0x7fffffff;
  if (row >= part.rows) return {0, kNever, 0, 0};
  const int slot = static_cast<int>((part.first_row + row) / group_size(a));
  const int position = part.base + (a.tree_mask ? depth_of(a, part.request, slot) : slot);
  const int low = a.window ? most(0, position + 1 - a.window) : 0;
  const int high = a.tree_mask ? part.base : a.causal ? position + 1 : part.length;
  const int coded =
      a.coded_lens ? a.coded_lens[part.request * a.num_slots + slot] : part.length - tail_of(a, part.request);
  return {slot, low, high, coded};
}

// `position` is the key's: in a tree a node's depth decides.
__device__ inline bool visible(const AttendArgs& a, const Part& part, const Row& row, int key, int position) {
  if (position < row.low || key >= part.length || (key < row.coded) == part.ring) return false;
  if (key < row.high) return true;
  if (!a.tree_mask) return false;
  const int node = key - part.base;
  return static_cast<uint32_t>(mask_of(a, part.request, row.slot)[node / 32]) >> node % 32 & 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Keys and values into shared memory

// Rows of the tile at key `first` as they lie in the cache, into a stage; nothing for keys that nobody may see.
template <class T>
__device__ void fetch(const Source& source, const Part& part, const KeySlot* slots, int first, unsigned char* stage) {
  if (source.copy_bytes == 0) return;
  auto copy = [&](const unsigned char* data, int64_t page_stride, int64_t token_stride, int bytes, int step, int at,
                  int stride) {
    const auto steps = static_cast<unsigned>(bytes / step);
    for (unsigned i = threadIdx.x; i < Tile<T>::kKeys * steps; i += kBlockThreads) {
      const int key = first + static_cast<int>(i / steps), byte = static_cast<int>(i % steps) * step;
      unsigned char* to = stage + at + (key - first) * stride + byte;
      if (key >= part.begin && key < part.end) {
        const KeySlot slot = slots[key % kSplit];
        const unsigned char* from = data + slot.page * page_stride + slot.offset * token_stride + byte;
        if (step == 16) {
          cp_async<16>(to, from);
        } else {
          cp_async<4>(to, from);
        }
      } else if (source.as_is) {
        if (step == 16) {
          store_chunk<16>(to, {});
        } else {
          store_chunk<4>(to, {});
        }
      }
    }
  };
  copy(source.data + part.head * source.head_stride, source.page_stride, source.token_stride, source.row_bytes,
       source.copy_bytes, source.at, source.stride);
  if (source.scale && !source.static_scale)
    copy(source.scale + part.head * source.scale_head_stride, source.scale_page_stride, source.scale_token_stride,
         source.scale_bytes, 4, source.scale_at, source.scale_bytes);
}

template <class C, class E>
__device__ inline void read_numbers(const unsigned char* row, int channel, C (&x)[4]) {
  const E* numbers = reinterpret_cast<const E*>(row) + channel;
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = static_cast<C>(load(numbers[e]));
}

template <class C>
__device__ inline void read_plain(DType dtype, const unsigned char* row, int channel, C (&x)[4]) {
  switch (dtype) {
    case DType::kFloat64: return read_numbers<C, double>(row, channel, x);
    case DType::kFloat32: return read_numbers<C, float>(row, channel, x);
    case DType::kFloat16: return read_numbers<C, Half>(row, channel, x);
    default: return read_numbers<C, BFloat16>(row, channel, x);
  }
}

// Codes of a token: its channels are one run in split order.
template <class C>
__device__ inline void read_codes(const Source& source, int head_dim, int group, const unsigned char* row,
                                  const unsigned char* scale, int channel, C (&x)[4]) {
  const int bits = code_bits(source.scheme), bytes = head_dim * bits / 8;  // 4 channels never part: 4 divides bytes
  const int byte = channel % bytes, shift = channel / bytes * bits;
  const bool is_fp8 = source.scheme == kKVFp8E4M3 || source.scheme == kKVFp8E5M2;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t code = static_cast<uint32_t>(row[byte + e]) >> shift & ((1u << bits) - 1);
    const int g = source.static_scale ? 0 : (channel + e) / group;
    if (is_fp8) {
      const auto number = static_cast<uint8_t>(code);
      const float value = source.scheme == kKVFp8E4M3 ? decode_e4m3(number) : decode_e5m2(number);
      x[e] = static_cast<C>(value) * static_cast<C>(reinterpret_cast<const float*>(scale)[g]);
    } else {
      const Half* grid = reinterpret_cast<const Half*>(scale) + 2 * g;
      x[e] = decode_grid<C>(code, load(grid[0]), load(grid[1]));
    }
  }
}

// Codes of keys of kivi: a channel's tokens are runs of `group`.
template <class C>
__device__ inline void read_by_channel(const Source& source, int head_dim, int group, int page_size,
                                       const unsigned char* page, const unsigned char* scale, int offset, int channel,
                                       C (&x)[4]) {
  const int bits = code_bits(source.scheme), bytes = group * bits / 8, in_group = offset % group;
  const unsigned char* run = page + int64_t{channel} * (page_size * bits / 8) + offset / group * bytes;
  const Half* step = reinterpret_cast<const Half*>(scale) + 2 * (offset / group) * head_dim + channel;
  const int byte = in_group % bytes, shift = in_group / bytes * bits;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t code = static_cast<uint32_t>(run[e * (page_size * bits / 8) + byte]) >> shift & ((1u << bits) - 1);
    x[e] = decode_grid<C>(code, load(step[e]), load(step[head_dim + e]));
  }
}

template <class T, class C>
__device__ inline void write_four(T* to, const C (&x)[4]) {
  if constexpr (kTensorCores<T>) {
    store_chunk<8>(to, {{pack<T>(x[0], x[1]), pack<T>(x[2], x[3])}});
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = x[e];
  }
}

// The tile at key `first` as numbers of type T, zeros for keys that nobody may see. A thread has four channels.
template <class T>
__device__ void decode(const Source& source, const AttendArgs& a, const Part& part, const KeySlot* slots, int first,
                       const unsigned char* stage, T* tile) {
  const auto head_dim = static_cast<int>(a.pages.head_dim), group = static_cast<int>(a.pages.group);
  const int per_key = head_dim / 4, keys = kBlockThreads / per_key;  // at once
  const int channel = static_cast<int>(threadIdx.x) % per_key * 4, stride = head_dim + Tile<T>::kPad;
  const unsigned char* data = source.data + part.head * source.head_stride;
  const unsigned char* scales = source.scale + part.head * source.scale_head_stride;
  const int mine = static_cast<int>(threadIdx.x) / per_key;
  if (mine >= keys) return;
  for (int i = mine; i < Tile<T>::kKeys; i += keys) {
    Compute<T> x[4] = {};
    if (first + i >= part.begin && first + i < part.end) {
      const KeySlot slot = slots[(first + i) % kSplit];
      const unsigned char* row = data + slot.page * source.page_stride + slot.offset * source.token_stride;
      const unsigned char* scale =
          scales + slot.page * source.scale_page_stride + slot.offset * source.scale_token_stride;
      if (source.copy_bytes) {
        row = stage + source.at + i * source.stride;
        if (!source.static_scale) scale = stage + source.scale_at + i * source.scale_bytes;
      }
      if (source.scheme == kKVPlain) {
        read_plain(source.dtype, row, channel, x);
      } else if (source.by_channel) {
        read_by_channel(source, head_dim, group, static_cast<int>(a.pages.page_size), row, scale, slot.offset, channel,
                        x);
      } else {
        read_codes(source, head_dim, group, row, scale, channel, x);
      }
    }
    write_four(tile + i * stride + channel, x);
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
    for (int c = 0; c < head_dim; ++c)
#pragma unroll
      for (int n = 0; n < Tile<T>::kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[0][n][e] = fma_(rows[e / 2 * 8 * stride + c], keys[(8 * n + e % 2) * stride + c], s[0][n][e]);
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
    for (int key = 0; key < kKeys; ++key) {
      const T weight[2] = {p[lane / 4 * kStride + key], p[(lane / 4 + 8) * kStride + key]};
#pragma unroll
      for (int n = 0; n < kHeadDim / 32; ++n) {
        const int channel = n / 2 * 64 + 16 * warp_id() + n % 2 * 8 + lane % 4 * 2;
        if (channel >= head_dim) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[0][n][e] = fma_(weight[e / 2], v[key * stride + channel + e % 2], sum[0][n][e]);
      }
    }
  }
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
    if (!k_source.as_is) decode(k_source, a, part, shared.keys, key, stage_of(key), k);
    if (!v_source.as_is) decode(v_source, a, part, shared.keys, key, stage_of(key), v);
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
    if (key < part.clean_begin || key + kKeys > part.clean_end) {
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

// ---------------------------------------------------------------------------------------------------------------------
// The host's side

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
int align(int64_t bytes) { return static_cast<int>(divide_up(bytes, 16) * 16); }

template <class T>
int64_t num_splits(const AttendArgs& a) {
  const int64_t keys = a.max_pages * a.pages.page_size;
  return divide_up(keys < INT32_MAX ? keys : INT32_MAX, kSplit);
}
// Positions of a ring begin anywhere.
int64_t num_ring_splits(const AttendArgs& a) {
  return a.tail_lens && a.pages.tail_size > 0 ? divide_up(a.pages.tail_size - 1, kSplit) + 1 : 0;
}

// `bytes`: which multiples all addresses and lengths are.
bool all_multiples(int64_t bytes, const void* data, std::initializer_list<int64_t> lengths) {
  bool good = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
  for (const int64_t length : lengths) good &= length % bytes == 0;
  return good;
}

template <class T>
Source plain_source(const void* data, DType dtype, int64_t page, int64_t token, int64_t head, int64_t head_dim,
                    DType wanted) {
  const int64_t size = bytes_of(dtype);
  Source s{};
  s.data = static_cast<const unsigned char*>(data);
  s.page_stride = page * size;
  s.token_stride = token * size;
  s.head_stride = head * size;
  s.row_bytes = static_cast<int>(head_dim * size);
  s.scheme = kKVPlain;
  s.dtype = dtype;
  s.as_is = dtype == wanted;
  return s;
}

template <class T>
Source page_source(const KVPages& p, const KVStore& store, bool keys, DType wanted) {
  if (p.scheme == kKVPlain)
    return plain_source<T>(store.data, p.dtype, store.page_stride, store.token_stride, store.head_stride, p.head_dim,
                           wanted);
  const bool is_fp8 = p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2;
  const int64_t scale_size = is_fp8 ? 4 : 2;
  Source s{};
  s.data = static_cast<const unsigned char*>(store.data);
  s.scale = static_cast<const unsigned char*>(store.scale);
  s.page_stride = store.page_stride;
  s.token_stride = store.token_stride;
  s.head_stride = store.head_stride;
  s.scale_page_stride = store.scale_page_stride * scale_size;
  s.scale_token_stride = store.scale_token_stride * scale_size;
  s.scale_head_stride = store.scale_head_stride * scale_size;
  s.row_bytes = static_cast<int>(p.head_dim * code_bits(p.scheme) / 8);
  s.scale_bytes = static_cast<int>(p.head_dim / p.group * 4);  // a float, or two of float16
  s.scheme = p.scheme;
  s.static_scale = p.static_scale;
  s.by_channel = keys && is_kivi(p.scheme);
  return s;
}

// Whether and by how many bytes its rows can be copied asynchronously.
int copy_bytes(const Source& s) {
  if (s.by_channel) return 0;
  if (s.scale && !s.static_scale &&
      !all_multiples(4, s.scale, {s.scale_page_stride, s.scale_token_stride, s.scale_head_stride}))
    return 0;
  for (const int bytes : {16, 4})
    if (all_multiples(bytes, s.data, {s.page_stride, s.token_stride, s.head_stride, s.row_bytes})) return bytes;
  return 0;
}

// Places what is copied asynchronously in a stage; returns its bytes.
template <class T>
int place(Source& s, int at) {
  if (s.copy_bytes == 0) return at;
  s.at = at;
  s.stride = align(s.row_bytes) + (s.as_is ? 16 : 0);
  at += Tile<T>::kKeys * s.stride;
  if (!s.scale || s.static_scale) return at;
  s.scale_at = at;
  return align(at + Tile<T>::kKeys * s.scale_bytes);
}

template <class T>
Plan make_plan(const AttendArgs& a) {
  const KVPages& pages = a.pages;
  const int64_t head_dim = pages.head_dim, group = group_size(a);
  Plan plan{};
  plan.page_splits = static_cast<int>(num_splits<T>(a));
  plan.splits = plan.page_splits + static_cast<int>(num_ring_splits(a));
  plan.sources[0][0] = page_source<T>(pages, pages.k, true, a.dtype);
  plan.sources[0][1] = page_source<T>(pages, pages.v, false, a.dtype);
  for (int i = 0; i < 2; ++i) {
    const KVStore& store = i == 0 ? pages.k : pages.v;
    plan.sources[1][i] = plain_source<T>(store.tail, pages.tail_dtype, store.tail_batch_stride, store.tail_token_stride,
                                         store.tail_head_stride, head_dim, a.dtype);
  }
  const bool has_ring = plan.splits > plan.page_splits;

  const int64_t rows = (a.group_start ? a.num_rows : a.num_slots) * group;
  plan.row_tiles = static_cast<int>(divide_up(rows < Tile<T>::kRows ? rows : Tile<T>::kRows, 16));
  const int tile_rows = 16 * plan.row_tiles;
  plan.tiles_per_request = divide_up(rows, tile_rows);
  plan.num_tiles = a.group_start ? rows / tile_rows + a.batch : plan.tiles_per_request * a.batch;

  auto lay_out = [&] {
    bool decodes = false;
    for (int ring = 0; ring <= has_ring; ++ring) {
      int bytes = 0;
      for (Source& s : plan.sources[ring]) {
        bytes = place<T>(s, bytes);
        decodes |= !s.as_is;
      }
      plan.stage_bytes = bytes > plan.stage_bytes ? bytes : plan.stage_bytes;
    }
    const int tile_bytes = Tile<T>::kKeys * static_cast<int>((head_dim + Tile<T>::kPad) * sizeof(T));
    plan.p = align(tile_rows * static_cast<int64_t>((head_dim + Tile<T>::kPad) * sizeof(T)));
    plan.k = plan.p + align(tile_rows * static_cast<int64_t>((Tile<T>::kKeys + Tile<T>::kPad) * sizeof(T)));
    plan.v = plan.k + (decodes ? tile_bytes : 0);
    plan.stage = plan.v + (decodes ? tile_bytes : 0);
  };
  for (auto& sources : plan.sources)
    for (Source& s : sources) {
      s.copy_bytes = copy_bytes(s);
      s.as_is &= s.copy_bytes != 0;
    }
  lay_out();
  const auto fixed = static_cast<int64_t>(sizeof(Shared<T>));
  auto total = [&](int stages) { return plan.stage + stages * plan.stage_bytes + fixed; };
  if (total(2) > kMaxSharedBytes) {  // decode from the cache itself
    for (auto& sources : plan.sources)
      for (Source& s : sources) s.copy_bytes = 0, s.as_is = false;
    plan.stage_bytes = 0;
    lay_out();
  }
  plan.stages = total(kMaxStages) <= kHalfSharedBytes ? kMaxStages : 2;
  plan.shared_bytes = plan.stage + plan.stages * plan.stage_bytes;

  const int64_t states = a.num_rows * a.num_q_heads * plan.splits;
  plan.out = a.scratch;
  plan.lse = static_cast<Compute<T>*>(a.scratch) + states * head_dim;
  return plan;
}

template <class T, int kHeadDim>
void launch(const AttendArgs& a, const Plan& plan, const Exec& ex) {
  const unsigned blocks = grid_of(plan.num_tiles * plan.splits * a.pages.num_heads);
  FD_ALLOW_SHARED((attend_kernel<T, kHeadDim>), plan.shared_bytes);
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
  const int64_t states = a.num_rows * a.num_q_heads * (num_splits<float>(a) + num_ring_splits(a));
  return states * (a.pages.head_dim + 1) * (a.dtype == DType::kFloat64 ? 8 : 4);
}

void fastdecode::cuda::attend(const AttendArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.batch > 0) FD_LAUNCH(check_kernel, capped_grid(a.batch), kBlockThreads, 0, ex.stream, a);
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}
