// exp and log whose every rounding is written down, so that each build (x86-64 levels, SIMT, CUDA) gives the same bits:
// only +, -, *, / and explicit fma (exact by definition, also where it is a library call), no contraction
// (-ffp-contract=off). Polynomials were fitted by Remez exchange; errors are against the exact function. Straight-line
// code, so loops over rows vectorise.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/bits.h"

namespace fastdecode::FD_ISA {

template <class C>
inline constexpr C kInf = std::numeric_limits<C>::infinity();

// exp_minus is 0 beyond this.
template <class C>
inline constexpr C kFarthest = std::is_same_v<C, double> ? C(708) : C(87);

#if defined(__CUDA_ARCH__)
FD_INLINE FD_HD float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FD_INLINE FD_HD double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
FD_INLINE FD_HD float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FD_INLINE FD_HD double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// What a number is to the functions below that also work on vectors of numbers (core/cpu/vector.h).
template <class N>
struct Number;
template <>
struct Number<float> {
  using Bits = uint32_t;
  FD_INLINE FD_HD static float fma(float a, float b, float c) { return fma_(a, b, c); }
};
template <>
struct Number<double> {
  using Bits = uint64_t;
  FD_INLINE FD_HD static double fma(double a, double b, double c) { return fma_(a, b, c); }
};

namespace detail {

// e^-d for d >= 0 (inf gives 0). Results below about 1.6e-38 (d > 87) are 0. Error under 1.0 ulp.
template <class N>
FD_INLINE FD_HD N exp_minus_float(const N& d) {
  using Bits = typename Number<N>::Bits;
  auto all = [](float c) { return N{} + c; };
  auto fma = Number<N>::fma;
  const N magic =
      all(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits; no other low bit is set
  const N t = fma(d, all(-0x1.715476p0f), magic);
  const N n = t - magic;
  const N r = fma(n, all(0x1.05c610p-29f), fma(n, all(-0x1.62e430p-1f), -d));  // ln 2 in two parts
  N p = all(0x1.6d754ep-10f);
  p = fma(p, r, all(0x1.120b72p-7f));
  p = fma(p, r, all(0x1.5554b8p-5f));
  p = fma(p, r, all(0x1.5554dcp-3f));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  const N y = fma(p, r, all(1.0f));
  const N scaled = bit_cast<N>(bit_cast<Bits>(y) + (bit_cast<Bits>(t) << 23));
  return d <= kFarthest<float> ? scaled : N{};
}

// The same in double; 0 for d > 708. Error under 1.0 ulp.
template <class N>
FD_INLINE FD_HD N exp_minus_double(const N& d) {
  using Bits = typename Number<N>::Bits;
  auto all = [](double c) { return N{} + c; };
  auto fma = Number<N>::fma;
  const N magic = all(0x1.8p52);
  const N t = fma(d, all(-0x1.71547652b82fep0), magic);
  const N n = t - magic;
  const N r = fma(n, all(-0x1.abc9e3b39803fp-56), fma(n, all(-0x1.62e42fefa39efp-1), -d));
  N p = all(2.0921601115217102e-09);
  p = fma(p, r, all(2.5105217317573158e-08));
  p = fma(p, r, all(2.7557252879429645e-07));
  p = fma(p, r, all(2.7557255399339882e-06));
  p = fma(p, r, all(2.480158734737129e-05));
  p = fma(p, r, all(0.00019841269874821448));
  p = fma(p, r, all(0.0013888888888874387));
  p = fma(p, r, all(0.008333333333326134));
  p = fma(p, r, all(0.041666666666666685));
  p = fma(p, r, all(0.1666666666666667));
  p = fma(p, r, all(0.5));
  const N y = 1.0 + fma(r * r, p, r);
  const N scaled = bit_cast<N>(bit_cast<Bits>(y) + (bit_cast<Bits>(t) << 52));
  return d <= kFarthest<double> ? scaled : N{};
}

}  // namespace detail

FD_INLINE FD_HD float exp_minus(float d) { return detail::exp_minus_float(d); }
FD_INLINE FD_HD double exp_minus(double d) { return detail::exp_minus_double(d); }

namespace detail {

// tanh, odd. Near 0 by the series of e^-d - 1, which 1 - e^-d would lose. Error under 4 ulp.
template <class C, class N>
FD_INLINE FD_HD N tanh_of(const N& x) {
  constexpr int kTerms = std::is_same_v<C, double> ? 15 : 8;
  const N zero = N{}, one = zero + C(1);
  const N size = x < zero ? -x : x;
  const N d = size + size;
  N e;
  if constexpr (std::is_same_v<C, double>) {
    e = exp_minus_double<N>(d);
  } else {
    e = exp_minus_float<N>(d);
  }
  N series = one;  // (1 - e^-d) / d = 1 - d/2 (1 - d/3 (1 - ...)), d <= 1/2
  for (int i = kTerms; i > 1; --i) series = one - d * series * (C(1) / C(i));
  const N near = d * series;
  const N lost = d <= zero + C(0.5) ? near : one - e;
  const N y = lost / (one + one - lost);
  return x < zero ? -y : (x == x ? y : x);
}

}  // namespace detail

FD_INLINE FD_HD float tanh_(float x) { return detail::tanh_of<float>(x); }
FD_INLINE FD_HD double tanh_(double x) { return detail::tanh_of<double>(x); }

namespace detail {

// log(2^e * (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1]. Error under 1.5 ulp.
FD_INLINE FD_HD float log_parts(float e, float f) {
  const float z = f * f;
  float q = 0.073325357f;
  q = fma_(q, f, -0.11659968f);
  q = fma_(q, f, 0.11634676f);
  q = fma_(q, f, -0.12396696f);
  q = fma_(q, f, 0.14251154f);
  q = fma_(q, f, -0.16669151f);
  q = fma_(q, f, 0.20000688f);
  q = fma_(q, f, -0.24999981f);
  q = fma_(q, f, 0.33333331f);
  float y = (f * z) * q;
  y = fma_(-0.5f, z, y);
  y = fma_(e, -0x1.05c610p-29f, y);
  return fma_(e, 0x1.62e430p-1f, f + y);
}

struct Split {
  float e, f;  // x = 2^e * (1 + f)
};

FD_INLINE FD_HD Split split(float x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t e = (bits - kSqrtHalf) >> 23;
  const float m = bit_cast<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(e) << 23));
  return {static_cast<float>(e), m - 1.0f};
}

}  // namespace detail

