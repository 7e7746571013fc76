// Element types of logits and probabilities, and the type each is computed in.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/bits.h"
#include "core/cpu_level.h"
#include "core/enums.h"

namespace fastdecode::FD_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Tag {
  using type = T;
};

// float64 logits are computed in double, everything else in float.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

// Exact conversions, written without branches so that loops over rows vectorise.
FD_HD inline double load(double x) { return x; }
FD_HD inline float load(float x) { return x; }
FD_HD inline float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FD_HD inline float load(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;  // exponent still biased by 15
  // Times 2^112 moves the bias from 15 to 127 and normalises subnormals in the same step.
  const float scaled = bit_cast<float>(rest) * 0x1p112f;
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN keep their exponent
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | sign);
}

// Bits of -inf, in an integer as wide as T.
template <class T>
inline constexpr uint64_t kMinusInfinity = 0xfff0'0000'0000'0000;
template <>
inline constexpr uint32_t kMinusInfinity<float> = 0xff80'0000;
template <>
inline constexpr uint16_t kMinusInfinity<Half> = 0xfc00;
template <>
inline constexpr uint16_t kMinusInfinity<BFloat16> = 0xff80;

template <class Visitor>
void dispatch_logits(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat64: return visit(Tag<double>{});
    case DType::kFloat32: return visit(Tag<float>{});
    case DType::kFloat16: return visit(Tag<Half>{});
    case DType::kBFloat16: return visit(Tag<BFloat16>{});
  }
  throw std::invalid_argument("dispatch_logits: unlisted dtype");
}

}  // namespace fastdecode::FD_ISA
