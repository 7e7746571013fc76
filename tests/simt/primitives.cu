// Every primitive of the executor against a model written down separately.
//   primitives SEED
// nvcc compiles it too: on a GPU the same models hold, but for what is the executor's own.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "backend.h"
#include "check.h"
#include "core/cuda/async.cuh"

using namespace fastdecode::FD_ISA;

namespace {

#if defined(__CUDACC__)
constexpr unsigned kMaskOf30 = 0x3fffffffu;
#else
constexpr unsigned kMaskOf30 = ~0u;  // lanes that the block never had are no part of it
#endif

// ---- indices ----

__global__ void write_indices(uint3* thread, uint3* block, int* warp_lane) {
  const unsigned in_block = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block_number = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned i = block_number * blockDim.x * blockDim.y * blockDim.z + in_block;
  thread[i] = threadIdx;
  block[i] = blockIdx;
  warp_lane[i] = static_cast<int>(__match_any_sync(kMaskOf30, block_number));  // the lanes of this warp
}

void test_indices() {
  const dim3 grid(3, 2, 5), block(5, 3, 2);
  const unsigned threads = 30, blocks = 30;
  Buffer<uint3> thread(threads * blocks), where(threads * blocks);
  Buffer<int> lanes(threads * blocks);
  LAUNCH(write_indices, grid, block, 0, nullptr, thread.data(), where.data(), lanes.data());
  unsigned i = 0;
  for (unsigned bz = 0; bz < 5; ++bz)
    for (unsigned by = 0; by < 2; ++by)
      for (unsigned bx = 0; bx < 3; ++bx)
        for (unsigned z = 0; z < 2; ++z)
          for (unsigned y = 0; y < 3; ++y)
            for (unsigned x = 0; x < 5; ++x, ++i) {
              CHECK(thread[i].x == x && thread[i].y == y && thread[i].z == z);
              CHECK(where[i].x == bx && where[i].y == by && where[i].z == bz);
              CHECK(lanes[i] == 0x3fffffff);
            }
}

// ---- shuffles ----

enum Kind { kIndex, kUp, kDown, kXor };

template <class T>
__global__ void shuffle(T* out, const T* in, const int* argument, int width, Kind kind, unsigned mask) {
  const int t = static_cast<int>(threadIdx.x);
  if (!(mask >> (t % 32) & 1)) return;
  T v = in[t];
  switch (kind) {
    case kIndex: v = __shfl_sync(mask, v, argument[t], width); break;
    case kUp: v = __shfl_up_sync(mask, v, argument[t], width); break;
    case kDown: v = __shfl_down_sync(mask, v, argument[t], width); break;
    case kXor: v = __shfl_xor_sync(mask, v, argument[t], width); break;
  }
  out[t] = v;
}

// Programming guide, warp shuffle functions: lanes outside the segment give the reader its own value, except that xor
// may read earlier segments.
int source(Kind kind, int lane, int argument, int width) {
  const int segment = lane / width;
  if (kind == kIndex) return segment * width + ((argument % width) + width) % width;
  const int from = kind == kUp ? lane - argument : kind == kDown ? lane + argument : lane ^ argument;
  if (kind == kXor) return from / width > segment ? lane : from;
  return from < 0 || from / width != segment ? lane : from;
}

template <class T>
void test_shuffles(const char* type) {
  Buffer<T> in(64), out(64);
  for (int i = 0; i < 64; ++i)
    in[i] = static_cast<T>(static_cast<T>(i * 2654435761u) * (sizeof(T) == 8 ? T(65539) : T(1)));
  for (Kind kind : {kIndex, kUp, kDown, kXor}) {
    for (int width = 1; width <= 32; width *= 2) {
      for (int shift = 0; shift < 32; ++shift) {
        Buffer<int> argument(64);
        for (int i = 0; i < 64; ++i)
          argument[i] = (i / 7 % 2 ? shift : 31 - shift) + (kind == kIndex ? i % 3 * 32 - 32 : 0);
        LAUNCH(shuffle<T>, 1, 64, 0, nullptr, out.data(), in.data(), argument.data(), width, kind, ~0u);
        for (int i = 0; i < 64; ++i) {
          const int from = i / 32 * 32 + source(kind, i % 32, argument[i], width);
          CHECK_EQUAL(out[i], in[from],
                      std::string(type) + " kind " + std::to_string(kind) + " width " + std::to_string(width) +
                          " argument " + std::to_string(argument[i]) + " lane " + std::to_string(i % 32));
        }
      }
    }
  }
  // Two halves of a warp at once, each with its mask; the others have left.
  const Buffer<int> three(64, 3);
  std::fill(out.begin(), out.end(), T(0));
  LAUNCH(shuffle<T>, 1, 64, 0, nullptr, out.data(), in.data(), three.data(), 8, kIndex, 0x0000ff00u);
  for (int i = 0; i < 64; ++i) CHECK_EQUAL(out[i], i % 32 / 8 == 1 ? in[i / 8 * 8 + 3] : T(0), type);
}

__global__ void shuffle_narrow(int* out) {
  const bool odd = threadIdx.x & 1;
  const auto sum = static_cast<short>(threadIdx.x * 1000);
  out[threadIdx.x] = __shfl_xor_sync(~0u, odd, 1) + __shfl_sync(~0u, sum, 31);
}

void test_narrow_shuffles() {
  Buffer<int> out(32);
  LAUNCH(shuffle_narrow, 1, 32, 0, nullptr, out.data());
  for (int i = 0; i < 32; ++i) CHECK_EQUAL(out[i], (i % 2 == 0) + 31000, "bool and short are promoted");
}

// ---- votes, matches, reductions ----

struct Votes {
  unsigned ballot, any, all, match_any, match_all, add, least, largest, conjunction, disjunction, parity;
  int same, add_signed, least_signed, largest_signed;
};

__global__ void vote(Votes* out, const int* in, unsigned first, unsigned second) {
  const unsigned t = threadIdx.x, lane = t % 32;
  const unsigned mask = first >> lane & 1 ? first : second;
  if (!(mask >> lane & 1)) return;
  const int v = in[t];
  const auto u = static_cast<unsigned>(v);
  Votes& o = out[t];
  o.ballot = __ballot_sync(mask, v);
  o.any = static_cast<unsigned>(__any_sync(mask, v));
  o.all = static_cast<unsigned>(__all_sync(mask, v));
  o.match_any = __match_any_sync(mask, v);
  o.match_all = __match_all_sync(mask, static_cast<long long>(v) << 32, &o.same);
  o.add = __reduce_add_sync(mask, u);
  o.least = __reduce_min_sync(mask, u);
  o.largest = __reduce_max_sync(mask, u);
  o.conjunction = __reduce_and_sync(mask, u);
  o.disjunction = __reduce_or_sync(mask, u);
  o.parity = __reduce_xor_sync(mask, u);
  o.add_signed = __reduce_add_sync(mask, v);
  o.least_signed = __reduce_min_sync(mask, v);
  o.largest_signed = __reduce_max_sync(mask, v);
}

void test_votes() {
  const std::vector<std::pair<unsigned, unsigned>> masks = {
      {~0u, ~0u}, {0x0000ffffu, 0xffff0000u}, {0x55555555u, 0xaaaaaaaau}, {0x80000001u, 0x00000ff0u}, {1u, 2u}};
  for (const auto& [first, second] : masks) {
    for (int modulus : {1, 2, 3, 40}) {
      for (int shift : {0, 1, -5}) {
        Buffer<int> in(64);
        for (int i = 0; i < 64; ++i) in[i] = i % modulus + shift;
        Buffer<Votes> out(64);
        LAUNCH(vote, 1, 64, 0, nullptr, out.data(), in.data(), first, second);
        for (int i = 0; i < 64; ++i) {
          const unsigned mask = first >> i % 32 & 1 ? first : second;
          if (!(mask >> i % 32 & 1)) continue;
          Votes want{0, 0, 1, 0, 0, 0, ~0u, 0, ~0u, 0, 0, 1, 0, INT32_MAX, INT32_MIN};
          for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) {
            if (!(mask >> j % 32 & 1)) continue;
            const auto u = static_cast<unsigned>(in[j]);
            want.ballot |= static_cast<unsigned>(in[j] != 0) << j % 32;
            want.any |= in[j] != 0;
            want.all &= in[j] != 0;
            want.match_any |= static_cast<unsigned>(in[j] == in[i]) << j % 32;
            want.same &= in[j] == in[i];
            want.add += u;
            want.least = std::min(want.least, u);
            want.largest = std::max(want.largest, u);
            want.conjunction &= u;
            want.disjunction |= u;
            want.parity ^= u;
            want.least_signed = std::min(want.least_signed, in[j]);
            want.largest_signed = std::max(want.largest_signed, in[j]);
          }
          want.match_all = want.same ? mask : 0;
          want.add_signed = static_cast<int>(want.add);
          CHECK(std::memcmp(&out[i], &want, sizeof want) == 0);
        }
      }
    }
  }
}

