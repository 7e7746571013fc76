// The scheduler: which thread runs next, block barriers, the life of a block.
#include "simt/internal.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>

namespace fastdecode::simt {

Grid grid;
Thread* current = nullptr;
int switches_until_yield = 0;

namespace {

constexpr uint64_t kMaxIdle = uint64_t{1} << 28;  // a few seconds

Fiber main_fiber;
std::unique_ptr<Block> blocks[kMaxLiveBlocks];
void (*kernel_body)(void*);
void* kernel_context;
std::string failure;  // the first fault of the launch

void run(Thread* next) {
  Thread& me = *current;
  if (next == &me) return;
  current = next;
  switch_fiber(me.fiber, next->fiber);
}

void check_exit(Thread& me) {
  Block& block = *me.block;
  if (!me.copies.empty()) {
    fault("asynchronous copies: it exits without having waited for ", me.copies.size(), " of them");
  }
  if (block.waiting) {
    fault("divergence: it exits while ", block.waiting, " threads of its block wait in ", block.call, " (", block.site,
          ")");
  }
  if (me.warp->claimed >> me.lane & 1) {
    uint32_t waiting = me.warp->waiting;
    for (; waiting; waiting &= waiting - 1) {
      const Thread& other = me.warp->threads[std::countr_zero(waiting)];
      if (other.mask >> me.lane & 1) {
        fault("divergence: it exits while lane ", other.lane, " ", waits(other), " for it");
      }
    }
  }
}

// The body of every fiber.
void run_thread() {
  fiber_entered(main_fiber);
  Thread& me = *current;
  Block& block = *me.block;
  try {
    kernel_body(kernel_context);
    check_exit(me);
    me.warp->exited |= 1u << me.lane;
    ++block.exited;
    grid.idle = 0;
    if (block.exited == block.size) check_red_zones(block);
    if (block.exited < block.size && !block.runnable) stuck(block);
  } catch (const Error& e) {
    failure = e.what();
  } catch (const std::exception& e) {
    failure = located(text("exception: ", e.what()), me);
  } catch (...) {
    failure = located("exception of an unknown type", me);
  }
  // A finished block's stacks are used again: not from one of them.
  Thread* const next = failure.empty() && block.exited < block.size ? take() : nullptr;
  current = next;
  switch_fiber(me.fiber, next ? next->fiber : main_fiber, /*last=*/true);
  std::terminate();
}

void start_block(int slot, uint64_t number) {
  Block& block = *blocks[slot];
  const dim3 n = grid.block_size;
  block.index = {static_cast<unsigned>(number % grid.size.x), static_cast<unsigned>(number / grid.size.x % grid.size.y),
                 static_cast<unsigned>(number / grid.size.x / grid.size.y)};
  block.slot = slot;
  block.size = static_cast<int>(n.x * n.y * n.z);
  block.num_warps = (block.size + kWarpSize - 1) / kWarpSize;
  block.exited = block.waiting = 0;
  block.runnable = 0;
  start_shared(block);
  for (int t = 0; t < block.size; ++t) {
    Thread& thread = block.threads[t];
    const auto i = static_cast<unsigned>(t);
    thread.index = {i % n.x, i / n.x % n.y, i / n.x / n.y};
    thread.block = &block;
    thread.warp = &block.warps[t / kWarpSize];
    thread.lane = static_cast<int16_t>(t % kWarpSize);
    thread.call = Call::kNone;
    thread.open_group = 0;
    thread.copies.clear();
    prepare(thread.fiber, slot * kMaxThreads + t, run_thread);
  }
  for (int w = 0; w < block.num_warps; ++w) {
    const int lanes = std::min(kWarpSize, block.size - w * kWarpSize);
    Warp& warp = block.warps[w];
    warp.threads = &block.threads[w * kWarpSize];
    warp.exists = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    warp.waiting = warp.exited = warp.claimed = 0;
  }
  wake_all(block);
}

std::map<const void*, size_t> allowed_shared;

void check_launch(const std::string& kernel, const void* address, dim3 size, dim3 block, size_t shared_bytes) {
  auto check = [&](bool good, const char* what, dim3 got, const char* expected) {
    if (good) return;
    throw Error(text(kernel, ": ", what, ": expected ", expected, ", got ", position(got)));
  };
  check(size.x && size.y && size.z && size.x <= 0x7fffffffu && size.y <= 65535 && size.z <= 65535, "grid", size,
        "(1..2147483647, 1..65535, 1..65535)");
  check(block.x && block.y && block.z && block.z <= 64 && uint64_t{block.x} * block.y <= kMaxThreads &&
            block.x * block.y * block.z <= kMaxThreads,
        "block", block, "1..1024 threads, at most 64 in z");
  const auto allowed = allowed_shared.find(address);
  const size_t limit = allowed == allowed_shared.end() ? kMaxStaticShared : std::max(kMaxStaticShared, allowed->second);
  if (shared_bytes > std::min(limit, kMaxShared)) {
    throw Error(text(kernel, ": dynamic shared memory: expected at most ", std::min(limit, kMaxShared), " bytes, got ",
                     shared_bytes, limit < kMaxShared ? "; FD_ALLOW_SHARED allows more" : ""));
  }
}

}  // namespace

void park() {
  if (!current->block->runnable) stuck(*current->block);
  run(take());
}

void yield() {
  switches_until_yield = static_cast<int>(random_bits() & 7);
  if (++grid.idle > kMaxIdle) fault("livelock: no thread got any further while this one repeats atomics or fences");
  run(exchange(current));
}

uint64_t block_barrier(Call call, uint64_t value, Site site) {
  Thread& me = *current;
  Block& block = *me.block;
  if (grid.skips && call == Call::kSyncThreads && skipped(call, site)) {
    yield();
    return 0;
  }
  me.call = call;
  me.site = site;
  if (block.exited) {
    fault("divergence: it ", waits(me), ", but ", block.exited, " threads of its block have exited");
  }
  if (!block.waiting) {
    block.call = call;
    block.site = site;
    block.gathered = call == Call::kSyncThreadsAnd;
    if (call == Call::kSyncThreads) note_barrier(call, site);
  } else if (block.call != call || !(block.site == site)) {
    fault("divergence: it ", waits(me), " while ", block.waiting, " threads of its block wait in ", block.call, " (",
          block.site, ")");
  }
  if (call == Call::kSyncThreadsCount) block.gathered += value;
  if (call == Call::kSyncThreadsAnd) block.gathered &= value;
  if (call == Call::kSyncThreadsOr) block.gathered |= value;
  if (++block.waiting < block.size) {
    park();
  } else {
    block.waiting = 0;
    block.result = block.gathered;  // nobody is still to read the last one: all have arrived here since
    grid.idle = 0;
    wake_all(block);
    park();
  }
  me.call = Call::kNone;
  return block.result;
}

void report(const std::string& what, const Thread* thread) { throw Error(thread ? located(what, *thread) : what); }

void allow_shared(const void* kernel, size_t bytes) { allowed_shared[kernel] = bytes; }

void run_grid(const char* name, const void* kernel, dim3 size, dim3 block_size, size_t shared_bytes,
              void (*body)(void*), void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  grid.kernel = name[0] == '(' ? std::string(name + 1, std::strlen(name) - 2) : name;  // (kernel<A, B>)
  check_launch(grid.kernel, kernel, size, block_size, shared_bytes);
  const Config settings = config();
  const uint64_t count = uint64_t{size.x} * size.y * size.z;
  const int live = static_cast<int>(std::min<uint64_t>(count, std::clamp(settings.live_blocks, 1, kMaxLiveBlocks)));
  grid.size = size;
  grid.block_size = block_size;
  grid.shared_bytes = shared_bytes;
  ++grid.launch;
  grid.random = settings.seed * 0x9e3779b97f4a7c15u;
  grid.poison = settings.poison ? 0xff : 0x7b;
  clear_queue();
  grid.idle = 0;
  grid.skips = !settings.skip_barrier.empty();
  kernel_body = body;
  kernel_context = context;
  failure.clear();
  main_fiber = {};
  switches_until_yield = 0;

  for (int slot = 0; slot < live; ++slot) {
    if (!blocks[slot]) blocks[slot] = std::make_unique<Block>();
  }
  begin_shared_launch();
  // Blocks start in the order (first + i * step) mod count, which meets all when step and count have no common factor.
  const uint64_t first = random_bits() % count;
  uint64_t step = random_bits() % count;
  while (std::gcd(step, count) != 1) ++step;
  uint64_t started = 0;
  auto start = [&](int slot) { start_block(slot, (first + started++ * (step % count)) % count); };
  for (int slot = 0; slot < live; ++slot) start(slot);
  while ((current = take())) {
    switch_fiber(main_fiber, current->fiber);
    if (!failure.empty()) {
      for (int i = 0; i < live * kMaxThreads; ++i) {
        if (i % kMaxThreads < blocks[i / kMaxThreads]->size) {
          ASAN_UNPOISON_MEMORY_REGION(stack_bottom(i), kStackBytes);  // frames that nothing left
        }
      }
      throw Error(failure);
    }
    for (int slot = 0; slot < live && started < count; ++slot) {
      if (blocks[slot]->exited == blocks[slot]->size) start(slot);
    }
  }
}

}  // namespace fastdecode::simt
