// The pieces of csrc/core/cuda that kernels are made of, each against a model on the host.
//   core SEED
// nvcc compiles it too: on a GPU the same models hold.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "backend.h"
#include "check.h"
#include "core/cuda/draw.cuh"
#include "core/cuda/law.cuh"
#include "core/cuda/mma.cuh"
#include "core/cuda/sort.cuh"

using namespace fastdecode::FD_ISA;

namespace {

std::mt19937_64 generator;
int below(int n) { return static_cast<int>(generator() % static_cast<uint64_t>(n)); }

// A number with few bits, exact in every type; ties are common.
template <class E>
E some() {
  const float value = static_cast<float>(below(65) - 32) / 8;
  if constexpr (sizeof(E) == 2) {
    uint16_t bits = static_cast<uint16_t>(bit_cast<uint32_t>(value) >> 16);  // as bfloat16
    if constexpr (std::is_same_v<E, Half>) bits = static_cast<uint16_t>(0x3c00 + below(512));
    return E{bits};
  } else {
    return static_cast<E>(value);
  }
}

// ---- vector.cuh ----

template <class E, class C = Compute<E>>
__global__ void copy(const E* x, int n, C* out, int width) {
  constexpr int kPer = kPerVector<E>;
  C values[kPer];
  for (int v = static_cast<int>(threadIdx.x) * kPer; v < width; v += kThreads * kPer) {
    read(x, v, n, C(-7), values);
    write(out, v, width, values);
  }
}

// Rows that begin at any element, of any length: read whole, nothing behind them, written whole, nothing behind.
template <class E, class C = Compute<E>>
void test_vectors() {
  for (const int n : {0, 1, 3, 8, 63, 64, 65, 1000})
    for (int offset = 0; offset < kPerVector<E>; ++offset) {
      Buffer<E> x(offset + n);
      for (E& value : x) value = some<E>();
      const int width = n + below(5);
      Buffer<C> out(offset + width + 9, C(99));
      LAUNCH((copy<E>), 1, kThreads, 0, nullptr, x.data() + offset, n, out.data() + offset, width);
      for (int i = 0; i < width + 9; ++i) {
        const C expected = i >= width ? C(99) : i >= n ? C(-7) : static_cast<C>(load(x[offset + i]));
        CHECK_EQUAL(out[offset + i], expected, "element " + std::to_string(i) + " of " + std::to_string(n));
      }
    }
}

// ---- reduce.cuh ----

struct Reduced {
  int64_t warp_sum, sum, max;
  float least;
  uint64_t before, total;
  int64_t given;
};

__global__ void reduce(const int64_t* x, int giver, Reduced* out) {
  FD_SHARED(BlockSlots, slots);
  const int64_t mine = x[threadIdx.x];
  Reduced r{};
  r.warp_sum = warp_reduce(mine, Plus{});
  r.sum = block_reduce(slots, mine, Plus{});
  r.max = block_reduce(slots, mine, Larger{});
  r.least = block_reduce(slots, static_cast<float>(mine), Smaller{});
  const Scanned scanned = block_scan(slots, static_cast<uint64_t>(mine));
  r.before = scanned.before;
  r.total = scanned.total;
  r.given = block_broadcast(slots, static_cast<int>(threadIdx.x) == giver, mine);
  out[threadIdx.x] = r;
}

void test_reductions() {
  Buffer<int64_t> x(kThreads);
  Buffer<Reduced> out(kThreads);
  for (int64_t& value : x) value = below(1 << 20);
  const int giver = below(kThreads);
  LAUNCH(reduce, 1, kThreads, 0, nullptr, x.data(), giver, out.data());
  uint64_t before = 0;
  for (int t = 0; t < kThreads; ++t) {
    const auto* warp = x.data() + t / kWarp * kWarp;
    CHECK_EQUAL(out[t].warp_sum, std::accumulate(warp, warp + kWarp, int64_t{0}), "warp_reduce");
    CHECK_EQUAL(out[t].sum, std::accumulate(x.begin(), x.end(), int64_t{0}), "block_reduce, sum");
    CHECK_EQUAL(out[t].max, *std::max_element(x.begin(), x.end()), "block_reduce, largest");
    CHECK_EQUAL(out[t].least, static_cast<float>(*std::min_element(x.begin(), x.end())), "block_reduce, smallest");
    CHECK_EQUAL(out[t].before, before, "block_scan");
    CHECK_EQUAL(out[t].total, static_cast<uint64_t>(out[t].sum), "block_scan, total");
    CHECK_EQUAL(out[t].given, x[giver], "block_broadcast");
    before += static_cast<uint64_t>(x[t]);
  }
}

// ---- tiles.cuh ----

template <class E, class C = Compute<E>>
__global__ void sum(const E* x, int n, double* tile_sums, double* out) {
  FD_SHARED(BlockSlots, slots);
  const double all =
      sum_row<E, C>(slots, n, nullptr, tile_sums, [=](int v, auto& values) { read(x, v, n, C(0), values); });
  if (threadIdx.x == 0) *out = all;
}

// Bit for bit in the order that core/tiles.h writes down.
template <class E, class C = Compute<E>>
void test_sums() {
  for (const int n : {1, 2, 255, 256, 257, 2047, 2048, 2049, 5000}) {
    Buffer<E> x(n);
    for (E& value : x) value = some<E>();
    if constexpr (sizeof(E) > 2)
      for (E& value : x) value = std::exp(value);  // sums that round
    double expected = 0;
    for (int start = 0; start < n; start += kTile) {
      std::vector<C> lane(kLanes, C(0));
      for (int v = start; v < n && v < start + kTile; ++v) lane[(v - start) % kLanes] += static_cast<C>(load(x[v]));
      for (size_t width = kLanes / 2; width > 0; width /= 2)
        for (size_t l = 0; l < width; ++l) lane[l] = lane[2 * l] + lane[2 * l + 1];
      expected += static_cast<double>(lane[0]);
    }
    Buffer<double> tiles(num_tiles(n)), out(1);
    LAUNCH((sum<E>), 1, kThreads, 0, nullptr, x.data(), n, tiles.data(), out.data());
    CHECK_EQUAL(out[0], expected, "sum of " + std::to_string(n));
  }
}

// ---- sort.cuh ----

template <class C>
__global__ void sort(Entry<C>* entry, int n) {
  sort_entries(entry, n);
}

template <class C>
void test_sort() {
  for (const int n : {0, 1, 2, 3, 31, 32, 33, 256, 257, 511, 512, 700}) {
    Buffer<Entry<C>> entry(n);
    for (int i = 0; i < n; ++i) entry[i] = {static_cast<Key<C>>(below(n / 3 + 1)), static_cast<uint32_t>(i)};
    std::shuffle(entry.begin(), entry.end(), generator);
    std::vector<Entry<C>> expected(entry.begin(), entry.end());
    std::sort(expected.begin(), expected.end(),
              [](const auto& a, const auto& b) { return a.key != b.key ? a.key < b.key : a.id < b.id; });
    LAUNCH((sort<C>), 1, kThreads, 0, nullptr, entry.data(), n);
    for (int i = 0; i < n; ++i) CHECK(entry[i].key == expected[i].key && entry[i].id == expected[i].id);
  }
}

// ---- law.cuh: the radix selection ----

template <class E, class C = Compute<E>>
__global__ void keep_top(const E* x, int n, int64_t k, RowMemory<C> m) {
  FD_SHARED(LawShared<C>, s);
  scan_row(x, n, RowFilter{}, m, 0, 1);
  __syncthreads();  // block_max is written
  with_law(x, n, RowFilter{}, m, s, [&](auto& law) { law.keep_top(k); });
}

template <class E, class C = Compute<E>>
void test_selection() {
  for (const int n : {1, 2, 64, 65, 300, 2049, 5000})
    for (const int k : {1, 2, n / 3 + 1, n}) {
      if (k > n) continue;
      Buffer<E> x(n);
      for (E& value : x) value = some<E>();
      RowMemory<C> m;
      Buffer<char> memory(place_row<C>(n, false, nullptr, m));
      place_row(n, false, memory.data(), m);
      LAUNCH((keep_top<E>), 1, kThreads, 0, nullptr, x.data(), n, k, m);
      std::vector<int> order(n);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return load(x[a]) > load(x[b]); });
      std::vector<bool> expected(n);
      for (int i = 0; i < k; ++i) expected[order[i]] = true;
      for (int v = 0; v < n; ++v)
        CHECK_EQUAL((m.kept[v / kWord] >> v % kWord & 1) != 0, expected[v],
                    "id " + std::to_string(v) + " of " + std::to_string(n) + ", top " + std::to_string(k));
    }
}

