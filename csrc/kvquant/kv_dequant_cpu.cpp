#include "kvquant/kv_dequant.h"

#include "core/cpu/kv_rows.h"
#include "core/rows.h"
#include "kvquant/requests.h"

namespace fastdecode::FD_ISA {
namespace {

// Token t of request b, all heads. In double, so that one rounding leads to any dtype: a code times its step plus the
// offset, and an fp8 number times its scale, are exact there.
template <class T>
FD_ROW void write_token(const KVDequantArgs& a, int64_t b, int64_t t, const int32_t* table, int64_t kv_len,
                        int64_t tail_len, double* row) {
  const KVPages& p = a.pages;
  const int64_t D = p.head_dim;
  for (const bool is_key : {true, false}) {
    T* out = static_cast<T*>(is_key ? a.k : a.v) + (b * a.length + t) * p.num_heads * D;
    for (int64_t h = 0; h < p.num_heads; ++h, out += D) {
      if (t >= kv_len) {
        std::memset(out, 0, D * sizeof(T));
        continue;
      }
      if (t < kv_len - tail_len) {
        read_page_row(p, is_key, table[t / p.page_size], t % p.page_size, h, row);
      } else {
        read_ring_row(p, is_key, b, t, h, row);
      }
      for (int64_t d = 0; d < D; ++d) out[d] = store<T, true>(row[d]);
    }
  }
}

}  // namespace

void kv_dequant(const KVDequantArgs& a, const Exec& ex) {
  const KVPages& p = a.pages;
  auto table_of = [&](int64_t b) { return a.page_table + b * a.page_table_stride; };
  auto tail_of = [&](int64_t b) { return a.tail_lens ? a.tail_lens[b] : 0; };
  for (int64_t b = 0; b < a.batch; ++b)
    a.status[b] = read_status(p, table_of(b), a.max_pages, a.kv_lens[b], tail_of(b), a.length);
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_row(ex, a.batch * a.length, 2 * p.num_heads * p.head_dim, nullptr, 0, [&](int64_t r, void*) {
      double row[kMaxHeadDim];
      const int64_t b = r / a.length;
      write_token<T>(a, b, r % a.length, table_of(b), a.status[b] ? 0 : a.kv_lens[b], tail_of(b), row);
    });
  });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(kv_dequant, KVDequantArgs)
