// Warp collectives. The last lane that arrives computes every lane's result; then all go on, in any order.
#include <algorithm>
#include <bit>

#include "simt/internal.h"

namespace fastdecode::simt {
namespace {

bool is_shuffle(Call call) { return call >= Call::kShuffle && call <= Call::kShuffleXor; }

// The lane that a shuffle reads (PTX ISA, shfl.sync).
int source_lane(Call call, int lane, Source source) {
  const auto [argument, width] = source;
  const int first = lane & ~(width - 1), last = first | (width - 1);
  switch (call) {
    case Call::kShuffle: return first | (argument & (width - 1));
    case Call::kShuffleUp: return lane - argument < first ? lane : lane - argument;
    case Call::kShuffleDown: return lane + argument > last ? lane : lane + argument;
    default: return (lane ^ argument) > last ? lane : lane ^ argument;
  }
}

template <class Each>
void for_each_lane(uint32_t lanes, Each&& each) {
  for (; lanes; lanes &= lanes - 1) each(std::countr_zero(lanes));
}

// members: the lanes of mask that the block has.
void complete(Call call, Warp& warp, uint32_t members) {
  const auto& values = warp.values;
  auto& results = warp.results;
  auto give = [&](uint64_t result) { for_each_lane(members, [&](int i) { results[i] = result; }); };
  auto reduce = [&](auto first, auto&& step) {
    for_each_lane(members, [&](int i) { first = static_cast<decltype(first)>(step(first, values[i])); });
    give(static_cast<uint64_t>(first));
  };
  switch (call) {
    case Call::kShuffle:
    case Call::kShuffleUp:
    case Call::kShuffleDown:
    case Call::kShuffleXor: for_each_lane(members, [&](int i) { results[i] = values[warp.sources[i]]; }); return;
    case Call::kBallot:
    case Call::kAny:
    case Call::kAll: {
      uint32_t votes = 0;
      for_each_lane(members, [&](int i) { votes |= static_cast<uint32_t>(values[i] != 0) << i; });
      return give(call == Call::kBallot ? votes : call == Call::kAny ? votes != 0 : votes == members);
    }
    case Call::kMatchAny:
    case Call::kMatchAll:
      for_each_lane(members, [&](int i) {
        uint32_t same = 0;
        for_each_lane(members, [&](int j) { same |= static_cast<uint32_t>(values[i] == values[j]) << j; });
        results[i] = call == Call::kMatchAny || same == members ? same : 0;
      });
      return;
    case Call::kReduceAdd: return reduce(0u, [](uint32_t a, uint64_t b) { return a + b; });
    case Call::kReduceMin: return reduce(~0u, [](uint32_t a, uint64_t b) { return std::min(a, uint32_t(b)); });
    case Call::kReduceMax: return reduce(0u, [](uint32_t a, uint64_t b) { return std::max(a, uint32_t(b)); });
    case Call::kReduceMinSigned:
      return reduce(INT32_MAX, [](int32_t a, uint64_t b) { return std::min(a, int32_t(uint32_t(b))); });
    case Call::kReduceMaxSigned:
      return reduce(INT32_MIN, [](int32_t a, uint64_t b) { return std::max(a, int32_t(uint32_t(b))); });
    case Call::kReduceAnd: return reduce(~0u, [](uint32_t a, uint64_t b) { return a & b; });
    case Call::kReduceOr: return reduce(0u, [](uint32_t a, uint64_t b) { return a | b; });
    case Call::kReduceXor: return reduce(0u, [](uint32_t a, uint64_t b) { return a ^ b; });
    case Call::kOperation: {
      LaneOperands* operands[kWarpSize];
      for (int i = 0; i < kWarpSize; ++i) operands[i] = reinterpret_cast<LaneOperands*>(values[i]);
      return operands[0]->run(operands);
    }
    default: return;  // __syncwarp
  }
}

// Returns the lane that the running thread reads.
int check_shuffle(Call call, uint32_t mask, Source from, const Site& site) {
  if (from.width < 1 || from.width > kWarpSize || (from.width & (from.width - 1))) {
    fault(call, " (", site, "): width: expected a power of two up to 32, got ", from.width);
  }
  if (call != Call::kShuffle && (from.argument < 0 || from.argument >= kWarpSize)) {
    fault(call, " (", site, "): offset: expected 0..31, got ", from.argument);
  }
  const int source = source_lane(call, current->lane, from);
  if (!(mask & current->warp->exists & 1u << source)) {
    fault("inactive lane: ", call, " (", site, ") reads lane ", source, ", which is not in mask ", lanes(mask),
          mask >> source & 1 ? " and the block" : "");
  }
  return source;
}

}  // namespace

// Six arguments, all in registers.
uint64_t collective(Call call, uint32_t mask, uint64_t value, Source source, const char* file, int line) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (grid.skips && call == Call::kSyncWarp && skipped(call, {file, line})) {
    yield();
    return 0;
  }
  me.call = call;
  me.mask = mask;
  me.site.file = file;
  me.site.line = line;
  const Site& site = me.site;
  if (!(mask >> me.lane & 1)) {
    fault("mask: ", call, " (", site, ") has mask ", lanes(mask), ", which lacks the caller, lane ", me.lane);
  }
  if (mask & warp.exited) {
    fault("inactive lane: mask ", lanes(mask), " of ", call, " (", site, ") names lane ",
          std::countr_zero(mask & warp.exited), ", which has exited");
  }
  // Lanes that the block never had do not take part.
  const uint32_t members = mask & warp.exists;
  warp.values[me.lane] = value;
  if (is_shuffle(call)) warp.sources[me.lane] = static_cast<uint8_t>(check_shuffle(call, mask, source, site));
  if (warp.claimed & mask) {
    // Waiting lanes fall into groups of one call and mask; comparing with one lane compares with its group.
    uint32_t waiting = warp.waiting;
    while (!(warp.threads[std::countr_zero(waiting)].mask & mask)) waiting &= waiting - 1;
    const Thread& other = warp.threads[std::countr_zero(waiting)];
    if (other.call != call || other.mask != mask || !(other.site == site)) {
      fault("divergence: it ", waits(me), " while lane ", other.lane, " ", waits(other));
    }
  }
  if (call == Call::kSyncWarp && !(warp.claimed & mask)) note_barrier(call, site);
  warp.waiting |= 1u << me.lane;
  warp.claimed |= mask;
  if ((warp.waiting & members) != members) {
    park();
  } else {
    complete(call, warp, members);
    warp.waiting &= ~members;
    warp.claimed &= ~mask;
    grid.idle = 0;
    wake(warp, members);
    park();
  }
  me.call = Call::kNone;
  return warp.results[me.lane];
}

void warp_operation(LaneOperands& mine, const char* file, int line) {
  if (current->warp->exists != ~0u) fault(mine.name, " (", Site{file, line}, ") needs all 32 lanes of a warp");
  collective(Call::kOperation, ~0u, reinterpret_cast<uint64_t>(&mine), {}, file, line);
}

}  // namespace fastdecode::simt
