#include "core/cuda/reduce.cuh"
#include "kvquant/cached_value.h"
#include "kvquant/kv_report.h"
#include "kvquant/requests.h"

namespace fastdecode::FD_ISA {
namespace {

static_assert(kReportLanes == kWarp);

struct Errors {
  double squares, values, largest;
};
struct ReportShared {
  Errors of_warp[2][kWarps];  // of this round and of the one before, which the first thread may still read
};

__global__ void __launch_bounds__(kThreads) report_status_kernel(KVReportArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b >= a.batch) return;
  a.status[b] = read_status(a.pages, a.page_table + b * a.page_table_stride, a.max_pages, a.kv_lens[b],
                            a.tail_lens ? a.tail_lens[b] : 0, a.length);
}

struct LargerOrNaN {
  __device__ double operator()(double a, double b) const { return larger_or_nan(a, b); }
};

template <class T>
__device__ Errors warp_tile(const KVReportArgs& a, bool is_key, int64_t b, int64_t head, int64_t first) {
  const KVPages& p = a.pages;
  const T* x = static_cast<const T*>(is_key ? a.k : a.v) + b * (is_key ? a.k_batch_stride : a.v_batch_stride) +
               head * (is_key ? a.k_head_stride : a.v_head_stride);
  const int64_t stride = is_key ? a.k_token_stride : a.v_token_stride;
  const int64_t kv_len = a.kv_lens[b], coded = kv_len - (a.tail_lens ? a.tail_lens[b] : 0);
  const int32_t* table = a.page_table + b * a.page_table_stride;
  Errors sum{};
  for (int64_t t = first; t < kv_len && t < first + kReportTile; ++t) {
    for (int64_t d = lane_id(); d < p.head_dim; d += kWarp) {
      const double cached = t < coded ? page_value(p, is_key, table[t / p.page_size], t % p.page_size, head, d)
                                      : ring_value(p, is_key, b, t, head, d);
      const double value = static_cast<double>(load(x[t * stride + d])), error = value - cached;
      sum.squares += error * error;
      sum.values += value * value;
      sum.largest = larger_or_nan(sum.largest, error < 0 ? -error : error);
    }
  }
  return {warp_reduce(sum.squares, Plus{}), warp_reduce(sum.values, Plus{}), warp_reduce(sum.largest, LargerOrNaN{})};
}

// A block per head of keys or of values of a request; a warp per tile, whose sums the first thread adds in order. One
// block is all that a multiprocessor must hold: with no number, ptxas spills registers.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) report_kernel(KVReportArgs a) {
  FD_SHARED(ReportShared, shared);
  const int64_t r = blockIdx.x, rows = a.batch * a.pages.num_heads;
  const int64_t b = r % rows / a.pages.num_heads, head = r % a.pages.num_heads;
  Errors sum{};
  if (a.status[b]) {
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    sum = {kNone, kNone, kNone};
  } else {
    int round = 0;
    for (int64_t first = 0; first < a.kv_lens[b]; first += kWarps * kReportTile, round ^= 1) {
      const Errors tile = warp_tile<T>(a, r < rows, b, head, first + warp_id() * kReportTile);
      Errors(&of_warp)[kWarps] = shared.of_warp[round];
      if (lane_id() == 0) of_warp[warp_id()] = tile;
      __syncthreads();  // all tiles are there, and those of the round before are added
      for (int w = 0; threadIdx.x == 0 && w < kWarps; ++w) {
        sum.squares += of_warp[w].squares;
        sum.values += of_warp[w].values;
        sum.largest = larger_or_nan(sum.largest, of_warp[w].largest);
      }
    }
  }
  if (threadIdx.x != 0) return;
  a.errors[3 * r] = store<double, false>(sum.squares);
  a.errors[3 * r + 1] = store<double, false>(sum.values);
  a.errors[3 * r + 2] = store<double, false>(sum.largest);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

void fastdecode::cuda::kv_report(const KVReportArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.batch == 0) return;
  FD_LAUNCH(report_status_kernel, grid_of((a.batch + kThreads - 1) / kThreads), kThreads, 0, ex.stream, a);
  if (a.pages.num_heads == 0) return;
  dispatch_logits(a.dtype, [&](auto tag) {
    FD_LAUNCH((report_kernel<typename decltype(tag)::type>), grid_of(2 * a.batch * a.pages.num_heads), kThreads, 0,
              ex.stream, a);
  });
}
