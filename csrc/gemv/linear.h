// y = x W^T (+ bias) (+ residual) for few rows: the shape of decoding, where the time is that of reading W once.
// W [N, K] is packed in panels of 64 output columns, [ceil(N / 64), K, 64], so that every thread reads one stream and
// no sum crosses lanes. Each output is summed over k = 0, 1, ... in order, multiply then add: its bits depend neither
// on how many rows there are nor on threads or instruction set.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

inline constexpr int64_t kPanel = 64;  // output columns per panel of a packed weight

struct LinearArgs {
  const void* x;                      // [M, K] of `dtype`, last dim contiguous
  const void* weight;                 // [ceil(N / 64), K, 64] of `dtype`, contiguous; columns past N are not used
  const void* bias;                   // [N] or nullptr
  const void* residual;               // [M, N], last dim contiguous, or nullptr
  void* y;                            // [M, N], written, contiguous
  int64_t M, N, K;                    // any may be 0
  int64_t x_stride, residual_stride;  // elements between rows
  DType dtype;                        // kFloat32 or kFloat64
};
namespace cpu {
void linear(const LinearArgs&, const Exec&);
}
namespace cuda {
void linear(const LinearArgs&, const Exec&);
}

}  // namespace fastdecode
