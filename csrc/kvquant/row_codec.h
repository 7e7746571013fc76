// The channels of one head of one token, coded on the CPU: a row of numbers of the compute type becomes the bytes of
// core/kv.h. core/cpu/kv_rows.h reads them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cpu/kv_rows.h"

namespace fastdecode::FD_ISA {

template <class C>
struct Range {
  C low = kInf<C>, high = -kInf<C>;  // of the finite values
  bool all_finite = true;
};

template <class C>
FD_ROW Range<C> range_of_finite(const C* x, int64_t n) {
  Range<C> r;
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = is_finite(x[i]);
    r.low = finite && x[i] < r.low ? x[i] : r.low;
    r.high = finite && x[i] > r.high ? x[i] : r.high;
    r.all_finite &= finite;
  }
  return r;
}

template <class C>
FD_INLINE Range<C> range_of(const C* x, int64_t n) {
  Range<C> r;
  Lanes<C> low = Lanes<C>{} + kInf<C>, high = Lanes<C>{} - kInf<C>;
  LaneBits<C> odd = {};
  for_lanes(0, n, [&](auto wide, int64_t i) {
    const auto v = take(wide, x + i);
    if constexpr (wide) {
      low = v < low ? v : low;
      high = v > high ? v : high;
      odd |= (LaneBits<C>)(v - v);  // 0, or NaN
    } else {
      r.low = v < r.low ? v : r.low;
      r.high = v > r.high ? v : r.high;
      r.all_finite &= is_finite(v);
    }
  });
  if (any_bit(odd) || !r.all_finite) return range_of_finite(x, n);
  const C lanes_low = -largest<C>(-low), lanes_high = largest<C>(high);
  r.low = lanes_low < r.low ? lanes_low : r.low;
  r.high = lanes_high > r.high ? lanes_high : r.high;
  return r;
}

// make_grid, by the rounding modes of the processor's own conversions where it has them.
template <class C>
FD_INLINE Grid grid_of(C low, C high, int levels) {
#if FD_CPU_LEVEL >= 3
  if constexpr (std::is_same_v<C, float>) {
    Half offset{static_cast<uint16_t>(_cvtss_sh(low, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))};
    if (offset.bits == 0x8000u) offset.bits = 0;
    const float n = static_cast<float>(levels);
    const Difference<float> range = subtract(high, _cvtsh_ss(offset.bits));
    Half step{static_cast<uint16_t>(_cvtss_sh(range.value / n, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC))};
    if (_cvtsh_ss(step.bits) * n - range.value < range.rest) ++step.bits;
    return {step, offset};
  }
#endif
  return make_grid(low, high, levels);
}

// Sixteen of Coder's codes, of values inside their group's range. Where no quotient is near the middle between two
// codes, which is nearly always, rounding it is enough. K: Coder, or its fields for each lane.
template <class C, class K>
FD_INLINE LaneBits<C> codes_of(const K& coder, const Lanes<C>& x) {
  const C kMagic = C(1.5) * power_of_two<C>(Parts<C>::kMantissa);  // what is added to it is rounded to an integer
  const C kMiddle = C(0.5) - power_of_two<C>(-12);                 // quotients err by less than 256 * 3 * 2^-24
  const Lanes<C> value = x - coder.offset, quotient = value * coder.inverse;
  const Lanes<C> rounded = quotient + kMagic, distance = quotient - (rounded - kMagic);
  const auto near = (distance > kMiddle) | (distance < -kMiddle);
  if (!any_bit((LaneBits<C>)near)) [[likely]]
    return (LaneBits<C>)rounded - bit_cast<typename Parts<C>::Bits>(kMagic);
  const Lanes<C> from_x = value - x, rest = (x - (value - from_x)) + (-coder.offset - from_x);
  const Lanes<C> nearest = rounded - kMagic, below = nearest > quotient ? nearest - C(1) : nearest;
  const LaneBits<C> code = (LaneBits<C>)(below + kMagic) - bit_cast<typename Parts<C>::Bits>(kMagic);
  const Lanes<C> past_half = (value - below * coder.step) - coder.half;
  const auto up = (past_half > -rest) | ((past_half == -rest) & ((code & 1) != 0));
  return code - (LaneBits<C>)up;  // true is -1
}

// A group that is to be coded.
template <class C>
struct GroupCode {
  Coder<C> coder;
  bool clean;  // all values lie in its range: no NaN, no inf, none beyond float16
};

// Stores step and offset.
template <class C>
FD_INLINE GroupCode<C> code_group(const Range<C>& r, int levels, Half* scale, int32_t& status) {
  const bool any = r.low <= r.high;
  const C low = coded_limit(r.low, any), high = coded_limit(r.high, any);
  const Grid grid = grid_of(low, high, levels);
  scale[0] = grid.step;
  scale[1] = grid.offset;
  const bool saturated = any && (r.low < low || r.high > high);
  status |= (r.all_finite ? 0 : kStatusNaN) | (saturated ? kStatusSaturated : 0);
  return {Coder<C>(grid, low, high), r.all_finite && !saturated};
}

