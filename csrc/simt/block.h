// The state of a launch: threads, warps, blocks, and the choice of who runs next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "simt/executor.h"
#include "simt/fiber.h"

namespace fastdecode::simt {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxThreads = 1024;  // per block
inline constexpr int kMaxWarps = kMaxThreads / kWarpSize;
inline constexpr int kMaxLiveBlocks = 8;
inline constexpr size_t kMaxStaticShared = size_t{48} << 10;  // per block, as nvcc allows
inline constexpr size_t kMaxShared = size_t{227} << 10;       // per block, static and dynamic, sm_90

// What a thread can wait in.
enum class Call : uint8_t {
  kNone,
  kSyncThreads,
  kSyncThreadsCount,
  kSyncThreadsAnd,
  kSyncThreadsOr,
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceMinSigned,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
};

struct Site {
  const char* file = "";
  int line = 0;
  // One place of a header has an address for its name in every source that includes it.
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct AsyncCopy {
  void* shared;
  const void* global;
  uint32_t bytes;
  uint32_t group;
};

struct Block;
struct Warp;

struct Thread {
  Fiber fiber;
  uint3 index;
  Block* block;
  Warp* warp;
  int lane;
  // The call that it waits in.
  Call call;
  uint32_t mask;
  Site site;
  uint64_t value;  // operand, zero-extended bits
  int argument;    // source lane or offset of a shuffle
  int width;
  uint64_t result;
  // cp.async
  uint32_t open_group;  // number of groups committed
  std::vector<AsyncCopy> copies;
};

// Sets of lanes. A lane of `exists` is in runnable, waiting (in a collective), exited, at a block barrier, or running.
struct Warp {
  Thread* threads;
  uint32_t exists, runnable, waiting, exited;
  uint32_t claimed;  // union of the masks of the waiting lanes; masks in use are equal or disjoint
};

struct Block {
  uint3 index;
  int slot;
  int size, num_warps;
  int exited;
  // The block barrier.
  int waiting;
  Call call;
  Site site;
  uint64_t gathered, result;
  uint32_t runnable;  // warps with a runnable lane
  std::byte* arena;
  Warp warps[kMaxWarps];
  Thread threads[kMaxThreads];
};

struct Grid {
  std::string kernel;
  dim3 size{0}, block_size{0};
  size_t shared_bytes;
  uint64_t launch = 0;  // launches so far in this process
  uint64_t random;
  bool keep_block, keep_warp;  // go on with the same one while it can run
  int live;                    // blocks at once
  uint32_t runnable;           // those of them with a runnable lane
  uint64_t idle;               // switches since a barrier, collective or thread ended
  unsigned char poison;
};

extern Grid grid;
extern Thread* current;           // nullptr outside kernels
extern int switches_until_yield;  // preemption points to pass until the next one that gives way

// For the calls in kernels.
uint64_t block_barrier(Call call, uint64_t value, Site site);
uint64_t collective(Call call, uint32_t mask, uint64_t value, int argument, int width, Site site);
void yield();
inline void preemption_point() {
  if (--switches_until_yield < 0 && current) yield();
}
void async_copy(void* shared, const void* global, int bytes, Site site);
void async_commit();
void async_wait(int groups_left);

// Between the parts of the executor.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}
void park();  // the running thread waits until another one marks it runnable
void mark_runnable(Warp& warp, uint32_t lanes);
void start_shared(Block& block);
void begin_shared_launch();
bool skipped(Call call, Site site);
[[noreturn]] void stuck(Block& block);  // none of its threads can run
// Ends the launch: unwinds the running thread to its base. Reported as the fault of `thread`.
[[noreturn]] void report(const std::string& what, const Thread* thread);
template <class... Parts>
[[noreturn]] void fault(const Parts&... parts) {
  report(text(parts...), current);
}
std::string located(const std::string& what, const Thread& thread);
std::string waits(const Thread& thread);  // "waits in ..."
std::string position(uint3 v);
std::string lanes(uint32_t mask);
std::ostream& operator<<(std::ostream& out, Call call);
std::ostream& operator<<(std::ostream& out, Site site);

}  // namespace fastdecode::simt
