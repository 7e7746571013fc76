// The order in which a row is summed, the same on every backend: tiles of 2048 elements; in a tile 256 lanes, lane l
// adding elements l, l + 256, ... in order; the lanes joined by a balanced binary tree over neighbours; tiles added in
// double, first to last. Elements that are zero change nothing, so a row of which few ids have weight may be summed
// from those alone. Blocks of 64 are what a scan keeps the largest logit of.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"

namespace fastdecode::FD_ISA {

inline constexpr int64_t kTile = 2048;
inline constexpr int64_t kLanes = 256;
inline constexpr int64_t kBlock = 64;

FD_HD inline int64_t num_tiles(int64_t vocab_size) { return (vocab_size + kTile - 1) / kTile; }
FD_HD inline int64_t num_blocks(int64_t vocab_size) { return (vocab_size + kBlock - 1) / kBlock; }

}  // namespace fastdecode::FD_ISA
