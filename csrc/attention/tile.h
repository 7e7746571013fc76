// The keys and values of a tile in the forms that products want, one class for each kind of arithmetic. A class says
// in which order its sums over values hold the channels, and takes 0 for keys that nobody sees.
#pragma once

#include "attention/load_token.h"
#include "attention/product.h"

namespace fastdecode::FD_ISA {

inline constexpr int64_t kRows = 128;  // queries, times their heads that share a key, that see a tile once loaded

constexpr int64_t round_up(int64_t n, int64_t unit = 64) { return ceil_div(n, unit) * unit; }

// Rows of a sequence that share one kv head: node 0 with each of its `heads`, node 1, ...
struct Block {
  Sequence s;
  int64_t kv_head, heads, first, rows;

  int64_t node(int64_t r) const { return (first + r) / heads; }
  int64_t head(int64_t r) const { return kv_head * heads + (first + r) % heads; }
  const std::byte* query(const AttendArgs& a, int64_t r) const {
    return s.q + (node(r) * a.q_slot_stride + head(r) * a.q_head_stride) * element_size(a.dtype);
  }
};

// Pieces of one allocation, each on a cache line; of none, to count its bytes.
class Carve {
 public:
  explicit Carve(void* memory) : memory_(static_cast<std::byte*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)));
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  template <class T>
  T* take_zeros(int64_t count) {
    T* here = take<T>(count);
    if (here) std::memset(static_cast<void*>(here), 0, count * sizeof(T));
    return here;
  }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  int64_t bytes_ = 0;
};

// use(i, page, offset) for the tokens first + i of a sequence whose bit i is set.
template <class Use>
FD_INLINE void for_each_token(const KVPages& p, const Sequence& s, int64_t first, uint64_t any, const Use& use) {
  int64_t index = first / p.page_size, offset = first % p.page_size;
  for (int64_t i = 0; i < kKeys; ++i) {
    if (any >> i & 1) use(i, int64_t{s.table[index]}, offset);
    if (++offset == p.page_size) ++index, offset = 0;
  }
}

#if FD_CPU_LEVEL >= 4
// Rows of keys and values of a tile, and of the one behind it, which is fetched into the cache meanwhile. `nothing`
// stands for tokens that are not read.
struct Rows {
  const std::byte *k[2 * kKeys], *v[2 * kKeys];

  template <class At>
  Rows(const KVPages& p, const Sequence& s, int64_t first, uint64_t any, const void* nothing, const At& at) {
    for (int64_t i = 0; i < 2 * kKeys; ++i) k[i] = v[i] = static_cast<const std::byte*>(nothing);
    for_each_token(p, s, first, any, [&](int64_t i, int64_t page, int64_t offset) { at(i, page, offset, k[i], v[i]); });
    const int64_t next = first + kKeys;
    if (next >= s.coded_end) return;
    for_each_token(p, s, next, bits_between(0, s.coded_end - next), [&](int64_t i, int64_t page, int64_t offset) {
      at(kKeys + i, page, offset, k[kKeys + i], v[kKeys + i]);
    });
  }
};

// Rows of one head of a store, found by one addition within a page.
struct RowFinder {
  const std::byte *data, *page_data = nullptr;
  int64_t page_bytes, token_bytes, page = -1;

  RowFinder(const void* data_, int64_t size, int64_t page_stride, int64_t token_stride, int64_t head_offset)
      : data(static_cast<const std::byte*>(data_) + size * head_offset),
        page_bytes(size * page_stride),
        token_bytes(size * token_stride) {}
  static RowFinder codes(const KVStore& s, int64_t size, int64_t head) {
    return {s.data, size, s.page_stride, s.token_stride, head * s.head_stride};
  }
  static RowFinder scales(const KVStore& s, int64_t size, int64_t head) {
    return {s.scale, size, s.scale_page_stride, s.scale_token_stride, head * s.scale_head_stride};
  }
  FD_INLINE const std::byte* operator()(int64_t page_, int64_t offset) {
    if (page_ != page) page = page_, page_data = data + page * page_bytes;
    return page_data + offset * token_bytes;
  }
};

