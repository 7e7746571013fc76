#include "core/cpu/kv_rows.h"
#include "core/rows.h"
#include "kvquant/cached_value.h"
#include "kvquant/kv_report.h"
#include "kvquant/requests.h"

namespace fastdecode::FD_ISA {
namespace {

// The sums of one tile, a partial one for each lane.
struct TileErrors {
  double squares[kReportLanes] = {}, values[kReportLanes] = {}, largest = 0;

  FD_INLINE void add(int64_t d, double x, double error) {
    squares[d % kReportLanes] += error * error;
    values[d % kReportLanes] += x * x;
    const double size = error < 0 ? -error : error;
    largest = larger_or_nan(largest, size);
  }
};

// Neighbours, then neighbours of those.
double join(double (&lanes)[kReportLanes]) {
  for (int width = kReportLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] = lanes[2 * l] + lanes[2 * l + 1];
  return lanes[0];
}

template <class T>
FD_ROW void compare(const KVReportArgs& a, bool is_key, int64_t b, int64_t head, double* errors) {
  const KVPages& p = a.pages;
  const T* x = static_cast<const T*>(is_key ? a.k : a.v) + b * (is_key ? a.k_batch_stride : a.v_batch_stride) +
               head * (is_key ? a.k_head_stride : a.v_head_stride);
  const int64_t stride = is_key ? a.k_token_stride : a.v_token_stride;
  const int64_t kv_len = a.kv_lens[b], coded = kv_len - (a.tail_lens ? a.tail_lens[b] : 0);
  const int32_t* table = a.page_table + b * a.page_table_stride;
  double row[kMaxHeadDim], squares = 0, values = 0, largest = 0;
  for (int64_t first = 0; first < kv_len; first += kReportTile) {
    TileErrors tile;
    for (int64_t t = first; t < kv_len && t < first + kReportTile; ++t) {
      if (t < coded) {
        read_page_row(p, is_key, table[t / p.page_size], t % p.page_size, head, row);
      } else {
        read_ring_row(p, is_key, b, t, head, row);
      }
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const auto value = static_cast<double>(load(x[t * stride + d]));
        tile.add(d, value, value - row[d]);
      }
    }
    squares += join(tile.squares);
    values += join(tile.values);
    largest = larger_or_nan(largest, tile.largest);
  }
  errors[0] = store<double, false>(squares);
  errors[1] = store<double, false>(values);
  errors[2] = store<double, false>(largest);
}

}  // namespace

void kv_report(const KVReportArgs& a, const Exec& ex) {
  const KVPages& p = a.pages;
  for (int64_t b = 0; b < a.batch; ++b) {
    a.status[b] = read_status(p, a.page_table + b * a.page_table_stride, a.max_pages, a.kv_lens[b],
                              a.tail_lens ? a.tail_lens[b] : 0, a.length);
  }
  dispatch_logits(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t rows = a.batch * p.num_heads;
    for_each_row(ex, 2 * rows, a.length * p.head_dim, nullptr, 0, [&](int64_t r, void*) {
      const int64_t b = r % rows / p.num_heads;
      double* errors = a.errors + 3 * r;
      if (a.status[b]) {
        for (int i = 0; i < 3; ++i) errors[i] = std::numeric_limits<double>::quiet_NaN();
      } else {
        compare<T>(a, r < rows, b, r % p.num_heads, errors);
      }
    });
  });
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(kv_report, KVReportArgs)
