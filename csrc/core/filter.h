// The one target law: logits -> bias -> bans -> bitmask -> temperature -> top-k -> top-p -> min-p -> typical. Sampler,
// drafter and verifier all take it from here, so speculation cannot target another law than plain sampling. Each filter
// sees the renormalised result of the one before; the id that crosses top_p (or typical_p) is kept; ties at a top-k,
// top-p or typical threshold keep the lowest ids; min-p keeps all ties.
#pragma once

#include <cstdint>

#include "core/cpu_level.h"
#include "core/enums.h"

namespace fastdecode {

// Per-request parameters as the caller passed them; nullptr = off.
struct FilterArgs {
  const float* temperature = nullptr;    // [batch]; <= 0 or NaN is greedy
  const int32_t* top_k = nullptr;        // [batch]; <= 0 or >= vocab_size: off
  const float* top_p = nullptr;          // [batch]; >= 1: off; <= 0 keeps the most likely id
  const float* min_p = nullptr;          // [batch]; <= 0: off
  const float* typical_p = nullptr;      // [batch]; >= 1: off; <= 0 keeps the most typical id
  const float* bias = nullptr;           // [batch, vocab_size], added to the logits; -inf forbids
  const int64_t* ban_ids = nullptr;      // [batch, num_bans], padded with -1
  const int64_t* min_lengths = nullptr;  // [batch, num_bans]: ban_ids[b, s] holds at positions < this; nullptr = always
  const int32_t* bitmask = nullptr;      // ceil(vocab_size / 32) words; bit v & 31 of word v >> 5: 1 = allowed
  const int64_t* offset = nullptr;       // [batch]: absolute position of the token that row 0 predicts
  Order order = kOrderKThenP;
  int64_t num_bans = 0;
  int64_t bias_stride = 0, ban_stride = 0, min_length_stride = 0;  // elements between requests
  int64_t bitmask_stride = 0, bitmask_row_stride = 0;              // words between requests, between rows of a request
  int64_t bitmask_flat_stride = 0;                                 // words between rows of the whole tensor
};

}  // namespace fastdecode

namespace fastdecode::FD_ISA {

// The parameters of one row.
struct RowFilter {
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f, typical_p = 1.0f;
  int32_t top_k = 0;
  Order order = kOrderKThenP;
  const float* bias = nullptr;
  const int64_t* ban_ids = nullptr;
  const int64_t* min_lengths = nullptr;
  const int32_t* bitmask = nullptr;
  int64_t num_bans = 0, position = 0;

  FD_HD bool edits() const { return bias || num_bans > 0 || bitmask; }
  FD_HD bool cuts() const {
    return !(temperature > 0.0f) || top_k > 0 || top_p < 1.0f || min_p > 0.0f || typical_p < 1.0f;
  }
};

// Row `row` of request b predicts the token at absolute position offset[b] + row; it is row `flat` of the whole tensor.
FD_HD inline RowFilter row_filter(const FilterArgs& f, int64_t b, int64_t row, int64_t flat) {
  RowFilter r;
  if (f.temperature) r.temperature = f.temperature[b];
  if (f.top_k) r.top_k = f.top_k[b];
  if (f.top_p) r.top_p = f.top_p[b];
  if (f.min_p) r.min_p = f.min_p[b];
  if (f.typical_p) r.typical_p = f.typical_p[b];
  r.order = f.order;
  if (f.bias) r.bias = f.bias + b * f.bias_stride;
  if (f.ban_ids) r.ban_ids = f.ban_ids + b * f.ban_stride, r.num_bans = f.num_bans;
  if (f.min_lengths) r.min_lengths = f.min_lengths + b * f.min_length_stride;
  if (f.bitmask) {
    r.bitmask = f.bitmask + b * f.bitmask_stride + row * f.bitmask_row_stride + flat * f.bitmask_flat_stride;
  }
  if (f.offset) r.position = f.offset[b] + row;
  return r;
}

// Probability mass as an integer, so that sums do not depend on their order: 40 bits below the largest id's 1.0.
template <class C>
FD_HD uint64_t fixed_mass(C weight) {
  return static_cast<uint64_t>(static_cast<int64_t>(weight * C(0x1p40)));
}

}  // namespace fastdecode::FD_ISA
