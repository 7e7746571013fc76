#include "verify/commit.h"

#include <algorithm>
#include <limits>

#include "core/cpu_level.h"

namespace fastdecode::FD_ISA {

void commit(const CommitArgs& a, const Exec&) {
  for (int64_t b = 0; b < a.batch; ++b) {
    a.num_committed[b] = a.reason[b] = 0;
    if (a.finished[b]) continue;
    const int64_t* tokens = a.tokens + b * a.token_stride;
    const int64_t* stops = a.stop_ids ? a.stop_ids + b * a.stop_stride : nullptr;
    int64_t available = a.num_emitted[b];
    if (available < 0 || available > a.K1) available = 0;
    // In 64 bits, and capped where lengths end, so that a request at 2^31 - 1 does not wrap.
    const int64_t cap = a.max_lengths ? a.max_lengths[b] : std::numeric_limits<int32_t>::max();
    const int64_t room = std::max<int64_t>(0, cap - a.lengths[b]);
    const int64_t limit = std::min(available, room);
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
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(commit, CommitArgs)
