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

// A head's row to where it belongs: row `at` of `slot` in pages, or in the rings.
template <class C>
int32_t encode(const KVPages& p, const KVStore& s, int64_t slot, int64_t head, const C* row) {
  const bool ring = is_kivi(p.scheme);
  const int64_t size = ring ? p.tail_size : p.page_size, page = slot / size, offset = slot % size;
  if (ring || p.scheme == kKVPlain) {
    void* data = ring ? s.tail : s.data;
    const int64_t at = ring ? tail_at(s, page, offset, head) : token_at(s, page, offset, head);
    int32_t status = 0;
    dispatch_logits(ring ? p.tail_dtype : p.dtype, [&](auto tag) {
      using E = typename decltype(tag)::type;
      status = store_row<E>(row, p.head_dim, static_cast<E*>(data) + at);
    });
    return status;
  }
  uint8_t* data = static_cast<uint8_t*>(s.data) + token_at(s, page, offset, head);
  const int64_t at = scale_at(s, page, offset, head);
  if (p.scheme == kKVInt8 || p.scheme == kKVInt4)
    return encode_int_row(row, p.head_dim, p.group, code_bits(p.scheme), data, static_cast<Half*>(s.scale) + at);
  float* scale = static_cast<float*>(s.scale) + at;
  if (p.scheme == kKVFp8E4M3) return encode_fp8_row<E4M3>(row, p.head_dim, p.group, data, scale, p.static_scale);
  return encode_fp8_row<E5M2>(row, p.head_dim, p.group, data, scale, p.static_scale);
}

template <class T, class C = Compute<T>>
int32_t append_token(const KVAppendArgs& a, int64_t t) {
  const KVPages& p = a.pages;
  const int64_t slot = a.slots[t], D = p.head_dim;
  const int64_t num_slots = is_kivi(p.scheme) ? p.tail_batch * p.tail_size : p.num_pages * p.page_size;
  if (slot < -1 || slot >= num_slots) return kStatusBadPage;
  const C* cosine = nullptr;
  if (a.rope) {
    const int64_t position =
        a.positions_are_32 ? static_cast<const int32_t*>(a.positions)[t] : static_cast<const int64_t*>(a.positions)[t];
    if (position < 0 || position >= a.num_positions) return kStatusBadPage;
    cosine = static_cast<const C*>(a.rope) + position * (D / 2 * 2);
  }
  C row[kMaxHeadDim];
  for (int64_t h = 0; a.q && h < a.num_q_heads; ++h) {
    T* q = static_cast<T*>(a.q) + t * a.q_token_stride + h * a.q_head_stride;
    rotate(q, cosine, D, a.interleaved, row);
    for (int64_t i = 0; i < D; ++i) q[i] = store<T, false>(row[i]);
  }
  if (slot < 0) return 0;
  int32_t status = 0;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    const T* k = static_cast<const T*>(a.k) + t * a.k_token_stride + h * a.k_head_stride;
    const T* v = static_cast<const T*>(a.v) + t * a.v_token_stride + h * a.v_head_stride;
    if (cosine) {
      rotate(k, cosine, D, a.interleaved, row);
    } else {
      load_row(k, D, row);
    }
    status |= encode(p, p.k, slot, h, row);
    load_row(v, D, row);
    status |= encode(p, p.v, slot, h, row);
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
