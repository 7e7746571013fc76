// Settings of this process: which instruction-set build of the CPU kernels runs.
#pragma once

#include <cstdint>

namespace fastdecode::bind {

// 1, 3 or 4: x86-64, x86-64-v3 (AVX2, FMA), x86-64-v4 (AVX-512) with VNNI and BF16.
int32_t current_cpu_level();

}  // namespace fastdecode::bind
