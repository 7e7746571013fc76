#include "verify/commit_request.h"

namespace fastdecode::FD_ISA {

void commit(const CommitArgs& a, const Exec&) {
  for (int64_t b = 0; b < a.batch; ++b) commit_request(a, b);
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(commit, CommitArgs)