__global__ void block_votes(int* out, int limit) {
  const int t = static_cast<int>(threadIdx.x);
  int* o = out + 3 * t;
  o[0] = __syncthreads_count(t < limit ? 7 : 0);
  o[1] = __syncthreads_and(t < limit);
  o[2] = __syncthreads_or(t < limit);
}

void test_block_votes() {
  for (int threads : {1, 31, 32, 33, 100, 1024}) {
    for (int limit : {0, 1, 17, threads}) {
      Buffer<int> out(3 * threads);
      LAUNCH(block_votes, 1, threads, 0, nullptr, out.data(), limit);
      for (int t = 0; t < threads; ++t) {
        CHECK_EQUAL(out[3 * t], std::min(limit, threads), "count");
        CHECK_EQUAL(out[3 * t + 1], limit >= threads, "and");
        CHECK_EQUAL(out[3 * t + 2], limit > 0, "or");
      }
    }
  }
}

// ---- shared memory ----

template <class T, int N>
struct Row {
  T values[N];
};

template <class T>
__device__ T neighbour(T value) {
  using Smem = Row<T, 1024>;
  FD_SHARED(Smem, s);  // one for each T
  s.values[threadIdx.x] = value;
  __syncthreads();
  return s.values[(threadIdx.x + 1) % blockDim.x];
}

