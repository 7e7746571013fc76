// How keys and values come into shared memory, a tile at a time: copied as they lie in the cache, asynchronously and
// some tiles ahead, then decoded; or decoded from the cache itself where their addresses allow no such copies.
#pragma once

#include "attention/attend.cuh"
#include "core/cuda/async.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/vector.cuh"
#include "core/fmath.h"
#include "core/kv_codec.h"

namespace fastdecode::FD_ISA {

__device__ __forceinline__ void copy_async(unsigned char* to, const unsigned char* from, int bytes) {
  if (bytes == 16) return cp_async<16>(to, from);
  if (bytes == 8) return cp_async<8>(to, from);
  cp_async<4>(to, from);
}

// Rows of `bytes` of the tile's keys.
template <class T>
__device__ void copy_rows(const Source& source, const Part& part, const KeySlot* slots, int first,
                          const unsigned char* data, int64_t page_stride, int64_t token_stride, int bytes, int step,
                          unsigned char* to, int stride) {
  const auto steps = static_cast<unsigned>(bytes / step);
  for (unsigned i = threadIdx.x; i < Tile<T>::kKeys * steps; i += kBlockThreads) {
    const int row = static_cast<int>(i / steps), byte = static_cast<int>(i % steps) * step, key = first + row;
    if (key >= part.begin && key < part.end) {
      const KeySlot slot = slots[key % kSplit];
      copy_async(to + row * stride + byte, data + slot.page * page_stride + slot.offset * token_stride + byte, step);
    } else if (source.as_is) {  // what is multiplied by weights of 0 must be a number
      for (int b = 0; b < step; b += 4) store_chunk<4>(to + row * stride + byte + b, {});
    }
  }
}

// Keys of kivi: of every group of tokens in the tile, the run of codes of each channel, and steps and offsets.
template <class T>
__device__ void copy_groups(const Source& source, const Part& part, const KeySlot* slots, int first,
                            const unsigned char* data, const unsigned char* scale, unsigned char* stage) {
  const int groups = Tile<T>::kKeys / source.group, run_bytes = source.group * source.bits / 8;
  auto copy = [&](int per_group, int step, unsigned char* to, auto&& from) {  // from(slot, byte)
    const auto steps = static_cast<unsigned>(per_group / step);
    for (unsigned i = threadIdx.x; i < groups * steps; i += kBlockThreads) {
      const int g = static_cast<int>(i / steps), byte = static_cast<int>(i % steps) * step;
      const int key = first + g * source.group;
      if (key >= part.end || key + source.group <= part.begin) continue;
      const KeySlot slot = slots[(key > part.begin ? key : part.begin) % kSplit];
      copy_async(to + g * per_group + byte, from(slot, byte), step);
    }
  };
  copy(source.head_dim * run_bytes, source.copy_bytes, stage + source.at, [&](KeySlot slot, int byte) {
    return data + slot.page * source.page_stride + byte / run_bytes * source.token_stride +
           slot.offset / source.group * run_bytes + byte % run_bytes;
  });
  copy(4 * source.head_dim, 4, stage + source.scale_at, [&](KeySlot slot, int byte) {
    return scale + slot.page * source.scale_page_stride + slot.offset / source.group * 4 * source.head_dim + byte;
  });
}

// The tile at key `first`, as it lies in the cache, into a stage.
template <class T>
__device__ void fetch(const Source& source, const Part& part, const KeySlot* slots, int first, unsigned char* stage) {
  if (source.copy_bytes == 0) return;
  const unsigned char* data = source.data + part.head * source.head_stride;
  const unsigned char* scale = source.scale + part.head * source.scale_head_stride;
  if (source.by_channel) return copy_groups<T>(source, part, slots, first, data, scale, stage);
  copy_rows<T>(source, part, slots, first, data, source.page_stride, source.token_stride, source.row_bytes,
               source.copy_bytes, stage + source.at, source.stride);
  if (source.scale && !source.static_scale)
    copy_rows<T>(source, part, slots, first, scale, source.scale_page_stride, source.scale_token_stride,
                 source.scale_bytes, 4, stage + source.scale_at, source.scale_bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding

// Byte i of a word, as a number: 2^23 + byte has the byte in its low bits.
__device__ inline float byte_of(uint32_t word, int i) {
  return bit_cast<float>(__byte_perm(word, 0x4b000000u, 0x7650u | static_cast<unsigned>(i))) - 0x1p23f;
}

// Four channels of a token from where it lies.
template <class C>
struct Numbers {
  const Source& source;
  int channel;

  template <class E>
  __device__ void read(const unsigned char* row, C (&x)[4]) const {
    const E* numbers = reinterpret_cast<const E*>(row) + channel;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = static_cast<C>(load(numbers[e]));
  }

  __device__ void operator()(const unsigned char* row, const unsigned char*, C (&x)[4]) const {
    switch (source.dtype) {
      case DType::kFloat64: return read<double>(row, x);
      case DType::kFloat32: return read<float>(row, x);
      case DType::kFloat16: return read<Half>(row, x);
      default: return read<BFloat16>(row, x);
    }
  }
};

// Four codes that stand in one place of four bytes: a token's channels are one run in split order, of a length that 4
// divides.
template <class C>
struct Codes {
  const Source& source;
  int byte, shift, group[4];

  __device__ Codes(const Source& s, int channel) : source(s) {
    const int bytes = s.row_bytes;
    byte = channel % bytes;
    shift = channel / bytes * s.bits;
#pragma unroll
    for (int e = 0; e < 4; ++e) group[e] = s.static_scale ? 0 : (channel + e) / s.group;
  }

  __device__ uint32_t word(const unsigned char* row) const {
    if (source.copy_bytes) return load_chunk<4>(row + byte).word[0];
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) codes |= static_cast<uint32_t>(row[byte + e]) << 8 * e;
    return codes;
  }

  __device__ void operator()(const unsigned char* row, const unsigned char* scale, C (&x)[4]) const {
    const uint32_t codes = word(row);
    if (source.scheme == kKVFp8E4M3 || source.scheme == kKVFp8E5M2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t code = codes >> 8 * e & 0xff;
        // as float16 the exponent of e4m3 is biased by 15, not 7
        const uint32_t half = source.scheme == kKVFp8E5M2 ? code << 8 : (code & 0x80) << 8 | (code & 0x7f) << 7;
        float value = widen(Half{static_cast<uint16_t>(half)});
        if (source.scheme == kKVFp8E4M3) value = (code & 0x7f) == 0x7f ? kInf<float> - kInf<float> : value * 256.0f;
        x[e] = static_cast<C>(value) * static_cast<C>(reinterpret_cast<const float*>(scale)[group[e]]);
      }
      return;
    }
    const uint32_t ones = (1u << source.bits) - 1, alone = codes >> shift & ones * 0x01010101u;
    const Half* grid = reinterpret_cast<const Half*>(scale);
    C step = 0, offset = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e == 0 || group[e] != group[e - 1]) {
        step = static_cast<C>(widen(grid[2 * group[e]]));
        offset = static_cast<C>(widen(grid[2 * group[e] + 1]));
      }
      x[e] = fma_(static_cast<C>(byte_of(alone, e)), step, offset);  // the product is exact
    }
  }
};

