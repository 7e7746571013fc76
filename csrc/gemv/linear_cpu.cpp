#include "gemv/linear.h"

#include <algorithm>
#include <cstring>

#include "core/dtype.h"

namespace fastdecode::FD_ISA {
namespace {

// 64 bytes of C, read from any address of a C.
template <class C>
struct Wide;
template <>
struct Wide<float> {
  using type [[gnu::vector_size(64), gnu::aligned(4), gnu::may_alias]] = float;
};
template <>
struct Wide<double> {
  using type [[gnu::vector_size(64), gnu::aligned(8), gnu::may_alias]] = double;
};

// Fewer weights than this are read sooner than a second thread wakes.
constexpr int64_t kWeightsPerThread = 65536;

// Sums of `kRows` rows of x with one panel: kRows * 64 accumulators, in registers where there are enough of them.
template <class C, int kRows>
void panel(const LinearArgs& a, int64_t first_row, int64_t index) {
  using Vector = typename Wide<C>::type;
  constexpr int kVectors = kPanel * sizeof(C) / 64;
  const C* x = static_cast<const C*>(a.x) + first_row * a.x_stride;
  const C* w = static_cast<const C*>(a.weight) + index * a.K * kPanel;
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < a.K; ++k, w += kPanel) {
    const Vector* column = reinterpret_cast<const Vector*>(w);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const C value = x[m * a.x_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[m][v] += column[v] * value;
    }
  }
  const int64_t column = index * kPanel, width = std::min(kPanel, a.N - column);
  for (int m = 0; m < kRows; ++m) {
    const int64_t row = first_row + m;
    C lanes[kPanel];
    std::memcpy(lanes, sum[m], sizeof(lanes));
    const C* bias = a.bias ? static_cast<const C*>(a.bias) + column : nullptr;
    const C* residual = a.residual ? static_cast<const C*>(a.residual) + row * a.residual_stride + column : nullptr;
    C* y = static_cast<C*>(a.y) + row * a.N + column;
    for (int64_t n = 0; n < width; ++n) {
      C value = lanes[n];
      if (bias) value += bias[n];
      if (residual) value += residual[n];
      y[n] = value;
    }
  }
}

template <class C>
void one_panel(const LinearArgs& a, int64_t index) {
  int64_t row = 0;
  for (; row + 6 <= a.M; row += 6) panel<C, 6>(a, row, index);
  switch (a.M - row) {
    case 5: return panel<C, 5>(a, row, index);
    case 4: return panel<C, 4>(a, row, index);
    case 3: return panel<C, 3>(a, row, index);
    case 2: return panel<C, 2>(a, row, index);
    case 1: return panel<C, 1>(a, row, index);
  }
}

template <class C>
void run(const LinearArgs& a, const Exec& ex) {
  const int64_t panels = (a.N + kPanel - 1) / kPanel;
  const int64_t worth = a.N * a.K / kWeightsPerThread;
  const int64_t slots = std::max<int64_t>(1, std::min({panels, worth, int64_t{ex.num_threads}}));
  auto share = [&](int64_t slot) {
    for (int64_t i = panels * slot / slots; i < panels * (slot + 1) / slots; ++i) one_panel<C>(a, i);
  };
  if (slots == 1) return share(0);
  auto call = [](void* context, int64_t slot) { (*static_cast<decltype(share)*>(context))(slot); };
  ex.parallel_for(slots, call, &share);
}

}  // namespace

void linear(const LinearArgs& a, const Exec& ex) {
  if (a.dtype == DType::kFloat64) return run<double>(a, ex);
  run<float>(a, ex);
}

}  // namespace fastdecode::FD_ISA

FD_CPU_OP(linear, LinearArgs)
