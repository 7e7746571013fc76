#include <algorithm>
#include <type_traits>

#include "core/cuda/device.cuh"
#include "core/cuda/vector.cuh"
#include "core/dtype.h"
#include "sample/apply_token_bitmask.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of 16 bytes, per thread

template <class T>
using Bits = std::remove_const_t<decltype(kMinusInfinity<T>)>;

// Part `part` of a row under one mask. Logits are written and never read: a vector whose ids are all forbidden by one
// store, others id by id. So several masks of a row may be at work on it at once.
template <class T>
__device__ void forbid(Bits<T>* x, int vocab_size, const int32_t* mask, int words, int part, uint4 all) {
  constexpr unsigned kAll = (1u << kPerVector<T>)-1;
  auto word = [&](int w) { return w >= 0 && w < words ? static_cast<uint32_t>(mask[w]) : 0u; };
  // Vectors lie where memory is aligned: the first may begin before the row, the last end after it.
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int index = (part * kVectors + i) * kThreads + static_cast<int>(threadIdx.x);
    const int first = index * kPerVector<T> - lead;
    if (first >= vocab_size) break;
    const int shift = first & 31;
    const uint64_t low = word(first >> 5), high = shift + kPerVector<T> > 32 ? word((first >> 5) + 1) : 0;
    unsigned forbidden = ~static_cast<unsigned>((high << 32 | low) >> shift) & kAll;
    if (first < 0) forbidden &= kAll << -first;
    if (first + kPerVector<T> > vocab_size) forbidden &= kAll >> (first + kPerVector<T> - vocab_size);
    if (forbidden == kAll) {
      store_vector(x + first, all);
    } else {
#pragma unroll
      for (int e = 0; e < kPerVector<T>; ++e)
        if ((forbidden >> e & 1) != 0) x[first + e] = kMinusInfinity<T>;
    }
  }
}

// Block i has part i % parts of mask i / parts.
template <class T>
__global__ void __launch_bounds__(kThreads)
    apply_token_bitmask_kernel(ApplyTokenBitmaskArgs a, int64_t masks, int parts, uint4 all) {
  for (int64_t i = blockIdx.x; i < masks * parts; i += gridDim.x) {
    const int64_t m = i / parts;
    const int part = static_cast<int>(i - m * parts);
    const int64_t b = a.indexed ? int64_t{a.indices[m]} : m / a.rows, row = a.indexed ? 0 : m - b * a.rows;
    if (b < 0 || b >= a.batch || (a.active && !a.active[b])) continue;
    Bits<T>* x = static_cast<Bits<T>*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    const int32_t* mask = a.bitmask + (a.indexed ? m : b) * a.mask_stride + row * a.mask_row_stride;
    forbid<T>(x, static_cast<int>(a.vocab_size), mask, static_cast<int>(a.words), part, all);
  }
}

template <class T>
void run(const ApplyTokenBitmaskArgs& a, const Exec& ex) {
  static_assert(sizeof(Bits<T>) == sizeof(T));
  const int64_t masks = a.indexed ? a.num_indices : a.batch * a.rows;
  if (masks == 0 || a.batch == 0) return;
  // A row may begin and end inside a vector.
  const int64_t most_vectors = (a.vocab_size + 2 * (kPerVector<T> - 1)) / kPerVector<T>;
  const auto parts = static_cast<int>((most_vectors + kVectors * kThreads - 1) / (kVectors * kThreads));
  struct {
    Bits<T> e[kPerVector<T>];
  } all;
  std::fill_n(all.e, kPerVector<T>, kMinusInfinity<T>);
  const unsigned blocks = capped_grid(masks * parts);
  FD_LAUNCH((apply_token_bitmask_kernel<T>), blocks, kThreads, 0, ex.stream, a, masks, parts, bit_cast<uint4>(all));
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::apply_token_bitmask(const ApplyTokenBitmaskArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}