// ---- draw.cuh: who wins ----

__global__ void join(const float* total, const int64_t* id, int64_t* out) {
  FD_SHARED(BlockSlots, slots);
  Leader<float> leader;
  if (id[threadIdx.x] >= 0) leader.enter_total(id[threadIdx.x], total[threadIdx.x]);
  leader = join_leaders(slots, leader);
  if (threadIdx.x == 0) *out = leader.winner;
}

// The largest, of equals the lowest id; -1 where nobody leads.
void test_leaders() {
  for (const int leaders : {0, 1, 5, kThreads}) {
    Buffer<float> total(kThreads);
    Buffer<int64_t> id(kThreads, int64_t{-1}), out(1);
    int64_t winner = -1;
    float best = 0;
    for (int t = 0; t < kThreads; ++t) {
      total[t] = static_cast<float>(below(4)) - 2;
      if (t >= leaders) continue;
      id[t] = below(1 << 20);
      if (winner < 0 || total[t] > best || (total[t] == best && id[t] < winner)) best = total[t], winner = id[t];
    }
    LAUNCH(join, 1, kThreads, 0, nullptr, total.data(), id.data(), out.data());
    CHECK_EQUAL(out[0], winner, "leader of " + std::to_string(leaders));
  }
}

// ---- mma.cuh ----

