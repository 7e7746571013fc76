#include "core/cuda/vector.cuh"
#include "core/kv_codec.h"
#include "kvquant/kv_keep.h"
#include "kvquant/requests.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kKeepThreads = 128;

__global__ void __launch_bounds__(kKeepThreads) keep_status_kernel(KVKeepArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kKeepThreads + threadIdx.x;
  if (b < a.batch) a.status[b] = keep_status(a, b);
}

// One of the tensors of a cache: rows of bytes.
struct Rows {
  char* data;
  int64_t bytes, page, token, head;  // of a row, and between pages (or rings), tokens, heads
};

// The same kUnit bytes of every row belong to one thread, which moves them in the order of the path: so no row is
// overwritten before it was read, without any barrier.
template <int kUnit>
__device__ void keep_rows(const KVKeepArgs& a, const Rows& rows, int64_t b, int64_t head) {
  const KVPages& p = a.pages;
  const bool ring = is_kivi(p.scheme);
  const int32_t* path = a.path + b * a.path_stride;
  const int32_t* table = ring ? nullptr : a.page_table + b * a.page_table_stride;
  const int64_t base = a.base_lens[b], count = a.num_keep[b], size = ring ? p.tail_size : p.page_size;
  auto row = [&](int64_t position) {
    const int64_t page = ring ? b : table[position / size];
    return rows.data + page * rows.page + position % size * rows.token + head * rows.head;
  };
  for (int64_t at = int64_t{threadIdx.x} * kUnit; at < rows.bytes; at += kKeepThreads * kUnit) {
    for (int64_t i = 0; i < count; ++i) {
      if (path[i] == i) continue;
      const char* from = row(base + path[i]) + at;
      char* to = row(base + i) + at;
      if constexpr (kUnit == 16) {
        store_chunk<16>(to, load_chunk<16>(from));
      } else if constexpr (kUnit == 4) {
        store_chunk<4>(to, load_chunk<4>(from));
      } else {
        *to = *from;
      }
    }
  }
}

// The four tensors that hold rows; bytes = 0 where there is none.
struct Tensors {
  Rows rows[4];
};

__global__ void __launch_bounds__(kKeepThreads) keep_kernel(KVKeepArgs a, Tensors tensors, int unit) {
  const int64_t r = blockIdx.x, b = r / 4 / a.pages.num_heads, head = r / 4 % a.pages.num_heads;
  const Rows& rows = tensors.rows[r % 4];
  if (rows.bytes == 0 || a.status[b]) return;
  if (unit == 16) {
    keep_rows<16>(a, rows, b, head);
  } else if (unit == 4) {
    keep_rows<4>(a, rows, b, head);
  } else {
    keep_rows<1>(a, rows, b, head);
  }
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

Rows data_rows(const KVPages& p, const KVStore& s) {
  if (is_kivi(p.scheme)) {
    const int64_t each = bytes_of(p.tail_dtype);
    return {static_cast<char*>(s.tail), p.head_dim * each, s.tail_batch_stride * each, s.tail_token_stride * each,
            s.tail_head_stride * each};
  }
  const int bits = code_bits(p.scheme);
  const int64_t each = bits ? 1 : bytes_of(p.dtype);
  return {static_cast<char*>(s.data), bits ? p.head_dim * bits / 8 : p.head_dim * each, s.page_stride * each,
          s.token_stride * each, s.head_stride * each};
}

Rows scale_rows(const KVPages& p, const KVStore& s) {
  if (p.scheme == kKVPlain || is_kivi(p.scheme) || p.static_scale) return {};
  const int64_t each = p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2 ? 4 : 2;
  return {static_cast<char*>(s.scale), p.head_dim / p.group * 4, s.scale_page_stride * each,
          s.scale_token_stride * each, s.scale_head_stride * each};
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::kv_keep(const KVKeepArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  const KVPages& p = a.pages;
  if (a.batch == 0) return;
  FD_LAUNCH(keep_status_kernel, grid_of((a.batch + kKeepThreads - 1) / kKeepThreads), kKeepThreads, 0, ex.stream, a);
  if (p.num_heads == 0 || a.max_keep == 0) return;
  const Tensors tensors{{data_rows(p, p.k), data_rows(p, p.v), scale_rows(p, p.k), scale_rows(p, p.v)}};
  int64_t all = 16;  // its lowest bit is that of every address and size
  for (const Rows& rows : tensors.rows)
    all |= reinterpret_cast<intptr_t>(rows.data) | rows.bytes | rows.page | rows.token | rows.head;
  const int unit = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
  FD_LAUNCH(keep_kernel, grid_of(a.batch * p.num_heads * 4), kKeepThreads, 0, ex.stream, a, tensors, unit);
}
