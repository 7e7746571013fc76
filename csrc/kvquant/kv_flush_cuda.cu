#include "kvquant/kv_flush.h"

#include "kvquant/requests.h"
#include "kvquant/row_codec.cuh"

namespace fastdecode::FD_ISA {
namespace {

constexpr int kFlushWarps = 4, kFlushThreads = kFlushWarps * kWarp;

__global__ void __launch_bounds__(kFlushThreads) flush_status_kernel(KVFlushArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kFlushThreads + threadIdx.x;
  if (b < a.batch) a.status[b] = flush_status(a, b);
}

// Keys of a group of tokens: a thread per channel.
template <class T, class C>
__device__ int32_t encode_keys(const KVPages& p, int64_t b, int64_t head, int64_t first, int64_t page) {
  const int bits = code_bits(p.scheme), head_dim = static_cast<int>(p.head_dim), group = static_cast<int>(p.group);
  const int64_t at = first % p.page_size;
  const int bytes = group * bits / 8;
  auto token = [&](int64_t i) {
    return static_cast<const T*>(p.k.tail) + tail_at(p.k, b, (first + i) % p.tail_size, head);
  };
  int32_t status = 0;
  for (int d = threadIdx.x; d < head_dim; d += kFlushThreads) {
    Range<C> r;
    for (int i = 0; i < group; ++i) r.add(load(token(i)[d]));
    const bool any = r.low <= r.high;
    const C low = coded_limit(r.low, any), high = coded_limit(r.high, any);
    const Grid grid = make_grid(low, high, (1 << bits) - 1);
    Half* scale = static_cast<Half*>(p.k.scale) + page * p.k.scale_page_stride + head * p.k.scale_head_stride +
                  at / group * 2 * head_dim + d;
    scale[0] = grid.step;
    scale[head_dim] = grid.offset;
    const Coder<C> coder(grid, low, high);
    uint8_t* run = static_cast<uint8_t*>(p.k.data) + page * p.k.page_stride + head * p.k.head_stride +
                   d * (p.page_size * bits / 8) + at * bits / 8;
    for (int j = 0; j < bytes; ++j) {
      uint32_t byte = 0;
      for (int part = 0; part < 8 / bits; ++part)
        byte |= coder.code(static_cast<C>(load(token(j + part * bytes)[d]))) << (bits * part);
      run[j] = static_cast<uint8_t>(byte);
    }
    status |= r.status(low, high);
  }
  return status;
}

// A block per request, head and group of tokens, with room for as many groups as a ring has. One block is all that a
// multiprocessor must hold: with no number, ptxas spills a register of the doubles.
template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kFlushThreads, 1) flush_kernel(KVFlushArgs a) {
  FD_DYNAMIC_SHARED(unsigned char, shared);
  const KVPages& p = a.pages;
  const int64_t groups = p.tail_size / p.group, r = blockIdx.x;
  const int64_t b = r / groups / p.num_heads, head = r / groups % p.num_heads;
  const int64_t first = a.begin[b] + r % groups * p.group;
  // Other blocks may add bits meanwhile, none of which is an error of lengths or pages.
  if (first >= a.end[b] || (*static_cast<const volatile int32_t*>(a.status + b) & (kStatusBadLength | kStatusBadPage)))
    return;
  const int64_t page = a.page_table[b * a.page_table_stride + first / p.page_size];
  int32_t status = encode_keys<T, C>(p, b, head, first, page);
  const int head_dim = static_cast<int>(p.head_dim);
  C* row = reinterpret_cast<C*>(shared) + warp_id() * head_dim;
  uint8_t* codes = shared + kFlushWarps * head_dim * sizeof(C) + warp_id() * head_dim;
  for (int64_t i = warp_id(); i < p.group; i += kFlushWarps) {
    const T* x = static_cast<const T*>(p.v.tail) + tail_at(p.v, b, (first + i) % p.tail_size, head);
    for (int d = lane_id(); d < head_dim; d += kWarp) row[d] = load(x[d]);
    __syncwarp();  // the row is there, and the codes of the one before are read; warp_encode_ints waits after it read
                   // it
    const int64_t offset = (first + i) % p.page_size;
    status |= warp_encode_ints(row, head_dim, static_cast<int>(p.group), code_bits(p.scheme), codes,
                               static_cast<uint8_t*>(p.v.data) + token_at(p.v, page, offset, head),
                               static_cast<Half*>(p.v.scale) + scale_at(p.v, page, offset, head));
  }
  if (status) atomicOr(a.status + b, status);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::kv_flush(const KVFlushArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  const KVPages& p = a.pages;
  if (a.batch == 0) return;
  FD_LAUNCH(flush_status_kernel, grid_of((a.batch + kFlushThreads - 1) / kFlushThreads), kFlushThreads, 0, ex.stream,
            a);
  const int64_t blocks = a.batch * p.num_heads * (p.tail_size / p.group);
  if (blocks == 0) return;
  dispatch_logits(p.tail_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const size_t bytes = static_cast<size_t>(kFlushWarps * p.head_dim) * (sizeof(Compute<T>) + 1);
    FD_LAUNCH((flush_kernel<T>), grid_of(blocks), kFlushThreads, bytes, ex.stream, a);
  });
}
