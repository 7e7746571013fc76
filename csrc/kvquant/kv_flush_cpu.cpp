#include "kvquant/kv_flush.h"

#include "core/rows.h"
#include "kvquant/requests.h"
#include "kvquant/row_codec.h"

namespace fastdecode::FD_ISA {
namespace {

// Of sixteen channels.
template <class C>
struct LaneCoder {
  Lanes<C> offset, step, half, inverse;
};

// Tokens first .. first + group - 1 of one head of one request.
template <class T, class C = Compute<T>>
struct Group {
  const KVPages& p;
  int64_t b, head, first, page;
  int64_t slot = first % p.tail_size, at = first % p.page_size;
  int bits = code_bits(p.scheme);
  int64_t bytes = p.group * bits / 8, run_bytes = p.page_size * bits / 8;  // of a channel's codes, here and of the page

  FD_INLINE const T* token(const KVStore& s, int64_t i) const {
    const int64_t place = slot + i < p.tail_size ? slot + i : slot + i - p.tail_size;
    return static_cast<const T*>(s.tail) + tail_at(s, b, place, head);
  }
  Half* key_scale(int64_t d) const {
    return static_cast<Half*>(p.k.scale) + page * p.k.scale_page_stride + head * p.k.scale_head_stride +
           at / p.group * 2 * p.head_dim + d;
  }
  uint8_t* key_run(int64_t d) const {
    return static_cast<uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride + d * run_bytes +
           at * bits / 8;
  }

  FD_ROW int32_t encode_channel(int64_t d) const {
    Range<C> r;
    for (int64_t i = 0; i < p.group; ++i) {
      const C x = load(token(p.k, i)[d]);
      const bool finite = is_finite(x);
      r.low = finite && x < r.low ? x : r.low;
      r.high = finite && x > r.high ? x : r.high;
      r.all_finite &= finite;
    }
    Half scale[2];
    int32_t status = 0;
    const GroupCode<C> code = code_group(r, (1 << bits) - 1, scale, status);
    key_scale(d)[0] = scale[0];
    key_scale(d)[p.head_dim] = scale[1];
    uint8_t* run = key_run(d);
    for (int64_t j = 0; j < bytes; ++j) {
      uint32_t byte = 0;
      for (int64_t part = 0; part < 8 / bits; ++part)
        byte |= code.coder.code(load(token(p.k, j + part * bytes)[d])) << (bits * part);
      run[j] = static_cast<uint8_t>(byte);
    }
    return status;
  }

  // Sixteen channels; false if one has a value that does not count for its range, or that is beyond float16.
  FD_ROW bool encode_channels(int64_t d) const {
    Lanes<C> low = Lanes<C>{} + kInf<C>, high = Lanes<C>{} - kInf<C>;
    LaneBits<C> odd = {};
    for (int64_t i = 0; i < p.group; ++i) {
      const Lanes<C> x = load_lanes(token(p.k, i) + d);
      low = x < low ? x : low;
      high = x > high ? x : high;
      odd |= (LaneBits<C>)(x - x);  // 0, or NaN
    }
    odd |= (LaneBits<C>)(low < C(-kLargestHalf)) | (LaneBits<C>)(high > C(kLargestHalf));
    if (any_bit(odd)) return false;
    LaneCoder<C> coder;
    Half* scale = key_scale(d);
    int32_t status = 0;
    for (int64_t c = 0; c < kWide; ++c) {
      Half own[2];
      const Coder<C> one = code_group<C>({low[c], high[c], true}, (1 << bits) - 1, own, status).coder;
      scale[c] = own[0];
      scale[p.head_dim + c] = own[1];
      coder.offset[c] = one.offset, coder.step[c] = one.step, coder.half[c] = one.half, coder.inverse[c] = one.inverse;
    }
    uint8_t* run = key_run(d);
    for (int64_t j = 0; j < bytes; ++j) {
      LaneBits<C> all = {};
      for (int64_t part = 0; part < 8 / bits; ++part)
        all |= codes_of<C>(coder, load_lanes(token(p.k, j + part * bytes) + d)) << static_cast<int>(bits * part);
      const auto some = __builtin_convertvector(all, Bytes16);
      for (int64_t c = 0; c < kWide; ++c) run[c * run_bytes + j] = some[c];
    }
    return true;
  }

  FD_ROW int32_t encode_values() const {
    constexpr int64_t kRows = 8;  // at once
    C buffer[kRows * kMaxHeadDim];
    int32_t status = 0;
    for (int64_t i = 0; i < p.group; i += kRows) {
      IntRow<C> rows[kRows];
      const int64_t count = p.group - i < kRows ? p.group - i : kRows;
      for (int64_t r = 0; r < count; ++r) {
        load_row(token(p.v, i + r), p.head_dim, buffer + r * p.head_dim);
        rows[r] = {buffer + r * p.head_dim, static_cast<uint8_t*>(p.v.data) + token_at(p.v, page, at + i + r, head),
                   static_cast<Half*>(p.v.scale) + scale_at(p.v, page, at + i + r, head)};
      }
      status |= encode_int_rows(rows, count, p.head_dim, p.group, bits);
    }
    return status;
  }

  int32_t encode() const {
    int32_t status = encode_values();
    for (int64_t d = 0; d < p.head_dim;) {
      if (d + kWide <= p.head_dim && encode_channels(d)) {
        d += kWide;
        continue;
      }
      const int64_t end = d + kWide < p.head_dim ? d + kWide : p.head_dim;
      for (; d < end; ++d) status |= encode_channel(d);
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