// Natural logarithm of x >= 0, subnormal x included; log(0) = -inf.
FD_INLINE FD_HD float log_(float x) {
  const bool small = x < 0x1p-126f;
  const detail::Split s = detail::split(small ? x * 0x1p24f : x);
  const float y = detail::log_parts(small ? s.e - 24.0f : s.e, s.f);
  return x > 0.0f ? y : -kInf<float>;
}

FD_INLINE FD_HD double log_(double x) {
  constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const bool small = x < 0x1p-1022;
  const int64_t bits = bit_cast<int64_t>(small ? x * 0x1p54 : x);
  const int64_t e = (bits - kSqrtHalf) >> 52;
  const double n = static_cast<double>(small ? e - 54 : e);
  const double f = bit_cast<double>(bits - static_cast<int64_t>(static_cast<uint64_t>(e) << 52)) - 1.0;
  // log(1 + f) = 2 atanh(s), s = f / (2 + f), |s| < 0.1716; the first term left out is below 2^-57 of the sum.
  const double s = f / (2.0 + f);
  const double z = s * s;
  double p = 2.0 / 23;
  p = fma_(p, z, 2.0 / 21);
  p = fma_(p, z, 2.0 / 19);
  p = fma_(p, z, 2.0 / 17);
  p = fma_(p, z, 2.0 / 15);
  p = fma_(p, z, 2.0 / 13);
  p = fma_(p, z, 2.0 / 11);
  p = fma_(p, z, 2.0 / 9);
  p = fma_(p, z, 2.0 / 7);
  p = fma_(p, z, 2.0 / 5);
  p = fma_(p, z, 2.0 / 3);
  const double tail = fma_(s * z, p, n * 0x1.abc9e3b39803fp-56);
  const double y = fma_(n, 0x1.62e42fefa39efp-1, 2.0 * s + tail);
  return x > 0.0 ? y : -kInf<double>;
}

// -log(1 - v) for v in (0, 1): an exponential variate from a uniform one.
FD_INLINE FD_HD float exponential_from_uniform(float v) {
  // Below 1 - sqrt(1/2) the series runs in -v itself, so that small v lose nothing to 1 - v.
  const bool large = v > 0.29289f;
  const detail::Split s = detail::split(1.0f - v);
  return -detail::log_parts(large ? s.e : 0.0f, large ? s.f : -v);
}

}  // namespace fastdecode::FD_ISA
