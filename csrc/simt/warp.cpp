// Warp collectives. The last lane that arrives computes every lane's result; then all go on, in any order.
#include <algorithm>
#include <bit>

#include "simt/internal.h"

namespace fastdecode::simt {
namespace {

// The lane that a shuffle reads (PTX ISA, shfl.sync).
int source_lane(const Thread& reader) {
  const int first = reader.lane & ~(reader.width - 1), last = first | (reader.width - 1);
  switch (reader.call) {
    case Call::kShuffle: return first | (reader.argument & (reader.width - 1));
    case Call::kShuffleUp: return reader.lane - reader.argument < first ? reader.lane : reader.lane - reader.argument;
    case Call::kShuffleDown: return reader.lane + reader.argument > last ? reader.lane : reader.lane + reader.argument;
    default: return (reader.lane ^ reader.argument) > last ? reader.lane : reader.lane ^ reader.argument;
  }
}

template <class Each>
void for_each_lane(uint32_t lanes, Each&& each) {
  for (; lanes; lanes &= lanes - 1) each(std::countr_zero(lanes));
}

// members: the lanes of mask that the block has.
void complete(Call call, Thread* threads, uint32_t members) {
  auto reduce = [&](auto first, auto&& step) {
    for_each_lane(members, [&](int i) { first = static_cast<decltype(first)>(step(first, threads[i].value)); });
    for_each_lane(members, [&](int i) { threads[i].result = first; });
  };
  switch (call) {
    case Call::kShuffle:
    case Call::kShuffleUp:
    case Call::kShuffleDown:
    case Call::kShuffleXor:
      for_each_lane(members, [&](int i) { threads[i].result = threads[source_lane(threads[i])].value; });
      return;
    case Call::kBallot:
    case Call::kAny:
    case Call::kAll: {
      uint32_t votes = 0;
      for_each_lane(members, [&](int i) { votes |= static_cast<uint32_t>(threads[i].value != 0) << i; });
      const uint32_t result = call == Call::kBallot ? votes : call == Call::kAny ? votes != 0 : votes == members;
      for_each_lane(members, [&](int i) { threads[i].result = result; });
      return;
    }
    case Call::kMatchAny:
    case Call::kMatchAll:
      for_each_lane(members, [&](int i) {
        uint32_t same = 0;
        for_each_lane(members,
                      [&](int j) { same |= static_cast<uint32_t>(threads[i].value == threads[j].value) << j; });
        threads[i].result = call == Call::kMatchAny || same == members ? same : 0;
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
    default: return;  // __syncwarp
  }
}

void check_shuffle(const Thread& me, uint32_t members) {
  if (me.width < 1 || me.width > kWarpSize || (me.width & (me.width - 1))) {
    fault(me.call, " (", me.site, "): width: expected a power of two up to 32, got ", me.width);
  }
  if (me.call != Call::kShuffle && (me.argument < 0 || me.argument >= kWarpSize)) {
    fault(me.call, " (", me.site, "): offset: expected 0..31, got ", me.argument);
  }
  const int source = source_lane(me);
  if (!(members >> source & 1)) {
    fault("inactive lane: ", me.call, " (", me.site, ") reads lane ", source, ", which is not in mask ", lanes(me.mask),
          members == me.mask ? "" : " or not in the block");
  }
}

}  // namespace

uint64_t collective(Call call, uint32_t mask, uint64_t value, int argument, int width, Site site) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (grid.skips && call == Call::kSyncWarp && skipped(call, site)) {
    yield();
    return 0;
  }
  me.call = call;
  me.mask = mask;
  me.site = site;
  me.value = value;
  me.argument = argument;
  me.width = width;
  if (!(mask >> me.lane & 1)) {
    fault("mask: ", call, " (", site, ") has mask ", lanes(mask), ", which lacks the caller, lane ", me.lane);
  }
  if (mask & warp.exited) {
    fault("inactive lane: mask ", lanes(mask), " of ", call, " (", site, ") names lane ",
          std::countr_zero(mask & warp.exited), ", which has exited");
  }
  // Lanes that the block never had do not take part.
  const uint32_t members = mask & warp.exists;
  if (call >= Call::kShuffle && call <= Call::kShuffleXor) check_shuffle(me, members);
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
    complete(call, warp.threads, members);
    warp.waiting &= ~members;
    warp.claimed &= ~mask;
    grid.idle = 0;
    wake(warp, members);
    park();
  }
  me.call = Call::kNone;
  return me.result;
}

}  // namespace fastdecode::simt