// Keys of kivi that could not be copied: four channels, each with a run of its own.
template <class C>
__device__ inline void read_by_channel(const Source& source, const unsigned char* page, const unsigned char* scale,
                                       int offset, int channel, C (&x)[4]) {
  const int bytes = source.group * source.bits / 8, in_group = offset % source.group, g = offset / source.group;
  const unsigned char* run = page + channel * source.token_stride + g * bytes;
  const Half* step = reinterpret_cast<const Half*>(scale) + 2 * g * source.head_dim + channel;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    x[e] = decode_grid<C>(split_code(run + e * source.token_stride, in_group, source.group, source.bits),
                          static_cast<C>(widen(step[e])), static_cast<C>(widen(step[source.head_dim + e])));
}

template <class T, class C>
__device__ inline void write_four(T* to, const C (&x)[4]) {
  if constexpr (kTensorCores<T>) {
    store_chunk<8>(to, {{pack<T>(x[0], x[1]), pack<T>(x[2], x[3])}});
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = x[e];
  }
}

// body(i, x) gives four channels of key first + i, a thread always the same channels; keys that nobody may see are 0.
template <class T, class Body>
__device__ inline void write_tile(const Source& source, const Part& part, int first, T* tile, const Body& body) {
  const int per_key = source.head_dim / 4, keys = kBlockThreads / per_key,
            mine = static_cast<int>(threadIdx.x) / per_key;
  const int channel = static_cast<int>(threadIdx.x) % per_key * 4, stride = source.head_dim + Tile<T>::kPad;
  if (mine >= keys) return;
  for (int i = mine; i < Tile<T>::kKeys; i += keys) {
    Compute<T> x[4] = {};
    if (first + i >= part.begin && first + i < part.end) body(i, x);
    write_four(tile + i * stride + channel, x);
  }
}

