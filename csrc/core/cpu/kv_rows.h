// One head of one cached token as numbers, wherever it lies.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/cpu/tiles.h"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));

template <class T, class C>
FD_ROW void load_row(const T* x, int64_t n, C* to) {
  for_lanes(0, n, [&](auto wide, int64_t i) {
    if constexpr (std::is_same_v<Compute<T>, C>) {
      put<C>(wide, to + i, take(wide, x + i));
    } else if constexpr (wide) {
      for (int64_t l = 0; l < kWide; ++l) to[i + l] = static_cast<C>(load(x[i + l]));
    } else {
      to[i] = static_cast<C>(load(x[i]));
    }
  });
}

FD_INLINE Words16 load_bytes(const uint8_t* p) {
#if FD_CPU_LEVEL >= 4
  return (Words16)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Bytes16 bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Words16);
#endif
}

// n channels of codes in split order, in groups of `group`.
template <int kBits, class C>
FD_ROW void decode_int_row(const uint8_t* data, const Half* scale, int64_t n, int64_t group, C* to) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const int64_t bytes = n * kBits / 8;
  if (bytes % kWide == 0 && group % kWide == 0) {
    Lanes<C> step = {}, offset = {};
    int64_t next_group = 0;
    for (int part = 0; part < 8 / kBits; ++part) {
      for (int64_t j = 0; j < bytes; j += kWide, to += kWide) {
        if (part * bytes + j == next_group) {
          step = Lanes<C>{} + static_cast<C>(load(scale[0]));
          offset = Lanes<C>{} + static_cast<C>(load(scale[1]));
          scale += 2, next_group += group;
        }
        const Words16 codes = load_bytes(data + j) >> (kBits * part) & kMask;
        put<C>(std::true_type{}, to, __builtin_convertvector((Ints16)codes, Lanes<C>) * step + offset);
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Half* own = scale + 2 * (i / group);
    to[i] = decode_grid<C>(split_code(data, i, n, kBits), static_cast<C>(load(own[0])), static_cast<C>(load(own[1])));
  }
}

// decode_e4m3 and decode_e5m2 of sixteen codes.
template <bool kE4M3>
FD_INLINE Lanes<float> decode_fp8(const Words16& codes) {
  const Words16 sign = (codes & 0x80u) << 24;
  if constexpr (kE4M3) {
    const Words16 rest = (codes & 0x7fu) << 20;
    const Words16 value = (Words16)((Lanes<float>)rest * 0x1p120f);
    return (Lanes<float>)(((codes & 0x7fu) == 0x7fu ? Words16{} + 0x7fc00000u : value | sign));
  } else {
    const Words16 rest = (codes & 0x7fu) << 21;
    const Words16 special = (Words16)(rest >= 0x0f800000u) & 0x7f800000u;
    return (Lanes<float>)((Words16)((Lanes<float>)rest * 0x1p112f) | special | sign);
  }
}

template <bool kE4M3, class C>
FD_ROW void decode_fp8_row(const uint8_t* data, const float* scales, bool given, int64_t n, int64_t group, C* to) {
  for (int64_t g = 0; g * group < n; ++g) {
    const C scale = static_cast<C>(given ? *scales : scales[g]);
    for_lanes(g * group, (g + 1) * group, [&](auto wide, int64_t i) {
      if constexpr (wide) {
        const Lanes<float> value = decode_fp8<kE4M3>(load_bytes(data + i));
        if constexpr (std::is_same_v<C, float>) {
          put<C>(wide, to + i, value * scale);
        } else {
          put<C>(wide, to + i, __builtin_convertvector(value, Lanes<C>) * scale);
        }
      } else {
        to[i] = static_cast<C>(kE4M3 ? decode_e4m3(data[i]) : decode_e5m2(data[i])) * scale;
      }
    });
  }
}

// Keys of kivi: a channel's codes of a page lie together, so a token's are strided.
template <class C>
FD_ROW void decode_kivi_key(const KVPages& p, int64_t page, int64_t offset, int64_t head, C* to) {
  const int bits = code_bits(p.scheme);
  const int64_t row_bytes = p.page_size * bits / 8, bytes = p.group * bits / 8;
  const int64_t group = offset / p.group, i = offset % p.group;
  const Half* scale = static_cast<const Half*>(p.k.scale) + page * p.k.scale_page_stride +
                      head * p.k.scale_head_stride + group * 2 * p.head_dim;
  const uint8_t* data = static_cast<const uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride +
                        group * bytes + i % bytes;
  const int shift = bits * static_cast<int>(i / bytes);
  for (int64_t d = 0; d < p.head_dim; ++d) {
    const uint32_t code = static_cast<uint32_t>(data[d * row_bytes]) >> shift & ((1u << bits) - 1);
    to[d] = decode_grid<C>(code, static_cast<C>(load(scale[d])), static_cast<C>(load(scale[p.head_dim + d])));
  }
}

// A token in a page.
template <class C>
void read_page_row(const KVPages& p, bool is_key, int64_t page, int64_t offset, int64_t head, C* to) {
  const KVStore& s = is_key ? p.k : p.v;
  if (is_kivi(p.scheme) && is_key) return decode_kivi_key(p, page, offset, head, to);
  const int64_t at = token_at(s, page, offset, head);
  if (p.scheme == kKVPlain) {
    return dispatch_logits(p.dtype, [&](auto tag) {
      using E = typename decltype(tag)::type;
      load_row(static_cast<const E*>(s.data) + at, p.head_dim, to);
    });
  }
  const uint8_t* data = static_cast<const uint8_t*>(s.data) + at;
  const int64_t scale = scale_at(s, page, offset, head);
  const int64_t D = p.head_dim;
  if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
    const float* scales = static_cast<const float*>(s.scale) + scale;
    if (p.scheme == kKVFp8E4M3) return decode_fp8_row<true>(data, scales, p.static_scale, D, p.group, to);
    return decode_fp8_row<false>(data, scales, p.static_scale, D, p.group, to);
  }
  const Half* grid = static_cast<const Half*>(s.scale) + scale;
  switch (code_bits(p.scheme)) {
    case 8: return decode_int_row<8>(data, grid, D, p.group, to);
    case 4: return decode_int_row<4>(data, grid, D, p.group, to);
    default: return decode_int_row<2>(data, grid, D, p.group, to);
  }
}

// A token in a ring.
template <class C>
void read_ring_row(const KVPages& p, bool is_key, int64_t row, int64_t position, int64_t head, C* to) {
  const KVStore& s = is_key ? p.k : p.v;
  const int64_t at = tail_at(s, row, position % p.tail_size, head);
  dispatch_logits(p.tail_dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    load_row(static_cast<const E*>(s.tail) + at, p.head_dim, to);
  });
}

}  // namespace fastdecode::FD_ISA
