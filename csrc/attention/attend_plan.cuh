// The host's part of attend_cuda.cu: how a call is cut up, and where everything lies in shared memory.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include "attention/attend.cuh"

namespace fastdecode::FD_ISA {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
inline int align(int64_t bytes) { return static_cast<int>(divide_up(bytes, 16) * 16); }

inline int64_t num_page_splits(const AttendArgs& a) {
  const int64_t keys = a.max_pages * a.pages.page_size;
  return divide_up(keys < INT32_MAX ? keys : INT32_MAX, kSplit);
}
// Positions of a ring begin anywhere.
inline int64_t num_ring_splits(const AttendArgs& a) {
  return a.tail_lens && a.pages.tail_size > 0 ? divide_up(a.pages.tail_size - 1, kSplit) + 1 : 0;
}

// `bytes`: which multiples all addresses and lengths are.
inline bool all_multiples(int64_t bytes, const void* data, std::initializer_list<int64_t> lengths) {
  bool good = reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
  for (const int64_t length : lengths) good &= length % bytes == 0;
  return good;
}

inline Source plain_source(const void* data, DType dtype, int64_t page, int64_t token, int64_t head, int64_t head_dim,
                           DType wanted) {
  const int64_t size = bytes_of(dtype);
  Source s{};
  s.data = static_cast<const unsigned char*>(data);
  s.page_stride = page * size;
  s.token_stride = token * size;
  s.head_stride = head * size;
  s.row_bytes = static_cast<int>(head_dim * size);
  s.head_dim = static_cast<int>(head_dim);
  s.scheme = kKVPlain;
  s.dtype = dtype;
  s.as_is = dtype == wanted;
  return s;
}

inline Source page_source(const KVPages& p, const KVStore& store, bool keys, DType wanted) {
  if (p.scheme == kKVPlain)
    return plain_source(store.data, p.dtype, store.page_stride, store.token_stride, store.head_stride, p.head_dim,
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
  s.head_dim = static_cast<int>(p.head_dim);
  s.group = static_cast<int>(p.group);
  s.bits = code_bits(p.scheme);
  s.row_bytes = s.head_dim * s.bits / 8;
  s.scale_bytes = static_cast<int>(p.head_dim / p.group * 4);  // a float, or two of float16
  s.scheme = p.scheme;
  s.static_scale = p.static_scale;
  s.by_channel = keys && is_kivi(p.scheme);
  if (s.by_channel) {
    s.token_stride = p.page_size * s.bits / 8;
    s.row_bytes = s.group * s.bits / 8;
    s.scale_bytes = 4 * s.head_dim;
  }
  return s;
}

// Whether and by how many bytes its rows, or its channels' runs, can be copied asynchronously.
inline int copy_bytes(const Source& s, int tile_keys) {
  if (s.by_channel && tile_keys % s.group != 0) return 0;
  if (s.scale && !s.static_scale &&
      !all_multiples(4, s.scale, {s.scale_page_stride, s.scale_token_stride, s.scale_head_stride}))
    return 0;
  for (const int bytes : {16, 8, 4})
    if (all_multiples(bytes, s.data, {s.page_stride, s.token_stride, s.head_stride, s.row_bytes})) return bytes;
  return 0;
}

// Places what is copied asynchronously in a stage; returns its bytes.
template <class T>
int place(Source& s, int at) {
  if (s.copy_bytes == 0) return at;
  const int groups = s.by_channel ? Tile<T>::kKeys / s.group : 0;
  s.at = at;
  s.stride = align(s.row_bytes) + (s.as_is ? 16 : 0);
  at = align(at + (s.by_channel ? groups * s.head_dim * s.row_bytes : Tile<T>::kKeys * s.stride));
  if (!s.scale || s.static_scale) return at;
  s.scale_at = at;
  return align(at + (s.by_channel ? groups : Tile<T>::kKeys) * s.scale_bytes);
}

// Cuts the query rows of a request, or of all groups, into tiles of 16 * row_tiles.
inline void cut_rows(const AttendArgs& a, int row_tiles, Plan& plan) {
  const int64_t rows = (a.group_start ? a.num_rows : a.num_slots) * group_size(a), tile = 16 * row_tiles;
  plan.row_tiles = row_tiles;
  plan.tiles_per_request = divide_up(rows, tile);
  plan.num_tiles = a.group_start ? rows / tile + a.batch : plan.tiles_per_request * a.batch;
}

template <class T>
void lay_out(int64_t head_dim, bool has_ring, Plan& plan) {
  bool decodes = false;
  plan.stage_bytes = 0;
  for (int ring = 0; ring <= has_ring; ++ring) {
    int bytes = 0;
    for (Source& s : plan.sources[ring]) {
      s.as_is &= s.copy_bytes != 0;
      bytes = place<T>(s, bytes);
      decodes |= !s.as_is;
    }
    plan.stage_bytes = bytes > plan.stage_bytes ? bytes : plan.stage_bytes;
  }
  constexpr int kSize = sizeof(T), kPad = Tile<T>::kPad, kKeys = Tile<T>::kKeys;
  const int64_t rows = 16 * plan.row_tiles, tile_bytes = decodes ? kKeys * (head_dim + kPad) * kSize : 0;
  plan.p = align(rows * (head_dim + kPad) * kSize);
  plan.k = plan.p + align(rows * (kKeys + kPad) * kSize);
  plan.v = plan.k + align(tile_bytes);
  plan.stage = plan.v + align(tile_bytes);
}

// Nothing here changes a bit of any row.
template <class T>
Plan make_plan(const AttendArgs& a) {
  const KVPages& pages = a.pages;
  Plan plan{};
  plan.page_splits = static_cast<int>(num_page_splits(a));
  plan.splits = plan.page_splits + static_cast<int>(num_ring_splits(a));
  const bool has_ring = plan.splits > plan.page_splits;
  for (int i = 0; i < 2; ++i) {
    const KVStore& store = i == 0 ? pages.k : pages.v;
    plan.sources[0][i] = page_source(pages, store, i == 0, a.dtype);
    plan.sources[1][i] = plain_source(store.tail, pages.tail_dtype, store.tail_batch_stride, store.tail_token_stride,
                                      store.tail_head_stride, pages.head_dim, a.dtype);
  }
  for (auto& sources : plan.sources)
    for (Source& s : sources) s.copy_bytes = copy_bytes(s, Tile<T>::kKeys);
  const int64_t rows = (a.group_start ? a.num_rows : a.num_slots) * group_size(a), most = Tile<T>::kRows;
  cut_rows(a, static_cast<int>(divide_up(rows < most ? rows : most, 16)), plan);
  lay_out<T>(pages.head_dim, has_ring, plan);

  const auto fixed = static_cast<int64_t>(sizeof(Shared<T>));
  const int64_t limit = shared_limit();
  auto total = [&](int stages) { return plan.stage + int64_t{stages} * plan.stage_bytes + fixed; };
  if (total(2) > limit) {  // no room for stages: decode from the cache itself
    for (auto& sources : plan.sources)
      for (Source& s : sources) s.copy_bytes = 0;
    lay_out<T>(pages.head_dim, has_ring, plan);
  }
  while (total(2) > limit && plan.row_tiles > 1) {
    cut_rows(a, plan.row_tiles - 1, plan);
    lay_out<T>(pages.head_dim, has_ring, plan);
  }
  if (total(2) > limit)
    throw std::invalid_argument("attention: this GPU has too little shared memory for the head_dim");
  plan.stages = total(kMaxStages) <= limit / 2 - 1024 ? kMaxStages : 2;  // only where two blocks still fit side by side
  plan.shared_bytes = plan.stage + plan.stages * plan.stage_bytes;

  const int64_t states = a.num_rows * a.num_q_heads * plan.splits;
  plan.out = a.scratch;
  plan.lse = static_cast<Compute<T>*>(a.scratch) + states * pages.head_dim;
  return plan;
}

}  // namespace fastdecode::FD_ISA
