// Reinterpreting bits, in C++17 for nvcc as well.
#pragma once

#include "core/cpu_level.h"

namespace fastdecode::FD_ISA {

template <class To, class From>
FD_INLINE FD_HD constexpr To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

}  // namespace fastdecode::FD_ISA
