// Who runs next. Runnable threads stand in one queue. Those woken together enter it in a random order, at its front (so
// that a warp or block runs far ahead of the others) or at its back (so that all others come first).
#include <algorithm>
#include <array>
#include <bit>
#include <numeric>

#include "simt/internal.h"

namespace fastdecode::simt {
namespace {

constexpr uint32_t kCapacity = kMaxLiveBlocks * kMaxThreads;  // a power of two
Thread* queue[kCapacity];
uint32_t head, count;

// Places for n threads; the first one's index.
uint32_t reserve(uint32_t n, bool front) {
  if (front) head -= n;
  count += n;
  return front ? head : head + count - n;
}

void put(uint32_t place, Thread* thread) { queue[place % kCapacity] = thread; }

// Random orders of 32 things; with a random number xored to the entries they give 32 times as many.
constexpr int kOrders = 64;
using Order = std::array<uint8_t, 32>;
const std::array<Order, kOrders> orders = [] {
  std::array<Order, kOrders> all;
  uint64_t state = 1;
  for (Order& order : all) {
    std::iota(order.begin(), order.end(), uint8_t{0});
    for (size_t i = 31; i > 0; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i], order[(state >> 33) % (i + 1)]);
    }
  }
  return all;
}();

struct Shuffled {
  const Order& order;
  uint32_t flip;
  explicit Shuffled(uint32_t random) : order(orders[random % kOrders]), flip(random / kOrders % 32) {}
  uint32_t operator[](uint32_t i) const { return order[i] ^ flip; }
};

// With what probability (of 8) woken threads go to the front; never always, or who polls would starve whom it polls.
void new_mood() { grid.front_of_8 = std::array{0, 4, 7}[random_bits() % 3]; }

bool to_front(uint32_t random) { return static_cast<int>(random >> 29) < grid.front_of_8; }

}  // namespace

uint32_t random_bits() {
  grid.random += 0xa0761d6478bd642fu;  // wyrand
  const unsigned __int128 m = static_cast<unsigned __int128>(grid.random) * (grid.random ^ 0xe7037ed1a0b428dbu);
  return static_cast<uint32_t>(static_cast<uint64_t>(m >> 64) ^ static_cast<uint64_t>(m));
}

void clear_queue() { head = count = 0; }

Thread* take() {
  if (!count) return nullptr;
  Thread* const next = queue[head++ % kCapacity];
  --count;
  --next->block->runnable;
  // The next ones' state and stacks are in no near cache.
  if (count > 3) {
    __builtin_prefetch(queue[(head + 3) % kCapacity]);
    prefetch_stack(queue[(head + 1) % kCapacity]->fiber);
  }
  return next;
}

Thread* exchange(Thread* thread) {
  if (!count) return thread;
  Thread*& place = queue[(head + random_bits() % count) % kCapacity];
  Thread* const next = place;
  place = thread;
  ++thread->block->runnable;
  --next->block->runnable;
  return next;
}

void wake(Warp& warp, uint32_t lanes) {
  const uint32_t random = random_bits(), n = static_cast<uint32_t>(std::popcount(lanes));
  const Shuffled lane(random);
  uint32_t place = reserve(n, to_front(random));
  for (uint32_t i = 0; i < 32; ++i) {
    if (lanes >> lane[i] & 1) put(place++, &warp.threads[lane[i]]);
  }
  warp.threads->block->runnable += static_cast<int>(n);
}

void wake_all(Block& block) {
  new_mood();
  const uint32_t random = random_bits(), num_warps = static_cast<uint32_t>(block.num_warps);
  uint32_t place = reserve(static_cast<uint32_t>(block.size), to_front(random));
  block.runnable += block.size;
  auto put_lane = [&](Warp& warp, uint32_t lane) {
    if (warp.exists >> lane & 1) put(place++, &warp.threads[lane]);
  };
  Warp* warps[kMaxWarps];
  const Shuffled shuffled(random);
  uint32_t found = 0;
  for (uint32_t i = 0; i < 32; ++i) {
    if (shuffled[i] < num_warps) warps[found++] = &block.warps[shuffled[i]];
  }
  if (random >> 28 & 1) {  // warp after warp
    for (uint32_t w = 0; w < num_warps; ++w) {
      const Shuffled lane(random_bits());
      for (uint32_t i = 0; i < 32; ++i) put_lane(*warps[w], lane[i]);
    }
  } else {  // lanes of all warps mixed
    const Shuffled lane(random_bits());
    for (uint32_t i = 0; i < 32; ++i) {
      for (uint32_t w = 0; w < num_warps; ++w) put_lane(*warps[w], lane[i] ^ w);
    }
  }
}

}  // namespace fastdecode::simt
