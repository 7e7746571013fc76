// Sixteen neighbouring elements as one value, in the compiler's vector extension: one register at AVX-512, several
// below, the same bits everywhere. For the loops that compilers do not vectorise well by themselves.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the header's own undefined registers
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "core/dtype.h"
#include "core/fmath.h"

namespace fastdecode::FD_ISA {

inline constexpr int64_t kWide = 16;

template <class C>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Value __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
};
template <>
struct LanesOf<double> {
  typedef double Value __attribute__((vector_size(128)));
  typedef uint64_t Bits __attribute__((vector_size(128)));
};
template <class C>
using Lanes = typename LanesOf<C>::Value;
template <class C>
using LaneBits = typename LanesOf<C>::Bits;  // also what a comparison gives: all ones or zero

template <class C>
FD_INLINE Lanes<C> load_lanes(const C* p) {
  Lanes<C> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

namespace detail {
typedef uint16_t Bits16 __attribute__((vector_size(32)));
FD_INLINE LaneBits<float> widen(const void* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, LaneBits<float>);
}
}  // namespace detail

FD_INLINE Lanes<float> load_lanes(const BFloat16* p) { return (Lanes<float>)(detail::widen(p) << 16); }
FD_INLINE Lanes<float> load_lanes(const Half* p) {  // load(Half), lane by lane
  const LaneBits<float> bits = detail::widen(p);
  const LaneBits<float> rest = (bits & 0x7fffu) << 13;
  const LaneBits<float> scaled = (LaneBits<float>)((Lanes<float>)rest * 0x1p112f);
  const LaneBits<float> special = (LaneBits<float>)(rest >= 0x0f800000u) & 0x7f800000u;
  return (Lanes<float>)(scaled | special | (bits & 0x8000u) << 16);
}

// One generic lambda for sixteen neighbours (wide is std::true_type) and for one element (std::false_type): what a loop
// over a row needs besides arithmetic.
template <class T>
FD_INLINE auto take(std::true_type, const T* p) {
  return load_lanes(p);
}
template <class T>
FD_INLINE Compute<T> take(std::false_type, const T* p) {
  return load(*p);
}
template <class C>
FD_INLINE void put(std::true_type, C* p, const Lanes<C>& v) {
  std::memcpy(p, &v, sizeof(v));
}
template <class C>
FD_INLINE void put(std::false_type, C* p, C v) {
  *p = v;
}

namespace detail {

// a * b + c, rounded once: an instruction, or without one a library call for each lane, which need not be inlined.
#if FD_CPU_LEVEL >= 3
#define FD_FMA FD_INLINE
#else
#define FD_FMA FD_ROW inline
#endif
FD_FMA Lanes<float> fma_lanes(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
#if FD_CPU_LEVEL >= 4
  return (Lanes<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FD_CPU_LEVEL == 3
  __m256 part[3][2];
  std::memcpy(part[0], &a, sizeof(a));
  std::memcpy(part[1], &b, sizeof(b));
  std::memcpy(part[2], &c, sizeof(c));
  for (int j = 0; j < 2; ++j) part[0][j] = _mm256_fmadd_ps(part[0][j], part[1][j], part[2][j]);
  Lanes<float> r;
  std::memcpy(&r, part[0], sizeof(r));
  return r;
#else
  Lanes<float> r;
  for (int64_t l = 0; l < kWide; ++l) r[l] = fma_(a[l], b[l], c[l]);
  return r;
#endif
}

FD_FMA Lanes<double> fma_lanes(const Lanes<double>& a, const Lanes<double>& b, const Lanes<double>& c) {
#if FD_CPU_LEVEL >= 3
  __m256d part[3][4];
  std::memcpy(part[0], &a, sizeof(a));
  std::memcpy(part[1], &b, sizeof(b));
  std::memcpy(part[2], &c, sizeof(c));
  for (int j = 0; j < 4; ++j) part[0][j] = _mm256_fmadd_pd(part[0][j], part[1][j], part[2][j]);
  Lanes<double> r;
  std::memcpy(&r, part[0], sizeof(r));
  return r;
#else
  Lanes<double> r;
  for (int64_t l = 0; l < kWide; ++l) r[l] = fma_(a[l], b[l], c[l]);
  return r;
#endif
}

}  // namespace detail

template <>
struct Number<Lanes<float>> {
  using Bits = LaneBits<float>;
  FD_INLINE static Lanes<float> fma(const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c) {
    return detail::fma_lanes(a, b, c);
  }
};
template <>
struct Number<Lanes<double>> {
  using Bits = LaneBits<double>;
  FD_INLINE static Lanes<double> fma(const Lanes<double>& a, const Lanes<double>& b, const Lanes<double>& c) {
    return detail::fma_lanes(a, b, c);
  }
};
FD_INLINE Lanes<float> exp_minus(const Lanes<float>& d) { return detail::exp_minus_float(d); }
FD_INLINE Lanes<double> exp_minus(const Lanes<double>& d) { return detail::exp_minus_double(d); }

template <class C>
FD_INLINE Lanes<C> larger(const Lanes<C>& a, const Lanes<C>& b) {
  return a > b ? a : b;
}

// Largest of the sixteen; NaN where some are NaN is any of the others or NaN.
template <class C>
FD_INLINE C largest(Lanes<C> v) {
  v = larger<C>(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger<C>(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger<C>(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = larger<C>(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

// Whether any bit is set.
template <class Bits>
FD_INLINE bool any_bit(const Bits& bits) {
#if FD_CPU_LEVEL >= 4
  if constexpr (sizeof(Bits) == 64) return _mm512_test_epi64_mask((__m512i)bits, (__m512i)bits) != 0;
#endif
  uint64_t words[sizeof(Bits) / 8];
  std::memcpy(words, &bits, sizeof(bits));
  uint64_t all = 0;
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// Sums of neighbours: lane l is pair 2l + (2l + 1) of the 32 lanes a, b.
template <class C>
FD_INLINE Lanes<C> add_neighbours(const Lanes<C>& a, const Lanes<C>& b) {
  const Lanes<C> even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Lanes<C> odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return even + odd;
}

// Eight 32-bit numbers, each in the low half of a 64-bit lane; the high halves are arbitrary.
typedef uint64_t Words8 __attribute__((vector_size(64)));

#if FD_CPU_LEVEL >= 4
// Full products of the low halves.
FD_INLINE Words8 multiply_low(const Words8& a, const Words8& b) {
  return (Words8)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#endif

}  // namespace fastdecode::FD_ISA