FD_INLINE void fetch(const void* row, int64_t byte) { _mm_prefetch(static_cast<const char*>(row) + byte, _MM_HINT_T1); }

// to [i * kKeys + key] = row `key` [i] for 16 keys and i < n.
FD_ROW inline void transpose(const std::byte* const* rows, int64_t n, uint32_t* to) {
  for (int64_t first = 0; first < n; first += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) fetch(rows[kKeys + i], 4 * first);
    const int64_t left = n - first;
    const __mmask16 inside = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    __m512i x[16], y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_maskz_loadu_epi32(inside, rows[i] + 4 * first);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
      x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
      x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
      x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // x[4 * block + i]: rows 4 * block and on, columns i, i + 4, i + 8, i + 12
      y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
      y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
      y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i column[4] = {
          _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88), _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88),
          _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd), _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        if (first + 4 * j + i < n) _mm512_storeu_si512(to + (first + 4 * j + i) * kKeys, column[j]);
    }
  }
}
#endif

// float or double: everything is converted to C.
template <class C>
class NumberTile {
 public:
  using Compute = C;

  NumberTile(const AttendArgs& args, Carve& carve)
      : a(args),
        D(args.pages.head_dim),
        q(carve.take<C>(kRows * D)),
        keys(carve.take<C>(kKeys * D)),
        values(carve.take<C>(kKeys * D)),
        rows(carve.take<C>(16 * D)),
        nothing(carve.take_zeros<C>(D)) {}

  static int64_t width(int64_t head_dim) { return head_dim; }
  static int64_t place(int64_t channel) { return channel; }

  void load_queries(const Block& block) {
    for (int64_t r = 0; r < block.rows; ++r) load_plain(a.dtype, block.query(a, r), D, q + r * D);
  }

  void load(const Block& block, bool ring, int64_t first, uint64_t any) {
    const KVPages& p = a.pages;
#if FD_CPU_LEVEL >= 4
    if constexpr (std::is_same_v<C, float>)
      if (!ring && p.scheme == kKVPlain && p.dtype == DType::kFloat32) return load_as_it_is(block, first, any);
#endif
    const bool by_channel = !ring && is_kivi(p.scheme);
    if (by_channel) load_channel_coded(a, block.s, first, any, block.kv_head, keys);
    for (int64_t low = 0; low < kKeys; low += 16) {
      for (int64_t key = low; key < low + 16; ++key) {
        C *row = rows + (key - low) * D, *value = values + key * D;
        if (any >> key & 1) {
          if (!by_channel) load_token(a, true, block.s, ring, first + key, block.kv_head, row);
          load_token(a, false, block.s, ring, first + key, block.kv_head, value);
        } else {
          for (int64_t d = 0; d < D; ++d) row[d] = value[d] = 0;
        }
      }
      if (by_channel) continue;
#if FD_CPU_LEVEL >= 4
      if constexpr (std::is_same_v<C, float>) {
        const std::byte* from[kKeys + 16];
        for (int64_t i = 0; i < 16; ++i) from[i] = from[kKeys + i] = reinterpret_cast<const std::byte*>(rows + i * D);
        transpose(from, D, reinterpret_cast<uint32_t*>(keys) + low);
        continue;
      }
#endif
      for (int64_t d = 0; d < D; ++d)
        for (int64_t i = 0; i < 16; ++i) keys[d * kKeys + low + i] = rows[i * D + d];
    }
  }

  // Whether a weight of 0 hides any value.
  bool hides_values() const {
    LaneBits<C> broken = {};
    for (int64_t i = 0; i < kKeys * D; i += kWide) {
      const Lanes<C> x = load_lanes(values + i);
      broken |= (LaneBits<C>)(x - x != 0);
    }
    return !any_bit(broken);
  }

