#include "sample/apply_token_bitmask.h"

#include <array>

#include "core/dtype.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int64_t kBits = 32;

// Constants, because SSE2 has no shift by a vector.
constexpr auto kBit = [] {
  std::array<uint32_t, kBits> bit{};
  for (int64_t i = 0; i < kBits; ++i) bit[i] = uint32_t{1} << i;
  return bit;
}();

// Up to this many ids of a word are forbidden one by one: a store waits for no cache line, a blend waits for both.
constexpr int kFew = 4;

template <class Bits>
void apply_word(uint32_t word, Bits* x, int64_t n, Bits minus_infinity) {
  if (word == ~uint32_t{0}) return;
  if (word == 0) {
    for (int64_t i = 0; i < n; ++i) x[i] = minus_infinity;
  } else if (n == kBits && __builtin_popcount(~word) <= kFew) {
    for (uint32_t left = ~word; left != 0; left &= left - 1) x[__builtin_ctz(left)] = minus_infinity;
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = (word & kBit[i]) != 0 ? x[i] : minus_infinity;
  }
}

template <class Bits>
void one_row(const ApplyTokenBitmaskArgs& a, const int32_t* mask, Bits* x, Bits minus_infinity) {
  const int64_t full = std::min(a.words, a.vocab_size / kBits);
  for (int64_t w = 0; w < full; ++w) apply_word(static_cast<uint32_t>(mask[w]), x + w * kBits, kBits, minus_infinity);
  int64_t v = full * kBits;
  if (full < a.words) {  // the vocabulary ends inside this word
    apply_word(static_cast<uint32_t>(mask[full]), x + v, a.vocab_size - v, minus_infinity);
    v = a.vocab_size;
  }
  for (; v < a.vocab_size; ++v) x[v] = minus_infinity;
}

template <class T>
void run(const ApplyTokenBitmaskArgs& a, const Exec& ex) {
  // Logits are handled as bits, so that a NaN passes unchanged and float16 needs no conversion.
  constexpr auto minus_infinity = kMinusInfinity<T>;
  using Bits = std::remove_const_t<decltype(minus_infinity)>;
  for_each_row(ex, a.batch * a.rows, a.vocab_size, nullptr, 0, [&](int64_t r, void*) {
    const int64_t b = r / a.rows, row = r % a.rows;
    if (a.active && !a.active[b]) return;
    Bits* x = static_cast<Bits*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    if (!a.indexed) return one_row(a, a.bitmask + b * a.mask_stride + row * a.mask_row_stride, x, minus_infinity);
    // From the row to its masks, so that two masks of one row are never at work on it at once.
    for (int64_t j = 0; j < a.num_indices; ++j)
      if (a.indices[j] == b) one_row(a, a.bitmask + j * a.mask_stride, x, minus_infinity);
  });
}

}  // namespace

void apply_token_bitmask(const ApplyTokenBitmaskArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(apply_token_bitmask, ApplyTokenBitmaskArgs)
