#include "kvquant/kv_append.h"

#include "core/rows.h"
#include "kvquant/row_codec.h"

namespace fastdecode::FD_ISA {
namespace {

// Pairs of channels turned by their angle.
template <class T, class C>
FD_ROW void rotate(const T* x, const C* cosine, int64_t head_dim, bool interleaved, C* out) {
  const int64_t half = head_dim / 2;
  const C* sine = cosine + half;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
    const C a = load(x[first]), b = load(x[second]);
    const Pair<T> turned = rotate_pair<T>(a, b, cosine[i], sine[i]);
    out[first] = load(turned.first);
    out[second] = load(turned.second);
  }
}

// Where a token goes: a page, or a ring, and its row there.
struct Slot {
  int64_t page, offset;
};

template <class C>
int32_t store_plain(const KVPages& p, const KVStore& s, const Slot& slot, int64_t head, const C* row) {
  const bool ring = is_kivi(p.scheme);
  void* data = ring ? s.tail : s.data;
  const int64_t at = ring ? tail_at(s, slot.page, slot.offset, head) : token_at(s, slot.page, slot.offset, head);
  int32_t status = 0;
  dispatch_logits(ring ? p.tail_dtype : p.dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    status = store_row<E>(row, p.head_dim, static_cast<E*>(data) + at);
  });
  return status;
}

template <class C>
int32_t store_fp8(const KVPages& p, const KVStore& s, const Slot& slot, int64_t head, const C* row) {
  uint8_t* data = static_cast<uint8_t*>(s.data) + token_at(s, slot.page, slot.offset, head);
  float* scale = static_cast<float*>(s.scale) + scale_at(s, slot.page, slot.offset, head);
  if (p.scheme == kKVFp8E4M3) return encode_fp8_row<E4M3>(row, p.head_dim, p.group, data, scale, p.static_scale);
  return encode_fp8_row<E5M2>(row, p.head_dim, p.group, data, scale, p.static_scale);
}

template <class T, class C = Compute<T>>
int32_t append_token(const KVAppendArgs& a, int64_t t) {
  const KVPages& p = a.pages;
  const int64_t index = a.slots[t], D = p.head_dim, size = is_kivi(p.scheme) ? p.tail_size : p.page_size;
  if (index < -1 || index >= (is_kivi(p.scheme) ? p.tail_batch : p.num_pages) * size) return kStatusBadPage;
  const C* cosine = nullptr;
  if (a.rope) {
    const int64_t position =
        a.positions_are_32 ? static_cast<const int32_t*>(a.positions)[t] : static_cast<const int64_t*>(a.positions)[t];
    if (position < 0 || position >= a.num_positions) return kStatusBadPage;
    cosine = static_cast<const C*>(a.rope) + position * (D / 2 * 2);
  }
  constexpr int64_t kRows = 16;  // at once
  alignas(64) C buffer[kRows * kMaxHeadDim / 2];
  for (int64_t h = 0; a.q && h < a.num_q_heads; ++h) {
    T* q = static_cast<T*>(a.q) + t * a.q_token_stride + h * a.q_head_stride;
    rotate(q, cosine, D, a.interleaved, buffer);
    for (int64_t i = 0; i < D; ++i) q[i] = store<T, false>(buffer[i]);
  }
  if (index < 0) return 0;
  const Slot slot{index / size, index % size};
  const bool is_int = p.scheme == kKVInt8 || p.scheme == kKVInt4;
  const int64_t heads = p.num_heads, at_once = 2 * D > kMaxHeadDim ? kRows / 2 : kRows;
  int32_t status = 0;
  for (int64_t first = 0; first < 2 * heads; first += at_once) {
    const int64_t count = 2 * heads - first < at_once ? 2 * heads - first : at_once;
    IntRow<C> rows[kRows];
    for (int64_t r = 0; r < count; ++r) {
      const bool is_key = first + r < heads;
      const int64_t head = is_key ? first + r : first + r - heads;
      const KVStore& s = is_key ? p.k : p.v;
      const T* x = is_key ? static_cast<const T*>(a.k) + t * a.k_token_stride + head * a.k_head_stride
                          : static_cast<const T*>(a.v) + t * a.v_token_stride + head * a.v_head_stride;
      C* row = buffer + r * D;
      rows[r].x = row;
      if (is_key && cosine) {
        rotate(x, cosine, D, a.interleaved, row);
      } else if constexpr (std::is_same_v<T, C>) {
        rows[r].x = x;
      } else {
        load_row(x, D, row);
      }
      if (is_int) {
        rows[r].data = static_cast<uint8_t*>(s.data) + token_at(s, slot.page, slot.offset, head);
        rows[r].scale = static_cast<Half*>(s.scale) + scale_at(s, slot.page, slot.offset, head);
      } else if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
        status |= store_fp8(p, s, slot, head, rows[r].x);
      } else {
        status |= store_plain(p, s, slot, head, rows[r].x);
      }
    }
    if (is_int) status |= encode_int_rows(rows, count, D, p.group, code_bits(p.scheme));
  }
  return status;
}

}  // namespace

void kv_append(const KVAppendArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t elements = (2 * a.pages.num_heads + (a.q ? a.num_q_heads : 0)) * a.pages.head_dim;
    for_each_row(ex, a.num_tokens, elements, nullptr, 0,
                 [&](int64_t t, void*) { a.status[t] = append_token<T>(a, t); });
  });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(kv_append, KVAppendArgs)
