#include "kvquant/kv_flush.h"

#include "core/rows.h"
#include "kvquant/requests.h"
#include "kvquant/row_codec.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int64_t kChannels = 16;  // whose ranges are taken at once

// Tokens first .. first + group - 1 of one head of one request.
template <class T, class C = Compute<T>>
struct Group {
  const KVPages& p;
  int64_t b, head, first, page;

  const T* token(const KVStore& s, int64_t i) const {
    return static_cast<const T*>(s.tail) + tail_at(s, b, (first + i) % p.tail_size, head);
  }

  // kChannels channels from d on, fewer at the end.
  FD_INLINE int32_t encode_keys(int64_t d, int64_t channels) const {
    const int bits = code_bits(p.scheme);
    const int64_t at = first % p.page_size, bytes = p.group * bits / 8;
    Range<C> range[kChannels];
    for (int64_t i = 0; i < p.group; ++i) {
      const T* row = token(p.k, i) + d;
      for (int64_t c = 0; c < channels; ++c) {
        const C x = load(row[c]);
        const bool finite = is_finite(x);
        range[c].low = finite && x < range[c].low ? x : range[c].low;
        range[c].high = finite && x > range[c].high ? x : range[c].high;
        range[c].all_finite &= finite;
      }
    }
    Half* scale = static_cast<Half*>(p.k.scale) + page * p.k.scale_page_stride + head * p.k.scale_head_stride +
                  at / p.group * 2 * p.head_dim + d;
    uint8_t* data = static_cast<uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride +
                    d * (p.page_size * bits / 8) + at * bits / 8;
    int32_t status = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const Range<C>& r = range[c];
      const bool any = r.low <= r.high;
      const C low = coded_limit(r.low, any), high = coded_limit(r.high, any);
      if (!r.all_finite) status |= kStatusNaN;
      if (any && (r.low < low || r.high > high)) status |= kStatusSaturated;
      const Grid grid = make_grid(low, high, (1 << bits) - 1);
      scale[c] = grid.step;
      scale[p.head_dim + c] = grid.offset;
      const Coder<C> coder(grid, low, high);
      uint8_t* run = data + c * (p.page_size * bits / 8);
      for (int64_t j = 0; j < bytes; ++j) {
        uint32_t byte = 0;
        for (int64_t part = 0; part < 8 / bits; ++part)
          byte |= coder.code(static_cast<C>(load(token(p.k, j + part * bytes)[d + c]))) << (bits * part);
        run[j] = static_cast<uint8_t>(byte);
      }
    }
    return status;
  }

  int32_t encode() const {
    int32_t status = 0;
    for (int64_t d = 0; d < p.head_dim; d += kChannels)
      status |= encode_keys(d, d + kChannels < p.head_dim ? kChannels : p.head_dim - d);
    C row[kMaxHeadDim];
    for (int64_t i = 0; i < p.group; ++i) {
      const int64_t offset = (first + i) % p.page_size;
      load_row(token(p.v, i), p.head_dim, row);
      const IntRow<C> codes{row, static_cast<uint8_t*>(p.v.data) + token_at(p.v, page, offset, head),
                            static_cast<Half*>(p.v.scale) + scale_at(p.v, page, offset, head)};
      status |= encode_int_rows(&codes, 1, p.head_dim, p.group, code_bits(p.scheme));
    }
    return status;
  }
};

}  // namespace

void kv_flush(const KVFlushArgs& a, const Exec& ex) {
  const KVPages& p = a.pages;
  for (int64_t b = 0; b < a.batch; ++b) a.status[b] = flush_status(a, b);
  const int64_t groups = p.tail_size / p.group;
  dispatch_logits(p.tail_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_row(ex, a.batch * p.num_heads * groups, 2 * p.group * p.head_dim, nullptr, 0, [&](int64_t r, void*) {
      const int64_t b = r / groups / p.num_heads, head = r / groups % p.num_heads;
      const int64_t first = a.begin[b] + r % groups * p.group;
      // Other rows of the request may add bits at the same time, none of which is an error of its lengths or pages.
      if (__atomic_load_n(&a.status[b], __ATOMIC_RELAXED) & (kStatusBadLength | kStatusBadPage)) return;
      if (first >= a.end[b]) return;
      const int64_t page = a.page_table[b * a.page_table_stride + first / p.page_size];
      const int32_t status = Group<T>{p, b, head, first, page}.encode();
      if (status) __atomic_fetch_or(&a.status[b], status, __ATOMIC_RELAXED);
    });
  });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(kv_flush, KVFlushArgs)
