// CUDA's device functions that are no synchronisation: bits, arithmetic, memory, atomics.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/block.h"

// ---- integers and bits ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign alone
    result |= byte << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c = static_cast<int>(static_cast<unsigned>(c) +
                         static_cast<unsigned>(static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i)));
  }
  return c;
}

// ---- floating point ----

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// Of two numbers, one NaN: the other one, as in CUDA.
#define FD_SIMT_MIN_MAX(T)                            \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
FD_SIMT_MIN_MAX(int)
FD_SIMT_MIN_MAX(unsigned)
FD_SIMT_MIN_MAX(long)
FD_SIMT_MIN_MAX(unsigned long)
FD_SIMT_MIN_MAX(long long)
FD_SIMT_MIN_MAX(unsigned long long)
#undef FD_SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- memory ----

template <class T>
T __ldg(const T* p, FD_SIMT_WHERE) {
  static_assert(sizeof(T) <= 16);
  fastdecode::simt::check_aligned(p, alignof(T), file, line);
  return *p;
}
template <class T>
T __ldcs(const T* p, FD_SIMT_WHERE) {
  return __ldg(p, file, line);
}
template <class T>
T __ldcg(const T* p, FD_SIMT_WHERE) {
  fastdecode::simt::preemption_point();  // read past the first-level cache: for what other blocks write
  return __ldg(p, file, line);
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value, FD_SIMT_WHERE) {
  static_assert(sizeof(T) <= 16);
  fastdecode::simt::check_aligned(p, alignof(T), file, line);
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value, FD_SIMT_WHERE) {
  __stcs(p, value, file, line);
}

// Writes are seen in program order here, so a fence only lets others run. A missing one is not found.
inline void __threadfence() { fastdecode::simt::preemption_point(); }
inline void __threadfence_block() { fastdecode::simt::preemption_point(); }
inline void __threadfence_system() { fastdecode::simt::preemption_point(); }
inline void __nanosleep(unsigned) { fastdecode::simt::preemption_point(); }

// ---- atomics ----

namespace fastdecode::simt {

// CUDA has them for these types; other integers (long, int64_t) do not compile there either.
template <class T, class... Types>
concept OneOf = (std::is_same_v<T, Types> || ...);
template <class T>
concept AtomicAdd = OneOf<T, int, unsigned, unsigned long long, float, double>;
template <class T>
concept AtomicOrder = OneOf<T, int, unsigned, long long, unsigned long long>;
template <class T>
concept AtomicBits = OneOf<T, int, unsigned, unsigned long long>;
template <class T>
concept AtomicExchange = OneOf<T, int, unsigned, unsigned long long, float>;

template <class T, class Change>
T atomic(T* p, const char* file, int line, Change&& change) {
  check_aligned(p, sizeof(T), file, line);
  preemption_point();  // others may come first; fibers of one OS thread never come between
  const T old = *p;
  *p = change(old);
  return old;
}

template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

}  // namespace fastdecode::simt

#define FD_SIMT_ATOMIC(name, Types, expression)                                           \
  template <fastdecode::simt::Types T>                                                    \
  T name(T* p, std::type_identity_t<T> value, FD_SIMT_WHERE) {                            \
    return fastdecode::simt::atomic(p, file, line, [&](T old) { return T(expression); }); \
  }
FD_SIMT_ATOMIC(atomicAdd, AtomicAdd, fastdecode::simt::wrapping_add(old, value))
FD_SIMT_ATOMIC(atomicMin, AtomicOrder, value < old ? value : old)
FD_SIMT_ATOMIC(atomicMax, AtomicOrder, value > old ? value : old)
FD_SIMT_ATOMIC(atomicAnd, AtomicBits, old& value)
FD_SIMT_ATOMIC(atomicOr, AtomicBits, old | value)
FD_SIMT_ATOMIC(atomicXor, AtomicBits, old ^ value)
FD_SIMT_ATOMIC(atomicExch, AtomicExchange, (static_cast<void>(old), value))
#undef FD_SIMT_ATOMIC

template <fastdecode::simt::AtomicBits T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value, FD_SIMT_WHERE) {
  return fastdecode::simt::atomic(p, file, line, [&](T old) { return old == expected ? value : old; });
}