struct Two {
  alignas(128) char aligned;
  int count;
};

__global__ void shared_objects(int* out) {
  using Smem = Row<int, 1024>;
  FD_SHARED(Smem, first);
  FD_SHARED(Smem, second);
  FD_SHARED(Two, two);
  FD_DYNAMIC_SHARED(int, dynamic);
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  first.values[t] = t;
  second.values[t] = 2 * t;
  dynamic[t] = 3 * t;
  if (t == 0) two.count = 5 + static_cast<int>(blockIdx.x);
  const auto whole = static_cast<int>(neighbour<float>(static_cast<float>(t)));
  const int part = neighbour<int>(10 * t);
  __syncthreads();
  const int other = n - 1 - t;
  const bool aligned = reinterpret_cast<uintptr_t>(&two) % 128 == 0 && reinterpret_cast<uintptr_t>(dynamic) % 16 == 0;
  out[static_cast<int>(blockIdx.x) * n + t] =
      aligned ? first.values[other] + second.values[other] + dynamic[other] + two.count + whole + part : -1;
}

void test_shared_memory() {
  const int n = 1024, blocks = 9;
  Buffer<int> out(n * blocks);
  LAUNCH(shared_objects, blocks, n, n * sizeof(int), nullptr, out.data());
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < n; ++t) CHECK_EQUAL(out[b * n + t], 6 * (n - 1 - t) + 5 + b + 11 * ((t + 1) % n), "shared");
}

// ---- atomics ----

template <class T>
__global__ void atomics(T* out, T* old) {
  const T t = static_cast<T>(threadIdx.x);
  const T before = atomicAdd(&out[0], T(1));
  old[static_cast<int>(before)] = t;
  if constexpr (!std::is_floating_point_v<T>) {
    atomicMin(&out[1], t);
    atomicMax(&out[2], t);
    atomicExch(&out[3], t);
    atomicAnd(&out[4], static_cast<T>(~(T(1) << threadIdx.x % 31)));
    atomicOr(&out[5], T(1) << threadIdx.x % 31);
    atomicXor(&out[6], T(1) << threadIdx.x % 31);
    for (;;) {  // an addition out of compare and swap
      const T seen = out[7];
      if (atomicCAS(&out[7], seen, seen + t) == seen) break;
    }
  }
}

