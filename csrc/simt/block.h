// The state of a launch, and what the calls in kernels do with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
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
  kOperation,
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

// What a switch touches comes first, in one cache line.
struct alignas(64) Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  uint3 index;
  uint32_t mask;
  Site site;
  Call call;  // that it waits in, at site, with mask
  int16_t lane;
  // cp.async
  uint32_t open_group;  // number of groups committed
  std::vector<AsyncCopy> copies;
};

struct Warp {
  Thread* threads;
  // Sets of lanes.
  uint32_t exists, exited;
  uint32_t waiting;  // in a collective
  uint32_t claimed;  // union of the masks of the waiting lanes; masks in use are equal or disjoint
  // Per lane, of the collective that it is in.
  uint64_t values[kWarpSize];  // zero-extended bits
  uint64_t results[kWarpSize];
  uint8_t sources[kWarpSize];  // the lanes that shuffles read
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
  int runnable;  // threads in the queue
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
  int front_of_8;  // see queue.cpp
  uint64_t idle;   // switches since a barrier, collective or thread ended
  unsigned char poison;
  bool skips;  // there is a barrier to skip
};

extern Grid grid;
extern Thread* current;           // nullptr outside kernels
extern int switches_until_yield;  // preemption points to pass until the next one that gives way

// What a lane brings to an operation of its whole warp (ldmatrix, mma), which run() does for all lanes at once.
struct LaneOperands {
  const char* name;
  void (*run)(LaneOperands* const* lanes);
};

// For the calls in kernels.
uint64_t block_barrier(Call call, uint64_t value, Site site);
struct Source {
  int argument = 0;  // source lane or offset
  int width = 32;
};
uint64_t collective(Call call, uint32_t mask, uint64_t value, Source source, const char* file, int line);
void warp_operation(LaneOperands& mine, const char* file, int line);
void yield();
inline void preemption_point() {
  if (current && --switches_until_yield < 0) yield();
}
void async_copy(void* shared, const void* global, int bytes, Site site);
void async_commit();
void async_wait(int groups_left);

}  // namespace fastdecode::simt