template <class T>
struct alignas(16) Matrices {
  T a[16][16 + 8];          // row by row
  T b_columns[16][16 + 8];  // b, 16 x 16, column by column
  T b_rows[16][16 + 8];     // and row by row
};

// Every warp: c += a b, twice, with b as it lies in each of the two.
template <class T>
__global__ void multiply(const T* a, const T* b, float* out) {
  FD_SHARED(Matrices<T>, s);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) {
    s.a[i / 16][i % 16] = a[i];
    s.b_rows[i / 16][i % 16] = b[i];
    s.b_columns[i % 16][i / 16] = b[i];
  }
  __syncthreads();
  const int lane = lane_id();
  uint32_t left[4], right[4];
  load_matrices(&s.a[lane % 16][lane / 16 * 8], left);
  for (int way = 0; way < 2; ++way) {
    if (way == 0) load_matrices(&s.b_columns[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8], right);
    if (way == 1) load_matrices<true>(&s.b_rows[lane % 16][lane / 16 * 8], right);
    for (int half = 0; half < 2; ++half) {
      float c[4];
      for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(lane + i);
      multiply_add<T>(c, left, right[2 * half], right[2 * half + 1]);
      for (int i = 0; i < 4; ++i)
        out[((warp_id() * 2 + way) * 16 + lane / 4 + i / 2 * 8) * 16 + 8 * half + lane % 4 * 2 + i % 2] =
            c[i] - static_cast<float>(lane + i);
    }
  }
}

// Numbers of few bits, whose sums are exact in any order.
template <class T>
void test_products() {
  for (int repeat = 0; repeat < 4; ++repeat) {
    Buffer<T> a(256), b(256);
    Buffer<float> out(2 * 2 * 256);
    for (T& value : a) value = store<T, false>(static_cast<float>(below(65) - 32) / 8);
    for (T& value : b) value = store<T, false>(static_cast<float>(below(65) - 32) / 8);
    LAUNCH((multiply<T>), 1, 64, 0, nullptr, a.data(), b.data(), out.data());
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 16; ++column) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += load(a[row * 16 + k]) * load(b[k * 16 + column]);
        for (int way = 0; way < 4; ++way)
          CHECK_EQUAL(out[(way * 16 + row) * 16 + column], sum, "element " + std::to_string(row * 16 + column));
      }
  }
}

template <class T>
__global__ void pack_pairs(const float* x, uint32_t* out) {
  out[threadIdx.x] = pack<T>(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}

// Rounding, written out as one double: nearest, ties to even, subnormals and overflow as well.
template <class T>
void test_packing() {
  constexpr int kPairs = 512, kMantissa = std::is_same_v<T, Half> ? 10 : 7,
                kLeast = std::is_same_v<T, Half> ? -14 : -126;
  const double largest = std::is_same_v<T, Half> ? 65504.0 : 0x1.fep127;
  Buffer<float> x(2 * kPairs);
  Buffer<uint32_t> out(kPairs);
  for (float& value : x) {
    value = std::ldexp(static_cast<float>(below(1 << 13) - (1 << 12)),
                       below(2) ? -8 : below(kLeast * -2 + 20) + kLeast - 20);
  }
  x[0] = 65519.9f, x[1] = 65520.0f, x[2] = INFINITY, x[3] = -INFINITY, x[4] = 0.0f, x[5] = -0.0f;
  LAUNCH((pack_pairs<T>), 1, kPairs, 0, nullptr, x.data(), out.data());
  for (int i = 0; i < 2 * kPairs; ++i) {
    const double value = x[i];
    int exponent;
    std::frexp(value, &exponent);
    const double ulp = std::ldexp(1.0, std::max(exponent - 1, kLeast) - kMantissa);
    double expected = std::isinf(value) ? value : std::nearbyint(value / ulp) * ulp;
    if (std::fabs(expected) > largest) expected = std::copysign(INFINITY, value);
    const T got{static_cast<uint16_t>(out[i / 2] >> 16 * (i % 2))};
    CHECK_EQUAL(static_cast<double>(load(got)), expected, "rounding " + std::to_string(value));
    CHECK_EQUAL(std::signbit(load(got)), std::signbit(value), "the sign of " + std::to_string(value));
  }
}

}  // namespace

int main(int, char** arguments) {
  const uint64_t seed = std::stoull(arguments[1]);
  set_seed(seed);
  generator.seed(seed);
  test_vectors<float>();
  test_vectors<double>();
  test_vectors<Half>();
  test_vectors<BFloat16>();
  test_reductions();
  test_sums<float>();
  test_sums<double>();
  test_sums<Half>();
  test_sums<BFloat16>();
  test_sort<float>();
  test_sort<double>();
  test_selection<float>();
  test_selection<double>();
  test_selection<Half>();
  test_selection<BFloat16>();
  test_leaders();
  test_products<Half>();
  test_products<BFloat16>();
  test_packing<Half>();
  test_packing<BFloat16>();
  std::cout << failures() << " failures\n";
  return failures() != 0;
}