template <class T>
void test_atomics() {
  const int n = 100;
  Buffer<T> out(8), old(n, T(-1));
  out[1] = T(1000);
  out[4] = T(0x7fffffff);
  out[6] = T(5);
  LAUNCH(atomics<T>, 1, n, 0, nullptr, out.data(), old.data());
  CHECK_EQUAL(out[0], T(n), "add");
  std::sort(old.begin(), old.end());
  for (int i = 0; i < n; ++i) CHECK_EQUAL(old[i], T(i), "each sees another old value");
  if constexpr (!std::is_floating_point_v<T>) {
    T parity = 5;
    for (int i = 0; i < n; ++i) parity ^= T(1) << i % 31;
    CHECK_EQUAL(out[1], T(0), "min");
    CHECK_EQUAL(out[2], T(n - 1), "max");
    CHECK(static_cast<uint64_t>(out[3]) < uint64_t{100});
    CHECK_EQUAL(out[4], T(0), "and");
    CHECK_EQUAL(out[5], T(0x7fffffff), "or");
    CHECK_EQUAL(out[6], parity, "xor");
    CHECK_EQUAL(out[7], T(n * (n - 1) / 2), "compare and swap");
  }
}

// ---- blocks together ----

__global__ void last_block_sums(const int* in, long long* partial, unsigned* counter, long long* total, int* doers) {
  struct Smem {
    long long sum;
    bool last;
  };
  FD_SHARED(Smem, s);
  if (threadIdx.x == 0) s.sum = 0;
  __syncthreads();
  atomicAdd(reinterpret_cast<unsigned long long*>(&s.sum),
            static_cast<unsigned long long>(in[blockIdx.x * blockDim.x + threadIdx.x]));
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = s.sum;
    __threadfence();
    s.last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!s.last) return;
  if (threadIdx.x == 0) {
    long long sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += __ldcg(&partial[b]);
    *total = sum;
    *counter = 0;
    ++*doers;
  }
}

void test_last_block() {
  const int threads = 64, blocks = 37;
  Buffer<int> in(threads * blocks);
  std::iota(in.begin(), in.end(), 0);
  for (int live : {1, 2, 4, 8, 100}) {
    set_live_blocks(live);
    Buffer<long long> partial(blocks, -1), total(1);
    Buffer<unsigned> counter(1);
    Buffer<int> doers(1);
    for (int repeat = 1; repeat <= 2; ++repeat) {
      LAUNCH(last_block_sums, blocks, threads, 0, nullptr, in.data(), partial.data(), counter.data(), total.data(),
             doers.data());
      CHECK_EQUAL(total[0], static_cast<long long>(in.size()) * (static_cast<long long>(in.size()) - 1) / 2, "sum");
      CHECK_EQUAL(doers[0], repeat, "one last block");
    }
  }
  set_live_blocks(4);
}

// ---- asynchronous copies ----

template <int Bytes>
__global__ void copy_rows(const unsigned char* in, unsigned char* out, int rows) {
  struct alignas(16) Smem {
    unsigned char row[2][64 * Bytes];
  };
  FD_SHARED(Smem, s);
  const int t = static_cast<int>(threadIdx.x), bytes = 64 * Bytes;
  auto fetch = [&](int row) {
    if (row < rows) cp_async<Bytes>(&s.row[row % 2][t * Bytes], in + row * bytes + t * Bytes);
    cp_async_commit();
  };
  fetch(0);
  for (int row = 0; row < rows; ++row) {
    fetch(row + 1);
    cp_async_wait<1>();
    __syncthreads();  // the row is whole
    const int other = 63 - t;
    for (int i = 0; i < Bytes; ++i) out[row * bytes + other * Bytes + i] = s.row[row % 2][other * Bytes + i];
    __syncthreads();  // before the buffer is filled again
  }
}

template <int Bytes>
void test_async() {
  const int rows = 7, bytes = 64 * Bytes;
  Buffer<int4> in(rows * bytes / 16), out(in.size());
  auto* from = reinterpret_cast<unsigned char*>(in.data());
  for (int i = 0; i < rows * bytes; ++i) from[i] = static_cast<unsigned char>(i * 31 + i / 64);
  LAUNCH(copy_rows<Bytes>, 1, 64, 0, nullptr, from, reinterpret_cast<unsigned char*>(out.data()), rows);
  CHECK(std::memcmp(in.data(), out.data(), static_cast<size_t>(rows * bytes)) == 0);
}

#if !defined(__CUDACC__)

