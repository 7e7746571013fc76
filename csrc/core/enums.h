// Numbers that cross the op boundary. Declared here once; _host exports them to Python under the same names.
#pragma once

#include <cstdint>

namespace fastdecode {

// Bits of every op's `status` output; 0 = fine. kErrors end the request.
enum Status : int32_t {
  kStatusNaN = 1,                // the row holds NaN or +inf
  kStatusNoMass = 2,             // nothing to choose from: every id is forbidden or has probability 0
  kStatusUnmappedDraft = 4,      // a draft id lies outside the target's vocabulary
  kStatusZeroDraftProb = 8,      // the draft law gives the drafted token probability 0
  kStatusResidualFallback = 16,  // the residual vanished by rounding; drew from the target row
  kStatusBadLength = 32,         // a length outside its range
  kStatusBadPage = 64,           // a page id or slot outside the cache
  kStatusSaturated = 128,        // a value too large for the cache's format was stored as the largest it has
  kStatusErrors = kStatusNaN | kStatusNoMass | kStatusBadLength | kStatusBadPage,
};

// Acceptance rules of verify_chain; typical and top_beta do not keep the target's law.
enum Rule : int64_t { kRuleRatio = 0, kRuleCoupled = 1, kRuleBlock = 2, kRuleTypical = 3, kRuleTopBeta = 4 };

// Last token of the typical rule: the row's argmax, or drawn from what the rule would have accepted.
enum Bonus : int64_t { kBonusGreedy = 0, kBonusSample = 1 };

// Whether top-p sees the law that top-k left, or both are cut from the same law.
enum Order : int64_t { kOrderKThenP = 0, kOrderJoint = 1 };

// Why a request ended, from commit.
enum FinishReason : int32_t { kFinishNone = 0, kFinishStop = 1, kFinishLength = 2 };

// Ids are counted in 32 bits and masses in 64, 40 of them behind the point (core/filter.h).
inline constexpr int64_t kMaxVocabSize = int64_t{1} << 23;

// Second word of the Philox counter is stream << 24 | node: who draws.
enum Stream : int64_t {
  kStreamToken = 0,
  kStreamDraft = 1,
  kStreamAccept = 2,
  kStreamResidual = 3,
  kStreamBonus = 4,
  kStreamUnmaskOrder = 5,
  kStreamUnmaskToken = 6,
  kStreamUser = 7,
};

// How keys and values lie in a cache (core/kv.h).
enum KVScheme : int64_t {
  kKVPlain = 0,    // float64, float32, float16 or bfloat16
  kKVFp8E4M3 = 1,  // one byte a value, times a scale
  kKVFp8E5M2 = 2,
  kKVInt8 = 3,  // code * step + offset; a step and an offset per token and group of channels
  kKVInt4 = 4,
  kKVKivi4 = 5,  // as int4, but keys have a step and an offset per channel and group of tokens; the newest tokens lie
  kKVKivi2 = 6,  // uncoded in a ring
};

// Slots of a draft tree; trees are checked and masked in one block's shared memory.
inline constexpr int64_t kMaxTreeSlots = 1024;

// What tree_check finds wrong with a tree.
enum TreeError : int32_t {
  kTreeValid = 0,
  kTreeBadCount = 1,   // num_nodes outside 0..N
  kTreeBadRoot = 2,    // the parent of slot 0 is not -1
  kTreeBadParent = 3,  // a parent that is not an earlier slot
};

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

}  // namespace fastdecode