  // weights [rows, kKeys] = q.k, for rows first and on
  void multiply_keys(int64_t first, int64_t num_rows, C* weights) {
    product<Numbers<C>, false>(num_rows, kKeys, D, q + first * D, D, keys, kKeys, weights, kKeys);
  }
  // totals [rows, width] += weights values
  void add_values(int64_t num_rows, const C* weights, C* totals) {
    product<Numbers<C>, true>(num_rows, D, kKeys, weights, kKeys, values, D, totals, D);
  }

 private:
#if FD_CPU_LEVEL >= 4
  void load_as_it_is(const Block& block, int64_t first, uint64_t any) {
    const KVPages& p = a.pages;
    RowFinder k_row = RowFinder::codes(p.k, 4, block.kv_head), v_row = RowFinder::codes(p.v, 4, block.kv_head);
    const Rows from(p, block.s, first, any, nothing,
                    [&](int64_t, int64_t page, int64_t offset, const std::byte*& k, const std::byte*& v) {
                      k = k_row(page, offset);
                      v = v_row(page, offset);
                    });
    for (int64_t low = 0; low < kKeys; low += 16) transpose(from.k + low, D, reinterpret_cast<uint32_t*>(keys) + low);
    for (int64_t key = 0; key < kKeys; ++key)
      for (int64_t d = 0; d < D; d += 16) {
        fetch(from.v[kKeys + key], 4 * d);
        _mm512_storeu_si512(values + key * D + d, _mm512_loadu_si512(from.v[key] + 4 * d));
      }
  }
#endif

  const AttendArgs& a;
  const int64_t D;
  C *q, *keys, *values, *rows, *nothing;
};

#if FD_CPU_LEVEL >= 4

// bfloat16 queries; keys, values and weights are bfloat16, sums float.
class PairTile {
 public:
  using Compute = float;

  PairTile(const AttendArgs& args, Carve& carve)
      : a(args),
        D(args.pages.head_dim),
        q(carve.take<uint32_t>(kRows * D / 2)),
        keys(carve.take<uint32_t>(kKeys * D / 2)),
        values(carve.take<uint32_t>(kKeys / 2 * width(D))),
        weights16(carve.take<uint32_t>(kRows * kKeys / 2)),
        converted(carve.take<BFloat16>(2 * kKeys * D)),
        numbers(carve.take<float>(D)),
        by_channels(carve.take<float>(is_kivi(args.pages.scheme) ? kKeys * D : 0)),
        nothing(carve.take_zeros<BFloat16>(D)) {}

  // Values of two keys are interleaved within 16 bytes.
  static int64_t width(int64_t head_dim) { return round_up(head_dim, 32); }
  static int64_t place(int64_t channel) {
    return channel / 32 * 32 + channel % 8 / 4 * 16 + channel % 32 / 8 * 4 + channel % 4;
  }

  void load_queries(const Block& block) {
    for (int64_t r = 0; r < block.rows; ++r) std::memcpy(q + r * D / 2, block.query(a, r), D * 2);
  }

