// commit for one request, on every backend.
#pragma once

#include <limits>

#include "core/cpu_level.h"
#include "verify/commit.h"

namespace fastdecode::FD_ISA {

FD_HD inline void commit_request(const CommitArgs& a, int64_t b) {
  a.num_committed[b] = a.reason[b] = 0;
  if (a.finished[b]) return;
  const int64_t* tokens = a.tokens + b * a.token_stride;
  const int64_t* stops = a.stop_ids ? a.stop_ids + b * a.stop_stride : nullptr;
  int64_t available = a.num_emitted[b];
  if (available < 0 || available > a.K1) available = 0;
  // In 64 bits, and capped where lengths end, so that a request at 2^31 - 1 does not wrap.
  const int64_t cap = a.max_lengths ? a.max_lengths[b] : std::numeric_limits<int32_t>::max();
  const int64_t left = cap - a.lengths[b], room = left > 0 ? left : 0;
  const int64_t limit = available < room ? available : room;
  int64_t n = 0;
  int32_t reason = kFinishNone;
  while (n < limit && reason == kFinishNone) {
    const int64_t token = tokens[n++];
    for (int64_t s = 0; s < a.num_stops && stops; ++s)
      if (stops[s] >= 0 && stops[s] == token) reason = kFinishStop;
  }
  if (reason == kFinishNone && n == room) reason = kFinishLength;
  a.lengths[b] = static_cast<int32_t>(a.lengths[b] + n);
  a.num_committed[b] = static_cast<int32_t>(n);
  a.reason[b] = reason;
  a.finished[b] = reason != kFinishNone;
}

}  // namespace fastdecode::FD_ISA
