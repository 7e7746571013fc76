// How many of a round's tokens a request takes: up to the first stop id, and no more than its length allows. Every
// loop ends its rounds here, so that no drafter or rule can run past an end.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/exec.h"

namespace fastdecode {

struct CommitArgs {
  const int64_t* tokens;       // [batch, K1]
  const int32_t* num_emitted;  // [batch]; outside 0..K1 counts as 0
  int32_t* lengths;            // [batch], advanced by num_committed
  bool* finished;              // [batch], set where the request ended; rows that are set already stay as they are
  const int32_t* max_lengths;  // [batch]; nullptr = 2^31 - 1
  const int64_t* stop_ids;     // [batch, num_stops], padded with -1; nullptr = none
  int32_t* num_committed;      // [batch], written; includes the stop id itself
  int32_t* reason;             // [batch], written: FinishReason; kFinishStop wins where both hold
  int64_t batch, K1, num_stops;
  int64_t token_stride, stop_stride;  // elements between requests
};
namespace cpu {
void commit(const CommitArgs&, const Exec&);
}
namespace cuda {
void commit(const CommitArgs&, const Exec&);
}

}  // namespace fastdecode