  void load(const Block& block, bool ring, int64_t first, uint64_t any) {
    const KVPages& p = a.pages;
    const bool by_channel = !ring && is_kivi(p.scheme);
    const bool direct = !ring && p.scheme == kKVPlain && p.dtype == DType::kBFloat16;
    RowFinder k_row = RowFinder::codes(p.k, 2, block.kv_head), v_row = RowFinder::codes(p.v, 2, block.kv_head);
    Rows rows(p, block.s, first, direct ? any : 0, nothing,
              [&](int64_t, int64_t page, int64_t offset, const std::byte*& k, const std::byte*& v) {
                if (!direct) return;
                k = k_row(page, offset);
                v = v_row(page, offset);
              });
    for (int64_t key = 0; key < kKeys && !direct; ++key) {
      if (!(any >> key & 1)) continue;
      if (!by_channel) {
        load_token(a, true, block.s, ring, first + key, block.kv_head, numbers);
        rows.k[key] = convert(converted + key * D);
      }
      load_token(a, false, block.s, ring, first + key, block.kv_head, numbers);
      rows.v[key] = convert(converted + (kKeys + key) * D);
    }
    if (by_channel) {
      load_channel_coded(a, block.s, first, any, block.kv_head, by_channels);
      for (int64_t i = 0; i < D / 2 * kKeys; i += 16) {  // channels 2 d and 2 d + 1 of sixteen keys
        const float* even = by_channels + i / kKeys * 2 * kKeys + i % kKeys;
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even)));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + kKeys)));
        _mm512_storeu_si512(keys + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    } else {
      for (int64_t low = 0; low < kKeys; low += 16) transpose(rows.k + low, D / 2, keys + low);
    }
    for (int64_t key = 0; key < kKeys; key += 2) {
      uint32_t* to = values + key / 2 * width(D);
      for (int64_t d = 0; d < D; d += 32) {
        const __mmask32 inside = D - d >= 32 ? 0xffffffff : 0xffff;
        fetch(rows.v[kKeys + key], 2 * d);
        fetch(rows.v[kKeys + key + 1], 2 * d);
        const __m512i even = _mm512_maskz_loadu_epi16(inside, rows.v[key] + 2 * d);
        const __m512i odd = _mm512_maskz_loadu_epi16(inside, rows.v[key + 1] + 2 * d);
        _mm512_storeu_si512(to + d, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(to + d + 16, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  bool hides_values() const {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 broken = 0;
    for (int64_t i = 0; i < kKeys / 2 * width(D); i += 16)
      broken |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(values + i), exponent), exponent);
    return !broken;
  }

  void multiply_keys(int64_t first, int64_t num_rows, float* weights) {
    product<Pairs, false>(num_rows, kKeys, D / 2, q + first * D / 2, D / 2, keys, kKeys, weights, kKeys);
  }

  void add_values(int64_t num_rows, const float* weights, float* totals) {
    for (int64_t i = 0; i < num_rows * kKeys; i += 32)
      _mm512_storeu_si512(weights16 + i / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(weights + i + 16),
                                                                          _mm512_loadu_ps(weights + i)));
    product<Pairs, true>(num_rows, width(D), kKeys / 2, weights16, kKeys / 2, values, width(D), totals, width(D));
  }

 private:
  const std::byte* convert(BFloat16* to) const {
    for (int64_t d = 0; d < D; d += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(numbers + d)));
    return reinterpret_cast<const std::byte*>(to);
  }

  const AttendArgs& a;
  const int64_t D;
  uint32_t *q, *keys, *values, *weights16;
  BFloat16* converted;
  float *numbers, *by_channels;
  BFloat16* nothing;
};

// bfloat16 queries, int8 or int4 codes: products of codes are exact integers. Queries are integers of 22 bits in units
// of the row's largest, in three signed bytes: a channel of a thousandth of the largest still has more than bfloat16's
// 8 bits. Weights times steps are integers of 15 bits in units of the tile's largest, in two.
class CodeTile {
  static constexpr int64_t kQueryPlanes = 3;

 public:
  using Compute = float;

  // Whether the vectors below never span two groups.
  static bool takes(const KVPages& p) {
    if (p.scheme != kKVInt8 && p.scheme != kKVInt4) return false;
    return p.group == p.head_dim || (p.group % 64 == 0 && (p.scheme == kKVInt8 || p.head_dim / 2 % p.group == 0));
  }