// Keys of kivi out of a stage: a thread has a word of one channel, which holds codes of several keys.
template <class T>
__device__ inline void write_groups(const Source& source, const Part& part, int first, const unsigned char* stage,
                                    T* tile) {
  using C = Compute<T>;
  const int run_bytes = source.group * source.bits / 8, words = Tile<T>::kKeys / source.group * run_bytes / 4;
  const int stride = source.head_dim + Tile<T>::kPad;
  for (int i = static_cast<int>(threadIdx.x); i < words * source.head_dim; i += kBlockThreads) {
    const int channel = i % source.head_dim, byte = i / source.head_dim * 4, g = byte / run_bytes;
    const unsigned char* run = stage + source.at + (g * source.head_dim + channel) * run_bytes;
    const Half* grid = reinterpret_cast<const Half*>(stage + source.scale_at) + 2 * g * source.head_dim + channel;
    const uint32_t word = load_chunk<4>(run + byte % run_bytes).word[0];
    const C step = static_cast<C>(widen(grid[0])), offset = static_cast<C>(widen(grid[source.head_dim]));
    const uint32_t ones = ((1u << source.bits) - 1) * 0x01010101u;
    for (int place = 0; place < 8 / source.bits; ++place) {
      const uint32_t alone = word >> place * source.bits & ones;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int own = g * source.group + place * run_bytes + byte % run_bytes + e;
        const bool wanted = first + own >= part.begin && first + own < part.end;
        tile[own * stride + channel] =
            round_to<T>(wanted ? fma_(static_cast<C>(byte_of(alone, e)), step, offset) : C(0));
      }
    }
  }
}

// The tile at key `first` as numbers of type T.
template <class T>
__device__ void decode(const Source& source, const Part& part, const KeySlot* slots, int first,
                       const unsigned char* stage, T* tile) {
  using C = Compute<T>;
  const bool staged = source.copy_bytes != 0;
  if (source.by_channel && staged) return write_groups<T>(source, part, first, stage, tile);
  const int channel = static_cast<int>(threadIdx.x) % (source.head_dim / 4) * 4;
  const unsigned char* data = source.data + part.head * source.head_stride;
  const unsigned char* scales = source.scale + part.head * source.scale_head_stride;
  auto from = [&](const auto& read) {
    write_tile<T>(source, part, first, tile, [&](int i, C(&x)[4]) {
      const KeySlot slot = slots[(first + i) % kSplit];
      const unsigned char* row = staged ? stage + source.at + i * source.stride
                                        : data + slot.page * source.page_stride + slot.offset * source.token_stride;
      const unsigned char* scale = staged && !source.static_scale ? stage + source.scale_at + i * source.scale_bytes
                                                                  : scales + slot.page * source.scale_page_stride +
                                                                        slot.offset * source.scale_token_stride;
      read(row, scale, x);
    });
  };
  if (source.scheme == kKVPlain) return from(Numbers<C>{source, channel});
  if (!source.by_channel) return from(Codes<C>(source, channel));
  write_tile<T>(source, part, first, tile, [&](int i, C(&x)[4]) {
    const KeySlot slot = slots[(first + i) % kSplit];
    read_by_channel(source, data + slot.page * source.page_stride, scales + slot.page * source.scale_page_stride,
                    slot.offset, channel, x);
  });
}

}  // namespace fastdecode::FD_ISA
