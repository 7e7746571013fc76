// Philox4x32-10 (Salmon et al. 2011) and the numbers drawn from it: the random-number contract of the library.
//   key     = the request's 64-bit seed
//   counter = (index >> 2, stream << 24 | node, offset low, offset high); word index & 3
// `index` is the token id for noise over a row, the slot for an acceptance.
#pragma once

#include <cstdint>

#include "core/enums.h"
#include "core/fmath.h"

namespace fastdecode::FD_ISA {

struct Words {
  uint32_t w[4];
};

FD_HD inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One row's noise: everything of the counter but the index.
struct Noise {
  uint32_t seed_lo, seed_hi, stream_node, offset_lo, offset_hi;

  FD_HD Noise(int64_t seed, int64_t offset, int64_t stream, int64_t node)
      : seed_lo(static_cast<uint32_t>(seed)),
        seed_hi(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        stream_node(static_cast<uint32_t>(stream << 24 | node)),
        offset_lo(static_cast<uint32_t>(offset)),
        offset_hi(static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32)) {}

  // Words of the indices 4 * group .. 4 * group + 3.
  FD_HD Words group(uint32_t group) const { return philox(group, stream_node, offset_lo, offset_hi, seed_lo, seed_hi); }
  FD_HD uint32_t word(int64_t index) const {
    const Words words = group(static_cast<uint32_t>(index >> 2));
    const bool odd = index & 1;  // chosen without an index, which would put the words in a GPU's local memory
    return index & 2 ? (odd ? words.w[3] : words.w[2]) : (odd ? words.w[1] : words.w[0]);
  }
};

// Gumbel variate of the exponential race. Capped below 1, where the variate would be -inf and a lone id lose its draw.
FD_HD inline float gumbel(uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return -log_(exponential_from_uniform(v < 0x1.fffffep-1f ? v : 0x1.fffffep-1f));
}

// Acceptance uniform in (0, 1): 23 bits and a half.
FD_HD inline double acceptance_uniform(uint32_t word) { return (static_cast<double>(word >> 9) + 0.5) * 0x1p-23; }

}  // namespace fastdecode::FD_ISA