  CodeTile(const AttendArgs& args, Carve& carve)
      : a(args),
        D(args.pages.head_dim),
        bits(code_bits(args.pages.scheme)),
        bytes(D * bits / 8),
        groups(D / args.pages.group),
        q(carve.take<uint32_t>(kQueryPlanes * kRows * D / 4)),
        q_unit(carve.take<float>(kRows)),
        q_sum(carve.take<float>(kRows * groups)),
        keys(carve.take<uint32_t>(kKeys * D / 4)),
        values(carve.take<uint32_t>(kKeys / 4 * width(D, bits))),
        scales(carve.take<float>(4 * groups * kKeys)),
        raw(carve.take<uint32_t>(2 * groups * kKeys)),
        sums(carve.take<int32_t>(kRows * std::max(kQueryPlanes * kKeys, 2 * width(D, bits)))),
        planes(carve.take<uint32_t>(2 * kRows * kKeys / 4)),
        unit(carve.take<float>(kRows)),
        shift(carve.take<float>(kRows)),
        nothing(carve.take_zeros<uint8_t>(D)) {}

  // Values of four keys are interleaved within 16 bytes; halves of bytes are apart.
  static int64_t width(int64_t head_dim, int64_t bits) { return round_up(head_dim * bits / 8, 64) * 8 / bits; }
  int64_t width(int64_t head_dim) const { return width(head_dim, bits); }
  int64_t place(int64_t channel) const {
    const int64_t half = channel / bytes, byte = channel % bytes;
    return half * round_up(bytes, 64) + byte / 64 * 64 + byte % 16 / 4 * 16 + byte % 64 / 16 * 4 + byte % 4;
  }

