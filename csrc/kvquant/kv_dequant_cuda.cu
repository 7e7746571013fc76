#include "kvquant/kv_dequant.h"

#include "core/cuda/device.cuh"
#include "kvquant/cached_value.h"
#include "kvquant/requests.h"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kDequantThreads = 256;

FD_INLINE FD_HD int64_t tail_of(const KVDequantArgs& a, int64_t b) { return a.tail_lens ? a.tail_lens[b] : 0; }

__global__ void __launch_bounds__(kDequantThreads) dequant_status_kernel(KVDequantArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kDequantThreads + threadIdx.x;
  if (b >= a.batch) return;
  a.status[b] =
      read_status(a.pages, a.page_table + b * a.page_table_stride, a.max_pages, a.kv_lens[b], tail_of(a, b), a.length);
}

// A thread per number, in the order of the outputs.
template <class T>
__global__ void __launch_bounds__(kDequantThreads) dequant_kernel(KVDequantArgs a) {
  const KVPages& p = a.pages;
  const int64_t count = a.batch * a.length * p.num_heads * p.head_dim, stride = int64_t{gridDim.x} * kDequantThreads;
  for (int64_t i = int64_t{blockIdx.x} * kDequantThreads + threadIdx.x; i < count; i += stride) {
    const int64_t d = i % p.head_dim, head = i / p.head_dim % p.num_heads;
    const int64_t t = i / p.head_dim / p.num_heads % a.length, b = i / p.head_dim / p.num_heads / a.length;
    const int64_t kv_len = a.status[b] ? 0 : a.kv_lens[b], coded = kv_len - tail_of(a, b);
    double k = 0, v = 0;
    if (t < kv_len && t < coded) {
      const int64_t page = a.page_table[b * a.page_table_stride + t / p.page_size], offset = t % p.page_size;
      k = page_value(p, true, page, offset, head, d);
      v = page_value(p, false, page, offset, head, d);
    } else if (t < kv_len) {
      k = ring_value(p, true, b, t, head, d);
      v = ring_value(p, false, b, t, head, d);
    }
    static_cast<T*>(a.k)[i] = store<T, true>(k);
    static_cast<T*>(a.v)[i] = store<T, true>(v);
  }
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::kv_dequant(const KVDequantArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.batch == 0) return;
  FD_LAUNCH(dequant_status_kernel, grid_of((a.batch + kDequantThreads - 1) / kDequantThreads), kDequantThreads, 0,
            ex.stream, a);
  const int64_t count = a.batch * a.length * a.pages.num_heads * a.pages.head_dim;
  if (count == 0) return;
  const unsigned blocks = capped_grid((count + kDequantThreads - 1) / kDequantThreads);
  dispatch_logits(a.dtype, [&](auto tag) {
    FD_LAUNCH((dequant_kernel<typename decltype(tag)::type>), blocks, kDequantThreads, 0, ex.stream, a);
  });
}