// ---- what is the executor's own ----

__global__ void lost_updates(int* counter) {
  const int seen = *counter;
  __threadfence();  // where another block may come between
  *counter = seen + 1;
}

void test_blocks_interleave() {
  int counter = 0;
  set_live_blocks(1);
  LAUNCH(lost_updates, 100, 1, 0, nullptr, &counter);
  CHECK_EQUAL(counter, 100, "one block at a time");
  set_live_blocks(4);
  counter = 0;
  LAUNCH(lost_updates, 100, 1, 0, nullptr, &counter);
  CHECK(counter < 100);
}

// ---- intrinsics ----

void test_intrinsics() {
  for (unsigned x : {0u, 1u, 2u, 0x80000000u, 0xffffffffu, 0x12345678u}) {
    int ones = 0, first = 0, leading = 32;
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) {
      if (x >> i & 1) {
        ++ones;
        if (!first) first = i + 1;
        leading = 31 - i;
        reversed |= 1u << (31 - i);
      }
    }
    CHECK_EQUAL(__popc(x), ones, "__popc");
    CHECK_EQUAL(__ffs(static_cast<int>(x)), first, "__ffs");
    CHECK_EQUAL(__clz(static_cast<int>(x)), leading, "__clz");
    CHECK_EQUAL(__brev(x), reversed, "__brev");
    const unsigned long long wide = static_cast<unsigned long long>(x) << 32;
    CHECK_EQUAL(__popcll(wide), ones, "__popcll");
    CHECK_EQUAL(__ffsll(static_cast<long long>(wide)), first ? first + 32 : 0, "__ffsll");
    CHECK_EQUAL(__clzll(static_cast<long long>(wide)), x ? leading : 64, "__clzll");
    CHECK_EQUAL(__brevll(wide), static_cast<unsigned long long>(reversed), "__brevll");
    CHECK_EQUAL(__float_as_uint(__uint_as_float(x & 0x7f7fffffu)), x & 0x7f7fffffu, "bits of a float");
    CHECK_EQUAL(__umulhi(x, 3u), static_cast<unsigned>(x * 3ull >> 32), "__umulhi");
    CHECK_EQUAL(__umul64hi(wide, 1ull << 32), static_cast<unsigned long long>(x), "__umul64hi");
    CHECK_EQUAL(__funnelshift_l(0x80000000u, x, 1), x << 1 | 1, "__funnelshift_l");
    CHECK_EQUAL(__funnelshift_r(x, 1u, 1), x >> 1 | 0x80000000u, "__funnelshift_r");
  }
  CHECK_EQUAL(__mulhi(-2, 3), -1, "__mulhi");
  CHECK_EQUAL(__byte_perm(0x33221100u, 0x77665544u, 0x7150u), 0x77115500u, "__byte_perm");
  CHECK_EQUAL(__dp4a(0x01ff02fe, 0x03030303, 10), 10 + 3 * (1 - 1 + 2 - 2), "__dp4a");
  CHECK_EQUAL(min(3, 2) + max(-1, -2), 1, "min, max");
  CHECK_EQUAL(max(__uint_as_float(0x7fc00000u), 2.0f), 2.0f, "max with NaN");
  CHECK_EQUAL(__fmaf_rn(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f), 0x1p-46f, "one rounding");
  CHECK_EQUAL(sizeof(float4) + alignof(float4) + alignof(int2) + alignof(uint3), 16u + 16 + 8 + 4, "vector types");
}

// ---- limits ----

template <class Call>
void check_error(Call&& call, const std::string& text) {
  try {
    call();
    CHECK_EQUAL(std::string("silent"), text, "error");
  } catch (const simt::Error& e) {
    CHECK(std::string(e.what()).find(text) != std::string::npos);
    if (std::string(e.what()).find(text) == std::string::npos) std::cout << "  got " << e.what() << "\n";
  }
}

__global__ void nothing() {}

__global__ void shared_too_large() {
  using Smem = Row<char, (48 << 10) + 1>;
  FD_SHARED(Smem, s);
  s.values[0] = 0;
}