  void load_queries(const Block& block) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const auto* from = reinterpret_cast<const BFloat16*>(block.query(a, r));
      Lanes<float> top = {};
      for (int64_t d = 0; d < D; d += 16) {
        const Lanes<float> x = load_lanes(from + d);
        top = larger<float>(top, x < 0 ? -x : x);
      }
      int8_t* planes_of_row[kQueryPlanes];
      for (int64_t plane = 0; plane < kQueryPlanes; ++plane)
        planes_of_row[plane] = reinterpret_cast<int8_t*>(q + (plane * kRows + r) * D / 4);
      q_unit[r] = to_planes(from, D, largest<float>(top), planes_of_row);
      for (int64_t g = 0; g < groups; ++g) {
        Lanes<float> sum = {};
        for (int64_t d = g * a.pages.group; d < (g + 1) * a.pages.group; d += 16) sum = sum + load_lanes(from + d);
        for (int step = 0; step < 4; ++step) sum = add_neighbours<float>(sum, sum);
        q_sum[r * groups + g] = sum[0];
      }
    }
  }

  void load(const Block& block, bool, int64_t first, uint64_t any) {
    const KVPages& p = a.pages;
    if (~any) std::memset(raw, 0, 2 * groups * kKeys * 4);
    RowFinder k_row = RowFinder::codes(p.k, 1, block.kv_head), v_row = RowFinder::codes(p.v, 1, block.kv_head);
    RowFinder k_scale = RowFinder::scales(p.k, 2, block.kv_head), v_scale = RowFinder::scales(p.v, 2, block.kv_head);
    const Rows rows(p, block.s, first, any, nothing,
                    [&](int64_t i, int64_t page, int64_t offset, const std::byte*& k, const std::byte*& v) {
                      k = k_row(page, offset);
                      v = v_row(page, offset);
                      if (i >= kKeys) {
                        if (i % 8 == 0) fetch(k_scale(page, offset), 0), fetch(v_scale(page, offset), 0);
                        return;
                      }
                      const std::byte *k_grid = k_scale(page, offset), *v_grid = v_scale(page, offset);
                      for (int64_t g = 0; g < groups; ++g) {
                        std::memcpy(raw + g * kKeys + i, k_grid + 4 * g, 4);
                        std::memcpy(raw + (groups + g) * kKeys + i, v_grid + 4 * g, 4);
                      }
                    });
    for (int64_t i = 0; i < 2 * groups * kKeys; i += 16) {  // step in the low half, offset in the high one
      const __m512i both = _mm512_loadu_si512(raw + i);
      float* to = scales + i / kKeys * 2 * kKeys + i % kKeys;
      _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
      _mm512_storeu_ps(to + kKeys, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16))));
    }
    for (int64_t low = 0; low < kKeys; low += 16) transpose(rows.k + low, bytes / 4, keys + low);
    const __m512i low_half = _mm512_set1_epi8(15);
    if (bits == 4) {
      for (int64_t i = 0; i < bytes / 4 * kKeys; i += 16) {
        const __m512i both = _mm512_loadu_si512(keys + i);
        _mm512_storeu_si512(keys + i, _mm512_and_si512(both, low_half));
        _mm512_storeu_si512(keys + bytes / 4 * kKeys + i, _mm512_and_si512(_mm512_srli_epi32(both, 4), low_half));
      }
    }
    for (int64_t key = 0; key < kKeys; key += 4) {
      uint32_t* to = values + key / 4 * width(D);
      for (int64_t at = 0; at < bytes; at += 64) {
        const __mmask64 inside = bytes - at >= 64 ? ~uint64_t{0} : (uint64_t{1} << (bytes - at)) - 1;
        __m512i x[4];
        for (int i = 0; i < 4; ++i) {
          fetch(rows.v[kKeys + key + i], at);
          x[i] = _mm512_maskz_loadu_epi8(inside, rows.v[key + i] + at);
        }
        const __m512i low01 = _mm512_unpacklo_epi8(x[0], x[1]), high01 = _mm512_unpackhi_epi8(x[0], x[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(x[2], x[3]), high23 = _mm512_unpackhi_epi8(x[2], x[3]);
        const __m512i four[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                                 _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
        for (int i = 0; i < 4; ++i) {
          if (bits == 8) {
            _mm512_storeu_si512(to + at + 16 * i, four[i]);
          } else {
            _mm512_storeu_si512(to + at + 16 * i, _mm512_and_si512(four[i], low_half));
            _mm512_storeu_si512(to + round_up(bytes, 64) + at + 16 * i,
                                _mm512_and_si512(_mm512_srli_epi32(four[i], 4), low_half));
          }
        }
      }
    }
  }

  bool hides_values() const { return true; }

  void multiply_keys(int64_t first, int64_t num_rows, float* weights) {
    const int64_t inner = D / 4 / groups;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t plane = 0; plane < kQueryPlanes; ++plane)
        product<Bytes, false>(num_rows, kKeys, inner, q + (plane * kRows + first) * D / 4 + g * inner, D / 4,
                              keys + g * inner * kKeys, kKeys, sums + plane * kRows * kKeys, kKeys);
      const float *step = scales + 2 * g * kKeys, *offset = step + kKeys;
      for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t key = 0; key < kKeys; key += 16) {
          const int32_t* plane = sums + r * kKeys + key;
          const Lanes<float> high = (Lanes<float>)_mm512_cvtepi32_ps(_mm512_loadu_si512(plane));
          const Lanes<float> rest = joined(plane + kRows * kKeys, plane + 2 * kRows * kKeys);
          const Lanes<float> sum = fma(high, Lanes<float>{} + 16384.0f, rest) * q_unit[first + r];
          const Lanes<float> x =
              fma(sum, load_lanes(step + key), load_lanes(offset + key) * q_sum[(first + r) * groups + g]);
          float* to = weights + r * kKeys + key;
          put(std::true_type{}, to, g ? load_lanes(to) + x : x);
        }
      }
    }
  }

  void add_values(int64_t num_rows, const float* weights, float* totals) {
    const int64_t all = width(D), columns = all / groups;
    for (int64_t g = 0; g < groups; ++g) {
      const float *step = scales + 2 * (groups + g) * kKeys, *offset = step + kKeys;
      for (int64_t r = 0; r < num_rows; ++r) {
        float stepped[kKeys];
        Lanes<float> top = {}, offsets = {};
        for (int64_t key = 0; key < kKeys; key += 16) {
          const Lanes<float> weight = load_lanes(weights + r * kKeys + key);
          const Lanes<float> x = weight != 0 ? weight * load_lanes(step + key) : Lanes<float>{};
          offsets = weight != 0 ? fma(weight, load_lanes(offset + key), offsets) : offsets;
          top = larger<float>(top, x < 0 ? -x : x);
          put(std::true_type{}, stepped + key, x);
        }
        for (int turn = 0; turn < 4; ++turn) offsets = add_neighbours<float>(offsets, offsets);
        shift[r] = offsets[0];
        int8_t* planes_of_row[2] = {reinterpret_cast<int8_t*>(planes + r * kKeys / 4),
                                    reinterpret_cast<int8_t*>(planes + (kRows + r) * kKeys / 4)};
        unit[r] = to_planes(stepped, kKeys, largest<float>(top), planes_of_row);
      }
      for (int64_t plane = 0; plane < 2; ++plane)
        product<Bytes, false>(num_rows, columns, kKeys / 4, planes + plane * kRows * kKeys / 4, kKeys / 4,
                              values + g * columns, all, sums + plane * kRows * columns, columns);
      for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t d = 0; d < columns; d += 16) {
          float* to = totals + r * all + g * columns + d;
          const Lanes<float> sum = joined(sums + r * columns + d, sums + (kRows + r) * columns + d);
          put(std::true_type{}, to, fma(sum, Lanes<float>{} + unit[r], load_lanes(to) + shift[r]));
        }
      }
    }
  }

 private:
  static Lanes<float> fma(const Lanes<float>& x, const Lanes<float>& y, const Lanes<float>& z) {
    return Number<Lanes<float>>::fma(x, y, z);
  }

  // x / unit, rounded, as digits to the base of 128 in signed bytes, the highest first; returns unit. NaN where x is
  // not finite.
  template <class T, int kPlanes>
  static float to_planes(const T* x, int64_t n, float top, int8_t* (&planes)[kPlanes]) {
    constexpr float kMost = kPlanes == 3 ? 125.0f * 16384 : 125.0f * 128;
    const float unit = top / kMost;
    const float inverse = top > 1e-30f ? kMost / top : 0.0f;  // less is nothing beside a weight of 1
    LaneBits<float> broken = {};
    for (int64_t i = 0; i < n; i += 16) {
      const Lanes<float> value = load_lanes(x + i);
      broken |= (LaneBits<float>)(value != value);
      __m512i rest = _mm512_cvtps_epi32((__m512)(value * inverse));
#pragma GCC unroll 2
      for (int plane = 0; plane + 1 < kPlanes; ++plane) {
        const int shift = 7 * (kPlanes - 1 - plane);
        const __m512i digit = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(1 << (shift - 1))), shift);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[plane] + i), _mm512_cvtepi32_epi8(digit));
        rest = _mm512_sub_epi32(rest, _mm512_slli_epi32(digit, shift));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[kPlanes - 1] + i), _mm512_cvtepi32_epi8(rest));
    }
    return any_bit(broken) || !(top < kInf<float>) ? kInf<float> - kInf<float> : unit;
  }

  // 128 * high + low: below 2^31 for up to 256 channels or 64 keys.
  static Lanes<float> joined(const int32_t* high, const int32_t* low) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(high), 7), _mm512_loadu_si512(low));
    return (Lanes<float>)_mm512_cvtepi32_ps(sum);
  }

  const AttendArgs& a;
  const int64_t D, bits, bytes, groups;
  uint32_t* q;
  float *q_unit, *q_sum;
  uint32_t *keys, *values;
  float* scales;  // [k, v][group][step, offset][key]
  uint32_t* raw;
  int32_t* sums;
  uint32_t* planes;
  float *unit, *shift;
  uint8_t* nothing;
};

#endif

}  // namespace fastdecode::FD_ISA
