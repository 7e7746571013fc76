// What a block of attend_kernel is given to do: which rows, which keys, who sees what.
#pragma once

#include "attention/attend.h"
#include "core/cuda/device.cuh"
#include "core/dtype.h"

namespace fastdecode::FD_ISA {

inline constexpr int kBlockWarps = 4, kBlockThreads = kBlockWarps * kWarp;
inline constexpr int kSplit = 512;  // keys
inline constexpr int kMaxStages = 3;

// Scores and sums are held as tensor cores leave them (core/cuda/mma.cuh); float and double, which have none that keep
// their precision, get them from ordinary loops.
template <class T>
inline constexpr bool kTensorCores = sizeof(T) == 2;

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
  int64_t page_stride, token_stride, head_stride;  // keys of kivi: token_stride is that of channels
  int64_t scale_page_stride, scale_token_stride, scale_head_stride;
  int head_dim, group, bits;
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

struct KeySlot {
  int page, offset;
};

struct Row {
  int slot, low, high, coded;  // see visible()
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

}  // namespace fastdecode::FD_ISA
