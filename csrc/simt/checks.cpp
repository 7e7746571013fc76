// Configuration, the list of barriers, and the words of the reports.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <deque>

#include "simt/internal.h"

namespace fastdecode::simt {

Config& config() {
  static Config settings;
  return settings;
}

static const char* name(Call call) {
  switch (call) {
    case Call::kNone: return "nothing";
    case Call::kSyncThreads: return "__syncthreads";
    case Call::kSyncThreadsCount: return "__syncthreads_count";
    case Call::kSyncThreadsAnd: return "__syncthreads_and";
    case Call::kSyncThreadsOr: return "__syncthreads_or";
    case Call::kSyncWarp: return "__syncwarp";
    case Call::kShuffle: return "__shfl_sync";
    case Call::kShuffleUp: return "__shfl_up_sync";
    case Call::kShuffleDown: return "__shfl_down_sync";
    case Call::kShuffleXor: return "__shfl_xor_sync";
    case Call::kBallot: return "__ballot_sync";
    case Call::kAny: return "__any_sync";
    case Call::kAll: return "__all_sync";
    case Call::kMatchAny: return "__match_any_sync";
    case Call::kMatchAll: return "__match_all_sync";
    case Call::kReduceAdd: return "__reduce_add_sync";
    case Call::kReduceMin:
    case Call::kReduceMinSigned: return "__reduce_min_sync";
    case Call::kReduceMax:
    case Call::kReduceMaxSigned: return "__reduce_max_sync";
    case Call::kReduceAnd: return "__reduce_and_sync";
    case Call::kReduceOr: return "__reduce_or_sync";
    case Call::kReduceXor: return "__reduce_xor_sync";
    case Call::kOperation: return "warp operation";
  }
  return "?";
}

std::ostream& operator<<(std::ostream& out, Call call) { return out << name(call); }
std::ostream& operator<<(std::ostream& out, Site site) { return out << site.file << ":" << site.line; }

std::string position(uint3 v) { return text("(", v.x, ", ", v.y, ", ", v.z, ")"); }

std::string lanes(uint32_t mask) {
  char hex[11];
  std::snprintf(hex, sizeof hex, "0x%08x", mask);
  return hex;
}

std::string located(const std::string& what, const Thread& thread) {
  return text(grid.kernel, ", block ", position(thread.block->index), ", thread ", position(thread.index), ": ", what);
}

std::string waits(const Thread& thread) {
  const std::string mask = thread.call >= Call::kSyncWarp ? text(" mask ", lanes(thread.mask)) : "";
  return text("waits in ", thread.call, mask, " (", thread.site, ")");
}

// A thread that waits in a collective for a lane that waits elsewhere is the only way to get stuck: block barriers
// have been compared on arrival.
void stuck(Block& block) {
  for (int t = 0; t < block.size; ++t) {
    const Thread& thread = block.threads[t];
    const Warp& warp = *thread.warp;
    if (!(warp.waiting >> thread.lane & 1)) continue;
    const uint32_t missing = thread.mask & warp.exists & ~warp.waiting;
    if (!missing) continue;
    const Thread& other = warp.threads[std::countr_zero(missing)];
    report(text("deadlock: it ", waits(thread), " for lane ", other.lane, ", which ", waits(other)), &thread);
  }
  fault("deadlock");
}

void misaligned(const void* ptr, size_t bytes, const char* file, int line) {
  fault("misaligned access of ", bytes, " bytes at ", ptr, " (", Site{file, line}, ")");
}

// ---- the list of barriers ----

namespace {

struct Barrier {
  std::string site;
  Call call;
  uint64_t executions = 0;
};

std::deque<Barrier> barriers;  // grows only

// The same place has several addresses for its file name when several sources include it.
Barrier& find_barrier(Call call, Site site) {
  struct Entry {
    const char* file = nullptr;
    int line = 0;
    Barrier* barrier = nullptr;
  };
  static Entry cache[256];
  Entry& entry = cache[(reinterpret_cast<uintptr_t>(site.file) + static_cast<uintptr_t>(site.line)) % 256];
  if (entry.file != site.file || entry.line != site.line || entry.barrier->call != call) {
    const std::string place = text(site);
    auto found = std::find_if(barriers.begin(), barriers.end(),
                              [&](const Barrier& b) { return b.call == call && b.site == place; });
    entry = {site.file, site.line, found == barriers.end() ? &barriers.emplace_back(Barrier{place, call}) : &*found};
  }
  return *entry.barrier;
}

}  // namespace

void note_barrier(Call call, Site site) { ++find_barrier(call, site).executions; }

bool skipped(Call call, Site site) { return find_barrier(call, site).site == config().skip_barrier; }

}  // namespace fastdecode::simt

using fastdecode::simt::barriers;
using fastdecode::simt::config;

extern "C" {

void fastdecode_simt_configure(uint64_t seed, int poison, int live_blocks) {
  config().seed = seed;
  config().poison = poison;
  config().live_blocks = live_blocks;
}

int fastdecode_simt_barrier_count() { return static_cast<int>(barriers.size()); }

static const fastdecode::simt::Barrier* barrier_at(int i) {
  return i >= 0 && i < fastdecode_simt_barrier_count() ? &barriers[static_cast<size_t>(i)] : nullptr;
}

const char* fastdecode_simt_barrier_site(int i) {
  const auto* barrier = barrier_at(i);
  return barrier ? barrier->site.c_str() : nullptr;
}

const char* fastdecode_simt_barrier_kind(int i) {
  const auto* barrier = barrier_at(i);
  return barrier ? name(barrier->call) : nullptr;
}

uint64_t fastdecode_simt_barrier_executions(int i) {
  const auto* barrier = barrier_at(i);
  return barrier ? barrier->executions : 0;
}

void fastdecode_simt_skip_barrier(const char* site) { config().skip_barrier = site ? site : ""; }
}
