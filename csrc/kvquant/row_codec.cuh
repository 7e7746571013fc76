// The channels of one head of one token, coded by a warp: a row of numbers in shared memory on one side, the bytes of
// core/kv.h on the other. Every lane of the warp calls these, and gets status bits of its own.
#pragma once

#include "core/cuda/reduce.cuh"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {

template <class C>
struct Range {
  C low = kInf<C>, high = -kInf<C>;  // of the finite values
  bool all_finite = true;

  __device__ void add(C x) {
    if (is_finite(x)) {
      low = x < low ? x : low;
      high = x > high ? x : high;
    } else {
      all_finite = false;
    }
  }
  __device__ int32_t status(C coded_low, C coded_high) const {
    const bool saturated = low <= high && (low < coded_low || high > coded_high);
    return (all_finite ? 0 : kStatusNaN) | (saturated ? kStatusSaturated : 0);
  }
};

template <class C>
__device__ inline Range<C> warp_range(const C* x, int n) {
  Range<C> r;
  for (int i = lane_id(); i < n; i += kWarp) r.add(x[i]);
  r.low = warp_reduce(r.low, Smaller{});
  r.high = warp_reduce(r.high, Larger{});
  return r;
}

// codes[i] of n values whose range is r, by the lanes `first`, first + step, ...; lane `first` = 0 stores the scale.
template <class C>
__device__ inline int32_t encode_group(const Range<C>& r, const C* x, int n, int bits, uint8_t* codes, Half* scale,
                                       int64_t scale_stride, int first, int step) {
  const bool any = r.low <= r.high;
  const C low = coded_limit(r.low, any), high = coded_limit(r.high, any);
  const Grid grid = make_grid(low, high, (1 << bits) - 1);
  if (first == 0) {
    scale[0] = grid.step;
    scale[scale_stride] = grid.offset;
  }
  const Coder<C> coder(grid, low, high);
  for (int i = first; i < n; i += step) codes[i] = static_cast<uint8_t>(coder.code(x[i]));
  return r.status(low, high);
}

// n channels in groups, as codes of `bits` bits in split order; `codes` is shared memory for n bytes.
template <class C>
__device__ inline int32_t warp_encode_ints(const C* x, int n, int group, int bits, uint8_t* codes, uint8_t* data,
                                           Half* scale) {
  const int lane = lane_id();
  int32_t status = 0;
  if (group >= kWarp) {
    for (int g = 0; g * group < n; ++g) {
      const C* from = x + g * group;
      status |=
          encode_group(warp_range(from, group), from, group, bits, codes + g * group, scale + 2 * g, 1, lane, kWarp);
    }
  } else {  // a lane per group
    for (int g = lane; g * group < n; g += kWarp) {
      const C* from = x + g * group;
      Range<C> r;
      for (int i = 0; i < group; ++i) r.add(from[i]);
      status |= encode_group(r, from, group, bits, codes + g * group, scale + 2 * g, 1, 0, 1);
    }
  }
  __syncwarp();  // the codes are there
  const int bytes = n * bits / 8;
  for (int j = lane; j < bytes; j += kWarp) {
    uint32_t byte = 0;
    for (int part = 0; part < 8 / bits; ++part) byte |= static_cast<uint32_t>(codes[j + part * bytes]) << (bits * part);
    data[j] = static_cast<uint8_t>(byte);
  }
  return status;
}

template <class F, class C>
__device__ inline int32_t warp_encode_fp8(const C* x, int n, int group, uint8_t* data, float* scales, bool given) {
  int32_t status = 0;
  for (int g = 0; g * group < n; ++g) {
    float scale = *scales;
    if (!given) {
      const Range<C> r = warp_range(x + g * group, group);
      scale = fp8_scale<F>(r.low > r.high ? C(0) : -r.low > r.high ? -r.low : r.high);
      if (lane_id() == 0) scales[g] = scale;
    }
    for (int i = g * group + lane_id(); i < (g + 1) * group; i += kWarp) {
      const C y = x[i] / static_cast<C>(scale);
      if (!is_finite(x[i]) || y != y) {
        status |= kStatusNaN;
      } else if (leaves_format<F>(y)) {
        status |= kStatusSaturated;
      }
      data[i] = static_cast<uint8_t>(encode_saturating<F>(y));
    }
  }
  return status;
}

template <class E, class C>
__device__ inline int32_t warp_store(const C* x, int n, E* to) {
  int32_t status = 0;
  for (int i = lane_id(); i < n; i += kWarp) {
    if (!is_finite(x[i])) status |= kStatusNaN;
    if (saturates<E>(x[i])) status |= kStatusSaturated;
    to[i] = store<E, true>(x[i]);
  }
  return status;
}

}  // namespace fastdecode::FD_ISA
