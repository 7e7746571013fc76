// Products of matrices on tensor cores: fragments of 16-bit numbers, sums in float. All lanes of a warp call together.
// On the host every operation is done by the last lane that arrives, for all of them.
//
// Lane 4g + q holds, of a 16 x 8 matrix of sums, c[0], c[1] = columns 2q, 2q + 1 of row g, c[2], c[3] = those of row
// g + 8 (PTX ISA, mma.m16n8k16). Where a and b lie is what load_matrices gives; see attention/attend_cuda.cu.
#pragma once

#include "core/cuda/device.cuh"
#include "core/dtype.h"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {

#if !defined(__CUDACC__)
namespace detail {

struct Matrices : simt::LaneOperands {
  const uint16_t* row;
  uint32_t out[4];
};
struct Product : simt::LaneOperands {
  uint32_t a[4], b[2];
  float* c;
};

// PTX ISA, ldmatrix: lane l names row l % 8 of matrix l / 8; lane l gets elements 2 (l % 4), + 1 of row l / 4 of each.
template <bool kTransposed>
void load_all(simt::LaneOperands* const* lanes) {
  auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<Matrices*>(lanes[8 * matrix + row])->row[column];
  };
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int row = lane / 4, column = lane % 4 * 2;
      static_cast<Matrices*>(lanes[lane])->out[m] = kTransposed
                                                        ? element(m, column, row) | element(m, column + 1, row) << 16
                                                        : element(m, row, column) | element(m, row, column + 1) << 16;
    }
}

template <class T>
void multiply_all(simt::LaneOperands* const* lanes) {
  auto half = [](uint32_t word, int i) { return load(T{static_cast<uint16_t>(word >> 16 * i)}); };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& p = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) a[g + i % 2 * 8][2 * q + e + i / 2 * 8] = half(p.a[i], e);
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 2; ++e) b[2 * q + e + i * 8][g] = half(p.b[i], e);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& p = *static_cast<Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;  // products are exact; how their sum is rounded is the machine's
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      p.c[i] += sum;
    }
  }
}

}  // namespace detail
#endif

// Four 8 x 8 matrices of 16-bit elements out of shared memory; this lane names 16 aligned bytes of it, row lane % 8 of
// matrix lane / 8. out[m] holds elements 2q, 2q + 1 of row g of matrix m; transposed: of column g.
template <bool kTransposed = false>
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&out)[4]) {
#if defined(__CUDACC__)
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
#else
  simt::check_aligned(row, 16);
  detail::Matrices mine{{"ldmatrix", detail::load_all<kTransposed>}, static_cast<const uint16_t*>(row), {}};
  simt::warp_operation(mine, __builtin_FILE(), __builtin_LINE());
  for (int m = 0; m < 4; ++m) out[m] = mine.out[m];
#endif
}

// c += a b: a is 16 x 16, its four 8 x 8 matrices in the order (rows 0.., columns 0..), (8.., 0..), (0.., 8..), (8..,
// 8..); b is 16 x 8, rows 0.. and 8.. transposed.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  detail::Product mine{{"mma", detail::multiply_all<T>}, {a[0], a[1], a[2], a[3]}, {b0, b1}, c};
  simt::warp_operation(mine, __builtin_FILE(), __builtin_LINE());
#endif
}

// Two numbers rounded to T, to nearest, ties to even; `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
  uint32_t out;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
#else
  return store<T, false>(low).bits | static_cast<uint32_t>(store<T, false>(high).bits) << 16;
#endif
}

__device__ __forceinline__ float widen(Half x) {  // load(x), by one instruction
#if defined(__CUDACC__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  return load(x);
#endif
}

template <class T, class C>
__device__ __forceinline__ T round_to(C x) {
  if constexpr (sizeof(T) == 2) {
    return {static_cast<uint16_t>(pack<T>(x, x))};
  } else {
    return x;
  }
}

}  // namespace fastdecode::FD_ISA