// A row whose groups are clean, sixteen bytes at a time.
template <int kBits, class C>
FD_INLINE void put_clean_codes(const GroupCode<C>* groups, const C* x, int64_t n, int64_t group, uint8_t* data) {
  const int64_t bytes = n * kBits / 8;
  for (int64_t j = 0; j < bytes; j += kWide) {
    LaneBits<C> all = {};
    for (int part = 0; part < 8 / kBits; ++part) {
      const int64_t i = j + part * bytes;
      const Coder<C>& coder = groups[group == n ? 0 : static_cast<uint32_t>(i) / static_cast<uint32_t>(group)].coder;
      all |= codes_of<C>(coder, load_lanes(x + i)) << (kBits * part);
    }
    const auto some = __builtin_convertvector(all, Bytes16);
    std::memcpy(data + j, &some, sizeof(some));
  }
}

template <int kBits, class C>
FD_ROW void put_codes(const GroupCode<C>* groups, const C* x, int64_t n, int64_t group, uint8_t* data) {
  const int64_t bytes = n * kBits / 8;
  for (int64_t j = 0; j < bytes; ++j) {
    uint32_t byte = 0;
    for (int part = 0; part < 8 / kBits; ++part) {
      const int64_t i = j + part * bytes;
      byte |= groups[i / group].coder.code(x[i]) << (kBits * part);
    }
    data[j] = static_cast<uint8_t>(byte);
  }
}

// One head of one token: its channels, and where their codes, steps and offsets go.
template <class C>
struct IntRow {
  const C* x;
  uint8_t* data;
  Half* scale;
};

// Rows of n <= kMaxHeadDim channels in groups, as codes in split order. First the ranges of all rows, then their grids,
// then their codes: so the long chain of instructions of one row passes beside those of the others.
template <int kBits, class C>
FD_ROW int32_t encode_int_rows(const IntRow<C>* rows, int64_t count, int64_t n, int64_t group) {
  constexpr int64_t kGroups = 32;  // at once, or those of one row
  const int64_t groups = n / group;
  if (count > 1 && count * groups > kGroups)
    return encode_int_rows<kBits>(rows, count / 2, n, group) |
           encode_int_rows<kBits>(rows + count / 2, count - count / 2, n, group);
  GroupCode<C> codes[kMaxHeadDim];
  constexpr int kLevels = (1 << kBits) - 1;
  int32_t status = 0;
  if (count * groups <= kGroups) {
    Range<C> ranges[kGroups];
    for (int64_t r = 0; r < count; ++r)
      for (int64_t g = 0; g < groups; ++g) ranges[r * groups + g] = range_of(rows[r].x + g * group, group);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t g = 0; g < groups; ++g)
        codes[r * groups + g] = code_group(ranges[r * groups + g], kLevels, rows[r].scale + 2 * g, status);
  } else {
    for (int64_t g = 0; g < groups; ++g)
      codes[g] = code_group(range_of(rows->x + g * group, group), kLevels, rows->scale + 2 * g, status);
  }
  const bool vectors = group % kWide == 0 && n * kBits / 8 % kWide == 0;
  for (int64_t r = 0; r < count; ++r) {
    const GroupCode<C>* own = codes + r * groups;
    bool clean = vectors;
    for (int64_t g = 0; g < groups; ++g) clean &= own[g].clean;
    if (clean) {
      put_clean_codes<kBits>(own, rows[r].x, n, group, rows[r].data);
    } else {
      put_codes<kBits>(own, rows[r].x, n, group, rows[r].data);
    }
  }
  return status;
}

template <class C>
FD_INLINE int32_t encode_int_rows(const IntRow<C>* rows, int64_t count, int64_t n, int64_t group, int bits) {
  return bits == 8   ? encode_int_rows<8>(rows, count, n, group)
         : bits == 4 ? encode_int_rows<4>(rows, count, n, group)
                     : encode_int_rows<2>(rows, count, n, group);
}

template <class F, class C>
FD_ROW int32_t encode_fp8_row(const C* x, int64_t n, int64_t group, uint8_t* data, float* scales, bool given) {
  int32_t status = 0;
  for (int64_t g = 0; g * group < n; ++g) {
    const C* from = x + g * group;
    uint8_t* to = data + g * group;
    const Range<C> r = range_of(from, group);
    if (!r.all_finite) status |= kStatusNaN;
    if (!given) scales[g] = fp8_scale<F>(r.low > r.high ? C(0) : -r.low > r.high ? -r.low : r.high);
    const C scale = static_cast<C>(given ? *scales : scales[g]);
    int32_t nan = 0, saturated = 0;
    for (int64_t i = 0; i < group; ++i) {
      const C y = from[i] / scale;
      nan |= y != y;
      saturated |= (y == y) & is_finite(from[i]) & leaves_format<F>(y);
      to[i] = static_cast<uint8_t>(encode_saturating<F>(y));
    }
    if (nan) status |= kStatusNaN;
    if (saturated) status |= kStatusSaturated;
  }
  return status;
}

template <class E, class C>
FD_ROW int32_t store_row(const C* x, int64_t n, E* to) {
  int32_t odd = 0, saturated = 0;
  for (int64_t i = 0; i < n; ++i) {
    odd |= !is_finite(x[i]);
    saturated |= saturates<E>(x[i]);
    to[i] = store<E, true>(x[i]);
  }
  return (odd ? kStatusNaN : 0) | (saturated ? kStatusSaturated : 0);
}

}  // namespace fastdecode::FD_ISA
