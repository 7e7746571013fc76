// Products of small matrices, summed in one order whatever their sizes: c [rows, columns] = a [rows, inner]
// b [inner, columns], or += it. What an element of `inner` is, a policy says.
#pragma once

#include "core/cpu/vector.h"

namespace fastdecode::FD_ISA {

// A register of T, read from any address of a T, and a block of c that fits into the registers.
#if FD_CPU_LEVEL >= 4
inline constexpr int kRegister = 64, kBlockRows = 4, kBlockVectors = 4;
#elif FD_CPU_LEVEL == 3
inline constexpr int kRegister = 32, kBlockRows = 4, kBlockVectors = 2;
#else
inline constexpr int kRegister = 16, kBlockRows = 4, kBlockVectors = 2;
#endif
template <class T>
struct Register;
template <>
struct Register<float> {
  using type [[gnu::vector_size(kRegister), gnu::aligned(4), gnu::may_alias]] = float;
};
template <>
struct Register<double> {
  using type [[gnu::vector_size(kRegister), gnu::aligned(8), gnu::may_alias]] = double;
};
template <>
struct Register<uint32_t> {
  using type [[gnu::vector_size(kRegister), gnu::aligned(4), gnu::may_alias]] = uint32_t;
};
template <>
struct Register<int32_t> {
  using type [[gnu::vector_size(kRegister), gnu::aligned(4), gnu::may_alias]] = int32_t;
};

// Numbers, each product added with one rounding.
template <class C>
struct Numbers {
  using Element = C;
  using Sum = C;
  using Vector = typename Register<C>::type;
  FD_INLINE static Vector add(const Vector& sum, const Vector& b, C a) {
    const Vector all = Vector{} + a;
#if FD_CPU_LEVEL >= 4
    if constexpr (std::is_same_v<C, float>) {
      return (Vector)_mm512_fmadd_ps((__m512)b, (__m512)all, (__m512)sum);
    } else {
      return (Vector)_mm512_fmadd_pd((__m512d)b, (__m512d)all, (__m512d)sum);
    }
#elif FD_CPU_LEVEL == 3
    if constexpr (std::is_same_v<C, float>) {
      return (Vector)_mm256_fmadd_ps((__m256)b, (__m256)all, (__m256)sum);
    } else {
      return (Vector)_mm256_fmadd_pd((__m256d)b, (__m256d)all, (__m256d)sum);
    }
#else
    Vector r;
    for (int l = 0; l < kRegister / static_cast<int>(sizeof(C)); ++l) r[l] = fma_(b[l], all[l], sum[l]);
    return r;
#endif
  }
};

#if FD_CPU_LEVEL >= 4
// Two bfloat16 at a time.
struct Pairs {
  using Element = uint32_t;
  using Sum = float;
  FD_INLINE static Register<float>::type add(const Register<float>::type& sum, const Register<uint32_t>::type& b,
                                             uint32_t a) {
    return (Register<float>::type)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b,
                                                   (__m512bh)_mm512_set1_epi32(static_cast<int>(a)));
  }
};

// Four bytes at a time, signed of a and unsigned of b. Exact.
struct Bytes {
  using Element = uint32_t;
  using Sum = int32_t;
  FD_INLINE static Register<int32_t>::type add(const Register<int32_t>::type& sum, const Register<uint32_t>::type& b,
                                               uint32_t a) {
    return (Register<int32_t>::type)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b,
                                                        _mm512_set1_epi32(static_cast<int>(a)));
  }
};
#endif

namespace detail {

template <class P, bool kAdd, int kHeight, int kVectors, class E = typename P::Element, class S = typename P::Sum>
FD_INLINE void product_block(int64_t inner, const E* a, int64_t a_stride, const E* b, int64_t b_stride, S* c,
                             int64_t c_stride) {
  using Sums = typename Register<S>::type;
  constexpr int kLanes = kRegister / sizeof(E);
  Sums sum[kHeight][kVectors] = {};
  for (int64_t k = 0; k < inner; ++k) {
    const auto* row = reinterpret_cast<const typename Register<E>::type*>(b + k * b_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = P::add(sum[r][v], row[v], a[r * a_stride + k]);
  }
  for (int r = 0; r < kHeight; ++r)
    for (int v = 0; v < kVectors; ++v) {
      auto* to = reinterpret_cast<Sums*>(c + r * c_stride + v * kLanes);
      *to = kAdd ? *to + sum[r][v] : sum[r][v];
    }
}

template <class P, bool kAdd, int kVectors, class E, class S>
void product_columns(int64_t rows, int64_t inner, const E* a, int64_t a_stride, const E* b, int64_t b_stride, S* c,
                     int64_t c_stride) {
  static_assert(kBlockRows == 4);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    product_block<P, kAdd, 4, kVectors>(inner, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride);
  a += r * a_stride;
  c += r * c_stride;
  switch (rows - r) {
    case 3: return product_block<P, kAdd, 3, kVectors>(inner, a, a_stride, b, b_stride, c, c_stride);
    case 2: return product_block<P, kAdd, 2, kVectors>(inner, a, a_stride, b, b_stride, c, c_stride);
    case 1: return product_block<P, kAdd, 1, kVectors>(inner, a, a_stride, b, b_stride, c, c_stride);
  }
}

}  // namespace detail

// Elements of `inner` are summed up so many at a time: one sum of all would be less exact.
inline constexpr int64_t kChunk = 16;

// Strides in elements; columns a multiple of 16.
template <class P, bool kAdd, class E = typename P::Element, class S = typename P::Sum>
void product(int64_t rows, int64_t columns, int64_t inner, const E* a, int64_t a_stride, const E* b, int64_t b_stride,
             S* c, int64_t c_stride) {
  constexpr int64_t kLanes = kRegister / sizeof(E), kWidth = kBlockVectors * kLanes;
  if (inner > kChunk) {
    product<P, kAdd>(rows, columns, kChunk, a, a_stride, b, b_stride, c, c_stride);
    a += kChunk;
    b += kChunk * b_stride;
    return product<P, true>(rows, columns, inner - kChunk, a, a_stride, b, b_stride, c, c_stride);
  }
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth)
    detail::product_columns<P, kAdd, kBlockVectors>(rows, inner, a, a_stride, b + column, b_stride, c + column,
                                                    c_stride);
  for (; column < columns; column += kLanes)
    detail::product_columns<P, kAdd, 1>(rows, inner, a, a_stride, b + column, b_stride, c + column, c_stride);
}

}  // namespace fastdecode::FD_ISA
