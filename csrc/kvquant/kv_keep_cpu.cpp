#include "kvquant/kv_keep.h"

#include <cstring>

#include "core/kv_codec.h"
#include "core/rows.h"
#include "kvquant/requests.h"

namespace fastdecode::FD_ISA {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

void move(void* base, int64_t from, int64_t to, int64_t count, int64_t element) {
  std::memcpy(static_cast<char*>(base) + to * element, static_cast<const char*>(base) + from * element,
              count * element);
}

// One head's row of keys or of values, with its scales.
void move_row(const KVKeepArgs& a, const KVStore& s, int64_t b, int64_t head, int64_t from, int64_t to) {
  const KVPages& p = a.pages;
  if (is_kivi(p.scheme)) {
    return move(s.tail, tail_at(s, b, from % p.tail_size, head), tail_at(s, b, to % p.tail_size, head), p.head_dim,
                element_bytes(p.tail_dtype));
  }
  const int32_t* table = a.page_table + b * a.page_table_stride;
  const int64_t from_page = table[from / p.page_size], from_offset = from % p.page_size;
  const int64_t to_page = table[to / p.page_size], to_offset = to % p.page_size;
  const int bits = code_bits(p.scheme);
  move(s.data, token_at(s, from_page, from_offset, head), token_at(s, to_page, to_offset, head),
       bits ? p.head_dim * bits / 8 : p.head_dim, bits ? 1 : element_bytes(p.dtype));
  if (!bits || p.static_scale) return;
  const bool fp8 = p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2;  // a float a group; else two float16
  move(s.scale, scale_at(s, from_page, from_offset, head), scale_at(s, to_page, to_offset, head),
       p.head_dim / p.group * (fp8 ? 1 : 2), fp8 ? 4 : 2);
}

}  // namespace

void kv_keep(const KVKeepArgs& a, const Exec& ex) {
  const KVPages& p = a.pages;
  for (int64_t b = 0; b < a.batch; ++b) a.status[b] = keep_status(a, b);
  for_each_row(ex, a.batch * p.num_heads, 2 * a.max_keep * p.head_dim, nullptr, 0, [&](int64_t r, void*) {
    const int64_t b = r / p.num_heads, head = r % p.num_heads, base = a.base_lens[b];
    if (a.status[b]) return;
    const int32_t* path = a.path + b * a.path_stride;
    for (int64_t i = 0; i < a.num_keep[b]; ++i) {
      if (path[i] == i) continue;
      move_row(a, p.k, b, head, base + path[i], base + i);
      move_row(a, p.v, b, head, base + path[i], base + i);
    }
  });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(kv_keep, KVKeepArgs)
