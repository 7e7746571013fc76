// The arithmetic of a cache's number formats (core/kv.h), a value at a time and with the same bits on every device.
// Coding is defined by exact numbers (kvquant/kv_append.h), not by the order of some operations: each step below that
// rounds is followed by what makes up for it.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/bits.h"
#include "core/dtype.h"
#include "core/kv.h"

namespace fastdecode::FD_ISA {

// ---------------------------------------------------------------------------------------------------------------------
// Where things lie, in elements (bytes of codes)

FD_INLINE FD_HD int64_t token_at(const KVStore& s, int64_t page, int64_t offset, int64_t head) {
  return page * s.page_stride + offset * s.token_stride + head * s.head_stride;
}
FD_INLINE FD_HD int64_t scale_at(const KVStore& s, int64_t page, int64_t offset, int64_t head) {
  return page * s.scale_page_stride + offset * s.scale_token_stride + head * s.scale_head_stride;
}
FD_INLINE FD_HD int64_t tail_at(const KVStore& s, int64_t row, int64_t slot, int64_t head) {
  return row * s.tail_batch_stride + slot * s.tail_token_stride + head * s.tail_head_stride;
}

// Code i of a run of n codes of `bits` bits, in split order.
FD_INLINE FD_HD uint32_t split_code(const uint8_t* run, int64_t i, int64_t n, int bits) {
  const int64_t bytes = n * bits / 8;
  return static_cast<uint32_t>(run[i % bytes]) >> (bits * static_cast<int>(i / bytes)) & ((1u << bits) - 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Narrow floats

template <class C>
struct Parts;
template <>
struct Parts<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Parts<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};

// A sign, an exponent, kM bits of mantissa; kMax is the code of the largest finite number, kNaN that of the NaN stored.
template <int kM, int kB, uint32_t kMax, uint32_t kNaN, int kSignBit>
struct Format {
  static constexpr int kMantissa = kM, kBias = kB, kSign = kSignBit;
  static constexpr uint32_t kLargest = kMax, kNotANumber = kNaN;
};
using E4M3 = Format<3, 7, 0x7e, 0x7f, 7>;  // no infinities: 0x7f and 0xff are NaN
using E5M2 = Format<2, 15, 0x7b, 0x7f, 7>;
using Binary16 = Format<10, 15, 0x7bff, 0x7e00, 15>;
using Brain16 = Format<7, 127, 0x7f7f, 0x7fc0, 15>;

// 2^n, for exponents of normal numbers.
template <class C>
FD_INLINE FD_HD constexpr C power_of_two(int n) {
  using P = Parts<C>;
  return bit_cast<C>(static_cast<typename P::Bits>(n + P::kBias) << P::kMantissa);
}

// Code of |x|, rounded to nearest, ties to even; more than kLargest where the format ends, and for NaN.
template <class F, class C>
FD_INLINE FD_HD uint32_t magnitude_code(C x) {
  using P = Parts<C>;
  using Bits = typename P::Bits;
  constexpr int kDrop = P::kMantissa - F::kMantissa;
  constexpr Bits kFirstNormal = static_cast<Bits>(P::kBias - F::kBias + 1) << P::kMantissa;
  constexpr C kMagic = power_of_two<C>(1 - F::kBias - F::kMantissa + P::kMantissa);  // its ulp is F's smallest number
  const Bits bits = bit_cast<Bits>(x) & static_cast<Bits>(~Bits{0} >> 1);
  const Bits odd = bits >> kDrop & 1;
  const Bits normal = ((bits + ((Bits{1} << (kDrop - 1)) - 1) + odd) >> kDrop) -
                      (static_cast<Bits>(P::kBias - F::kBias) << F::kMantissa);
  const Bits subnormal = bit_cast<Bits>(bit_cast<C>(bits) + kMagic) - bit_cast<Bits>(kMagic);
  return static_cast<uint32_t>(bits < kFirstNormal ? subnormal : normal);
}

// Where the sign of x goes.
template <class F, class C>
FD_INLINE FD_HD uint32_t sign_code(C x) {
  using Bits = typename Parts<C>::Bits;
  return static_cast<uint32_t>(bit_cast<Bits>(x) >> (8 * sizeof(C) - 1)) << F::kSign;
}

// Whether rounding x leaves the format, NaN and inf included.
template <class F, class C>
FD_INLINE FD_HD bool leaves_format(C x) {
  return magnitude_code<F>(x) > F::kLargest;
}

// Nearest, ties to even; values beyond the largest become it, inf as well; NaN becomes one NaN.
template <class F, class C>
FD_INLINE FD_HD uint32_t encode_saturating(C x) {
  const uint32_t magnitude = magnitude_code<F>(x);
  const uint32_t code = (magnitude < F::kLargest ? magnitude : F::kLargest) | sign_code<F>(x);
  return x == x ? code : F::kNotANumber;
}

FD_INLINE FD_HD float decode_e5m2(uint8_t code) { return load(Half{static_cast<uint16_t>(code << 8)}); }
FD_INLINE FD_HD float decode_e4m3(uint8_t code) {
  // As a float16 its exponent is biased by 15, not 7.
  const uint32_t magnitude = code & 0x7fu;
  const float value = load(Half{static_cast<uint16_t>((code & 0x80u) << 8 | magnitude << 7)}) * 256.0f;
  return magnitude == 0x7f ? std::numeric_limits<float>::quiet_NaN() : value;
}

template <class T>
struct FormatOf;
template <>
struct FormatOf<Half> {
  using type = Binary16;
};
template <>
struct FormatOf<BFloat16> {
  using type = Brain16;
};

// x as T: nearest, ties to even, one NaN. Too large is inf, or with kSaturate the largest number (inf stays inf).
template <class T, bool kSaturate, class C>
FD_INLINE FD_HD T store(C x) {
  if constexpr (std::is_same_v<T, double>) {
    return x == x ? static_cast<double>(x) : std::numeric_limits<double>::quiet_NaN();
  } else if constexpr (std::is_same_v<T, float>) {
    constexpr float kMax = std::numeric_limits<float>::max(), kInfinity = std::numeric_limits<float>::infinity();
    float y = static_cast<float>(x);
    if constexpr (kSaturate && std::is_same_v<C, double>) {
      if (y == kInfinity && x < static_cast<double>(kInfinity)) y = kMax;
      if (y == -kInfinity && x > static_cast<double>(-kInfinity)) y = -kMax;
    }
    return x == x ? y : std::numeric_limits<float>::quiet_NaN();
  } else {
    using F = typename FormatOf<T>::type;
    constexpr C kInfinity = std::numeric_limits<C>::infinity();
    constexpr uint32_t kInfinityCode = F::kLargest + 1;
    const uint32_t magnitude = magnitude_code<F>(x);
    const bool is_inf = x == kInfinity || x == -kInfinity;
    const uint32_t end = kSaturate && !is_inf ? F::kLargest : kInfinityCode;
    const uint32_t code = (magnitude < end ? magnitude : end) | sign_code<F>(x);
    return {static_cast<uint16_t>(x == x ? code : F::kNotANumber)};
  }
}

// Whether a finite x is stored as the largest number of T.
template <class T, class C>
FD_INLINE FD_HD bool saturates(C x) {
  if constexpr (sizeof(T) == sizeof(C)) {
    return false;
  } else if constexpr (std::is_same_v<T, float>) {
    return x - x == 0 && !(static_cast<float>(x) - static_cast<float>(x) == 0);
  } else if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    return x - x == 0 && leaves_format<typename FormatOf<T>::type>(x);
  }
}

template <class C>
FD_INLINE FD_HD bool is_finite(C x) {
  return x - x == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotary embedding

template <class C>
struct Pair {
  C first, second;
};
template <class T, class C>
FD_INLINE FD_HD Pair<T> rotate_pair(C a, C b, C cosine, C sine) {
  return {store<T, false>(a * cosine - b * sine), store<T, false>(b * cosine + a * sine)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Scales of fp8

// max |x| / largest in float32, but a normal number: so 0 is no special case.
template <class F, class C>
FD_INLINE FD_HD float fp8_scale(C max_magnitude) {
  constexpr C kLargest = F::kMantissa == 3 ? C(448) : C(57344);
  constexpr float kMin = std::numeric_limits<float>::min(), kMax = std::numeric_limits<float>::max();
  const C scale = max_magnitude / kLargest;
  return scale <= static_cast<C>(kMin) ? kMin : scale >= static_cast<C>(kMax) ? kMax : static_cast<float>(scale);
}

// ---------------------------------------------------------------------------------------------------------------------
// Integer codes

inline constexpr float kLargestHalf = 65504.0f;

// What a cache stores of a group.
struct Grid {
  Half step, offset;
};

// x - y = value + rest, exactly.
template <class C>
struct Difference {
  C value, rest;
};
template <class C>
FD_INLINE FD_HD Difference<C> subtract(C x, C y) {
  const C value = x - y, from_y = value - x;
  return {value, (x - (value - from_y)) + (-y - from_y)};
}

// The group's range as it is coded; `low` > `high` where it has no finite value.
template <class C>
FD_INLINE FD_HD C coded_limit(C limit, bool any) {
  const C clamped = limit < C(-kLargestHalf) ? C(-kLargestHalf) : limit > C(kLargestHalf) ? C(kLargestHalf) : limit;
  return any ? clamped + C(0) : C(0);  // -0 becomes 0
}

// Offset: the largest float16 <= low. Step: the smallest float16 s with offset + levels * s >= high.
// |low|, |high| <= 65504 and levels >= 2, so both exist.
template <class C>
FD_INLINE FD_HD Grid make_grid(C low, C high, int levels) {
  Half offset = store<Half, false>(low);
  if (static_cast<C>(load(offset)) > low)
    offset.bits = static_cast<uint16_t>(offset.bits & 0x8000u ? offset.bits + 1  // also -0, whose neighbour follows it
                                        : offset.bits == 0    ? 0x8001u
                                                              : offset.bits - 1u);
  if (offset.bits == 0x8000u) offset.bits = 0;
  const C n = static_cast<C>(levels);
  const Difference<C> range = subtract<C>(high, static_cast<C>(load(offset)));
  const C wanted = range.value / n;
  Half step = store<Half, false>(wanted);
  if (static_cast<C>(load(step)) < wanted) ++step.bits;
  // levels * step is exact; so is its difference to the range, where that is near 0.
  if (static_cast<C>(load(step)) * n - range.value < range.rest) ++step.bits;
  return {step, offset};
}

// Codes of values, and back.
template <class C>
struct Coder {
  C offset, step, half, inverse, low, high;

  Coder() = default;
  FD_INLINE FD_HD Coder(const Grid& grid, C low_, C high_)
      : offset(static_cast<C>(load(grid.offset))),
        step(static_cast<C>(load(grid.step))),
        half(step * C(0.5)),
        inverse(step > 0 ? C(1) / step : C(0)),
        low(low_),
        high(high_) {}

  // round((x - offset) / step), ties to even, of x clamped to the group's range, NaN as 0: exact. The quotient's error
  // is far below 1, so `below` is the integer under it or that one's neighbour; what is left of x behind below * step
  // is then exact, and so is its distance from half a step where that is small.
  FD_INLINE FD_HD uint32_t code(C x) const {
    x = x == x ? x : C(0);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Difference<C> d = subtract(x, offset);
    const int32_t below = static_cast<int32_t>(d.value * inverse);
    const C past_half = (d.value - static_cast<C>(below) * step) - half;
    const bool up = (past_half > -d.rest) | ((past_half == -d.rest) & ((below & 1) != 0));
    return static_cast<uint32_t>(below + (up & (step > 0)));
  }
};

// One rounding: code * step is exact.
template <class C>
FD_INLINE FD_HD C decode_grid(uint32_t code, C step, C offset) {
  return static_cast<C>(static_cast<int32_t>(code)) * step + offset;
}

}  // namespace fastdecode::FD_ISA
