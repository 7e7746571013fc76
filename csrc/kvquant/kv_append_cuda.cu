#include "kvquant/kv_append.h"

#include "kvquant/row_codec.cuh"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kMostWarps = 16;
constexpr int64_t kSharedBytes = 48 * 1024;

// Shared memory of a warp: a row, and its codes.
template <class C>
constexpr int64_t row_bytes(int64_t head_dim) {
  return (head_dim * static_cast<int64_t>(sizeof(C) + 1) + 15) / 16 * 16;
}

template <class T, class C>
__device__ void load_warp_row(const T* x, const C* cosine, int head_dim, bool interleaved, C* row) {
  if (!cosine) {
    for (int i = lane_id(); i < head_dim; i += kWarp) row[i] = load(x[i]);
    return;
  }
  const int half = head_dim / 2;
  for (int i = lane_id(); i < half; i += kWarp) {
    const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
    const Pair<T> turned = rotate_pair<T, C>(load(x[first]), load(x[second]), cosine[i], cosine[half + i]);
    row[first] = load(turned.first);
    row[second] = load(turned.second);
  }
}

template <class T, class C>
__device__ void rotate_in_place(T* x, const C* cosine, int head_dim, bool interleaved) {
  const int half = head_dim / 2;
  for (int i = lane_id(); i < half; i += kWarp) {
    const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
    const Pair<T> turned = rotate_pair<T, C>(load(x[first]), load(x[second]), cosine[i], cosine[half + i]);
    x[first] = turned.first;
    x[second] = turned.second;
  }
}

template <class C>
__device__ int32_t store_plain(void* data, DType dtype, int64_t at, const C* row, int head_dim) {
  switch (dtype) {
    case DType::kFloat64: return warp_store(row, head_dim, static_cast<double*>(data) + at);
    case DType::kFloat32: return warp_store(row, head_dim, static_cast<float*>(data) + at);
    case DType::kFloat16: return warp_store(row, head_dim, static_cast<Half*>(data) + at);
    default: return warp_store(row, head_dim, static_cast<BFloat16*>(data) + at);
  }
}

template <class C>
__device__ int32_t encode(const KVPages& p, const KVStore& s, int64_t slot, int64_t head, const C* row,
                          uint8_t* codes) {
  const bool ring = is_kivi(p.scheme);
  const int64_t size = ring ? p.tail_size : p.page_size, page = slot / size, offset = slot % size;
  const int head_dim = static_cast<int>(p.head_dim), group = static_cast<int>(p.group);
  if (ring) return store_plain(s.tail, p.tail_dtype, tail_at(s, page, offset, head), row, head_dim);
  const int64_t at = token_at(s, page, offset, head), scale = scale_at(s, page, offset, head);
  if (p.scheme == kKVPlain) return store_plain(s.data, p.dtype, at, row, head_dim);
  uint8_t* data = static_cast<uint8_t*>(s.data) + at;
  if (p.scheme == kKVInt8 || p.scheme == kKVInt4) {
    return warp_encode_ints(row, head_dim, group, code_bits(p.scheme), codes, data,
                            static_cast<Half*>(s.scale) + scale);
  }
  float* scales = static_cast<float*>(s.scale) + scale;
  if (p.scheme == kKVFp8E4M3) return warp_encode_fp8<E4M3>(row, head_dim, group, data, scales, p.static_scale);
  return warp_encode_fp8<E5M2>(row, head_dim, group, data, scales, p.static_scale);
}

// A block per token, a warp per head of k, v and q.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kMostWarps* kWarp) append_kernel(KVAppendArgs a) {
  FD_DYNAMIC_SHARED(unsigned char, shared);
  const KVPages& p = a.pages;
  const int64_t t = blockIdx.x, slot = a.slots[t];
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t num_slots = is_kivi(p.scheme) ? p.tail_batch * p.tail_size : p.num_pages * p.page_size;
  bool good = slot >= -1 && slot < num_slots;
  const C* cosine = nullptr;
  if (a.rope) {
    const int64_t position =
        a.positions_are_32 ? static_cast<const int32_t*>(a.positions)[t] : static_cast<const int64_t*>(a.positions)[t];
    good = good && position >= 0 && position < a.num_positions;
    cosine = static_cast<const C*>(a.rope) + position * (head_dim / 2 * 2);
  }
  if (!good) {
    if (threadIdx.x == 0) a.status[t] = kStatusBadPage;
    return;
  }
  C* row = reinterpret_cast<C*>(shared + warp_id() * row_bytes<C>(head_dim));
  uint8_t* codes = reinterpret_cast<uint8_t*>(row + head_dim);
  const int64_t stored = slot < 0 ? 0 : 2 * p.num_heads, rows = stored + (a.q ? a.num_q_heads : 0);
  int32_t status = 0;
  for (int64_t r = warp_id(); r < rows; r += blockDim.x / kWarp) {
    if (r >= stored) {
      T* q = static_cast<T*>(a.q) + t * a.q_token_stride + (r - stored) * a.q_head_stride;
      rotate_in_place(q, cosine, head_dim, a.interleaved);
      continue;
    }
    const bool is_key = r < p.num_heads;
    const int64_t head = is_key ? r : r - p.num_heads;
    const T* x = is_key ? static_cast<const T*>(a.k) + t * a.k_token_stride + head * a.k_head_stride
                        : static_cast<const T*>(a.v) + t * a.v_token_stride + head * a.v_head_stride;
    load_warp_row(x, is_key ? cosine : nullptr, head_dim, a.interleaved, row);
    __syncwarp();  // the row is there
    status |= encode(p, is_key ? p.k : p.v, slot, head, row, codes);
    __syncwarp();  // row and codes are read, the next may come
  }
  const bool nan = __syncthreads_or(status & kStatusNaN), saturated = __syncthreads_or(status & kStatusSaturated);
  if (threadIdx.x == 0) a.status[t] = (nan ? kStatusNaN : 0) | (saturated ? kStatusSaturated : 0);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::kv_append(const KVAppendArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.num_tokens == 0) return;
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t each = row_bytes<Compute<T>>(a.pages.head_dim);
    const int64_t rows = 2 * a.pages.num_heads + (a.q ? a.num_q_heads : 0), fit = kSharedBytes / each;
    int64_t warps = rows < kMostWarps ? rows : kMostWarps;
    warps = warps < fit ? warps : fit;
    warps = warps > 0 ? warps : 1;
    FD_LAUNCH((append_kernel<T>), grid_of(a.num_tokens), static_cast<unsigned>(warps * kWarp),
              static_cast<size_t>(warps * each), ex.stream, a);
  });
}
