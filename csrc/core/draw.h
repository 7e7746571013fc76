// Where a request's randomness comes from: explicit uniforms, or seed and offset.
#pragma once

#include <cstdint>

namespace fastdecode {

struct RandomArgs {
  const double* uniforms = nullptr;  // [batch, ...]; excludes seed
  const int64_t* seed = nullptr;     // [batch]
  const int64_t* offset = nullptr;   // [batch]: absolute position of the token that row 0 predicts
  int64_t uniform_stride = 0;        // elements between requests
};

}  // namespace fastdecode