void test_launch_limits() {
  check_error([] { LAUNCH(nothing, 0, 32, 0, nullptr); }, "nothing: grid: expected");
  check_error([] { LAUNCH(nothing, dim3(1, 65536), 32, 0, nullptr); }, "got (1, 65536, 1)");
  check_error([] { LAUNCH(nothing, 1, 0, 0, nullptr); }, "nothing: block: expected");
  check_error([] { LAUNCH(nothing, 1, 1025, 0, nullptr); }, "block");
  check_error([] { LAUNCH(nothing, 1, dim3(1, 1, 65), 0, nullptr); }, "at most 64 in z");
  check_error([] { LAUNCH(nothing, 1, dim3(65536, 65536, 1), 0, nullptr); }, "block");
  check_error([] { LAUNCH(nothing, 1, 32, 49153, nullptr); }, "at most 49152 bytes, got 49153; FD_ALLOW_SHARED");
  FD_ALLOW_SHARED(nothing, 232448);
  check_error([] { LAUNCH(nothing, 1, 32, 300000, nullptr); }, "dynamic shared memory: expected at most 232448");
  check_error([] { LAUNCH(shared_too_large, 1, 1, 0, nullptr); }, "shared memory: expected at most 49152");
  LAUNCH(nothing, dim3(1, 1, 2), dim3(1, 16, 64), 232448, nullptr);
}

__device__ __attribute__((noinline)) long long deep(int depth) {
  volatile char frame[256];
  frame[depth % 256] = static_cast<char>(depth);
  if (depth == 0) {
    __syncthreads();
    return 0;
  }
  return deep(depth - 1) + frame[depth % 256] - static_cast<char>(depth) + depth;
}

__global__ void deep_stacks(long long* out) { out[threadIdx.x] = deep(200 + static_cast<int>(threadIdx.x % 7)); }

void test_deep_stacks() {
  Buffer<long long> out(1024);
  LAUNCH(deep_stacks, 1, 1024, 0, nullptr, out.data());
  for (int t = 0; t < 1024; ++t) CHECK_EQUAL(out[t], (200 + t % 7) * (201 + t % 7) / 2, "deep");
}

__global__ void throws(int thread) {
  if (static_cast<int>(threadIdx.x) == thread) throw std::runtime_error("from the kernel");
  __syncthreads();
}

void test_exceptions() {
  for (int i = 0; i < 3; ++i) {
    check_error([] { LAUNCH(throws, 2, 64, 0, nullptr, 33); }, "thread (33, 0, 0): exception: from the kernel");
    LAUNCH(throws, 2, 64, 0, nullptr, 64);
  }
}

// ---- order ----

__global__ void order(int* out, int* next) {
  out[(*next)++] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  __syncthreads();
}

Buffer<int> order_of(uint64_t seed) {
  Buffer<int> out(256);
  int next = 0;
  simt::config().seed = seed;
  LAUNCH(order, 4, 64, 0, nullptr, out.data(), &next);
  return out;
}

void test_order(uint64_t seed) {
  const auto first = order_of(seed), other = order_of(seed + 1), again = order_of(seed);
  CHECK(first == again);
  CHECK(first != other);
  auto sorted = first;
  std::sort(sorted.begin(), sorted.end());
  CHECK(sorted != first);
  for (int i = 0; i < 256; ++i) CHECK_EQUAL(sorted[i], i, "all threads ran");
  simt::config().seed = seed;
}

void test_executor(uint64_t seed) {
  test_blocks_interleave();
  test_intrinsics();
  test_launch_limits();
  test_deep_stacks();
  test_exceptions();
  test_order(seed);
}

#endif

}  // namespace

int main(int, char** arguments) {
  const uint64_t seed = std::stoull(arguments[1]);
  set_seed(seed);
  test_indices();
  test_shuffles<int>("int");
  test_shuffles<unsigned>("unsigned");
  test_shuffles<long long>("long long");
  test_shuffles<unsigned long long>("unsigned long long");
  test_shuffles<float>("float");
  test_shuffles<double>("double");
  test_narrow_shuffles();
  test_votes();
  test_block_votes();
  test_shared_memory();
  test_atomics<int>();
  test_atomics<unsigned>();
  test_atomics<unsigned long long>();
  test_atomics<float>();
  test_atomics<double>();
  test_last_block();
  test_async<4>();
  test_async<8>();
  test_async<16>();
#if !defined(__CUDACC__)
  test_executor(seed);
#endif
  std::cout << failures() << " failures\n";
  return failures() != 0;
}
