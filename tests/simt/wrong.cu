// Kernels with one fault each, and their corrected twins: `if (right)` is the correction. What each case must be found
// by stands in test_executor.py; it reads the lines with the faults from the comments `fault: name` here.
//   wrong CASE 0|1 SEEDS POISON        prints "silent", "result: differs" or the report, a line for each seed
#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>

#include "check.h"
#include "core/cuda/async.cuh"
#include "core/cuda/mma.cuh"

namespace simt = fastdecode::simt;
using namespace fastdecode::FD_ISA;

namespace {

constexpr int kThreads = 128;

struct Floats {
  float values[kThreads];
};

std::vector<float> ramp(int n) {
  std::vector<float> values(n);
  std::iota(values.begin(), values.end(), 1.0f);
  return values;
}

std::string compare(const std::vector<float>& got, const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(got[i] == expected[i])) return "result: differs";
  }
  return "silent";
}

// ---- divergence: two threads of a block in different barriers ----

__global__ void diverge(float* out, bool right) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x);
  s.values[t] = static_cast<float>(t + 1);
  if (right) {
    __syncthreads();
  } else if (t % 32 < 7) {
    __syncthreads();
  } else {
    __syncthreads();  // fault: diverge
  }
  out[t] = s.values[kThreads - 1 - t];
}

std::string run_diverge(bool right) {
  auto expected = ramp(kThreads);
  std::reverse(expected.begin(), expected.end());
  std::vector<float> out(kThreads);
  FD_LAUNCH(diverge, 1, kThreads, 0, nullptr, out.data(), right);
  return compare(out, expected);
}

// ---- divergence: a thread leaves, its block waits ----

__global__ void leave(float* out, int n, bool right) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x);
  if (!right && t >= n) return;
  s.values[t] = static_cast<float>(t + 1);
  __syncthreads();  // fault: leave
  if (t < n) out[t] = s.values[n - 1 - t];
}

std::string run_leave(bool right) {
  auto expected = ramp(100);
  std::reverse(expected.begin(), expected.end());
  std::vector<float> out(100);
  FD_LAUNCH(leave, 1, kThreads, 0, nullptr, out.data(), 100, right);
  return compare(out, expected);
}

// ---- deadlock: some lanes in a warp's shuffle, the others in the block's barrier ----

__global__ void wait_for_each_other(float* out, bool right) {
  const int t = static_cast<int>(threadIdx.x);
  auto v = static_cast<float>(t + 1);
  if (right || t != 40) v = __shfl_xor_sync(~0u, v, 1);  // fault: deadlock
  __syncthreads();
  out[t] = v;
}

std::string run_deadlock(bool right) {
  auto expected = ramp(kThreads);
  for (int i = 0; i < kThreads; i += 2) std::swap(expected[i], expected[i + 1]);
  std::vector<float> out(kThreads);
  FD_LAUNCH(wait_for_each_other, 1, kThreads, 0, nullptr, out.data(), right);
  return compare(out, expected);
}

// ---- missing barrier ----

__global__ void reverse_twice(float* out, const float* in, bool right) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 2; ++i) {
    s.values[t] = i ? 2 * s.values[t] : in[t];
    __syncthreads();
    const float v = s.values[kThreads - 1 - t];
    if (right) __syncthreads();  // all have read before anyone writes
    s.values[t] = v;
  }
  out[t] = s.values[t];
}

std::string run_barrier(bool right) {
  const auto in = ramp(kThreads);
  auto expected = in;
  for (float& v : expected) v *= 2;
  std::vector<float> out(kThreads);
  FD_LAUNCH(reverse_twice, 1, kThreads, 0, nullptr, out.data(), in.data(), right);
  return compare(out, expected);
}

// ---- missing __syncwarp: lanes do not run in lockstep ----

__global__ void sum_in_warps(float* out, const float* in, bool right) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  s.values[t] = in[t];
  __syncwarp();
  for (int step = 16; step > 0; step /= 2) {
    if (lane < step) s.values[t] += s.values[t + step];
    if (right) __syncwarp();
  }
  if (lane == 0) out[t / 32] = s.values[t];
}

std::string run_warp(bool right) {
  const auto in = ramp(kThreads);
  std::vector<float> out(kThreads / 32), expected(kThreads / 32);
  for (int i = 0; i < kThreads; ++i) expected[i / 32] += in[i];
  FD_LAUNCH(sum_in_warps, 1, kThreads, 0, nullptr, out.data(), in.data(), right);
  return compare(out, expected);
}

// ---- inactive lanes: outside the mask, gone, and the caller itself ----

__global__ void shuffle_outside(float* out, bool right) {
  const int t = static_cast<int>(threadIdx.x);
  auto v = static_cast<float>(t + 1);
  if (t < 16) v = __shfl_down_sync(0x0000ffffu, v, 4, right ? 16 : 32);  // fault: inactive
  out[t] = v;
}

std::string run_inactive(bool right) {
  auto expected = ramp(32);
  for (int i = 0; i < 16; ++i) expected[i] = static_cast<float>(i < 12 ? i + 5 : i + 1);
  std::vector<float> out(32);
  FD_LAUNCH(shuffle_outside, 1, 32, 0, nullptr, out.data(), right);
  return compare(out, expected);
}

__global__ void vote_of_gone(float* out, bool right) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= 20) return;
  out[t] = static_cast<float>(__popc(__ballot_sync(right ? 0xfffffu : ~0u, t & 1)));  // fault: gone
}

std::string run_gone(bool right) {
  std::vector<float> out(20);
  FD_LAUNCH(vote_of_gone, 1, 32, 0, nullptr, out.data(), right);
  return compare(out, std::vector<float>(20, 10.0f));
}

__global__ void vote_without_caller(float* out, bool right) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = static_cast<float>(__any_sync(right || t != 31 ? ~0u : 0x7fffffffu, t == 5));  // fault: caller
}

std::string run_caller(bool right) {
  std::vector<float> out(32);
  FD_LAUNCH(vote_without_caller, 1, 32, 0, nullptr, out.data(), right);
  return compare(out, std::vector<float>(32, 1.0f));
}

// ---- misaligned vector access ----

__global__ void load_vectors(float* out, const float* in, bool right) {
  const float* p = in + 4 * threadIdx.x + (right ? 0 : 1);
  out[threadIdx.x] = __ldg(reinterpret_cast<const float4*>(p)).x;  // fault: misaligned
}

std::string run_misaligned(bool right) {
  alignas(16) static float in[36];
  std::iota(in, in + 36, 1.0f);
  std::vector<float> out(8), expected(8);
  for (int i = 0; i < 8; ++i) expected[i] = in[4 * i];
  FD_LAUNCH(load_vectors, 1, 8, 0, nullptr, out.data(), static_cast<const float*>(in), right);
  return compare(out, expected);
}

// ---- asynchronous copies: read before the wait, and never waited for ----

__global__ void copy_and_read(float* out, const float* in, bool right) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x);
  cp_async<4>(&s.values[t], &in[t]);
  cp_async_commit();
  if (right) cp_async_wait<0>();
  __syncthreads();
  out[t] = s.values[kThreads - 1 - t];  // fault: async
  cp_async_wait<0>();
}

std::string run_async(bool right) {
  const auto in = ramp(kThreads);
  std::vector<float> expected(in.rbegin(), in.rend()), out(kThreads);
  FD_LAUNCH(copy_and_read, 1, kThreads, 0, nullptr, out.data(), in.data(), right);
  return compare(out, expected);
}

__global__ void copy_two(float* out, const float* in, bool right) {
  struct Smem {
    float first[kThreads], second[kThreads];
  };
  FD_SHARED(Smem, s);
  const int t = static_cast<int>(threadIdx.x);
  cp_async<4>(&s.first[t], &in[t]);
  cp_async_commit();
  cp_async<4>(&s.second[t], &in[kThreads - 1 - t]);
  cp_async_commit();
  if (right) {
    cp_async_wait<0>();
  } else {
    cp_async_wait<1>();  // fault: unwaited
  }
  out[t] = right ? s.first[t] + s.second[t] : s.first[t];
}

std::string run_unwaited(bool right) {
  const auto in = ramp(kThreads);
  std::vector<float> out(kThreads);
  FD_LAUNCH(copy_two, 1, kThreads, 0, nullptr, out.data(), in.data(), right);
  return compare(out, std::vector<float>(kThreads, kThreads + 1.0f));
}

// ---- a barrier too many: nothing can notice its removal ----

__global__ void reverse(float* out, const float* in) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x);
  s.values[t] = in[t];
  __syncthreads();
  __syncthreads();
  out[t] = s.values[kThreads - 1 - t];
}

std::string run_redundant(bool) {
  const auto in = ramp(kThreads);
  std::vector<float> expected(in.rbegin(), in.rend()), out(kThreads);
  FD_LAUNCH(reverse, 1, kThreads, 0, nullptr, out.data(), in.data());
  return compare(out, expected);
}

// ---- uninitialised shared memory: nothing but the second poison shows it ----

struct Flag {
  int found;
};

__global__ void find(float* out, const float* in, bool right) {
  FD_SHARED(Flag, s);
  if (right && threadIdx.x == 0) s.found = 0;
  __syncthreads();
  if (in[threadIdx.x] < 0) atomicMax(&s.found, 1);
  __syncthreads();
  out[threadIdx.x] = s.found > 0 ? 1.0f : 0.0f;
}

std::string run_uninitialised(bool right) {
  const auto in = ramp(kThreads);
  std::vector<float> out(kThreads);
  FD_LAUNCH(find, 1, kThreads, 0, nullptr, out.data(), in.data(), right);
  return compare(out, std::vector<float>(kThreads, 0.0f));
}

// ---- out of bounds, found by ASan: one past a shared array, the dynamic memory, a buffer ----

__global__ void one_past(float* out, bool right) {
  FD_SHARED(Floats, s);
  const int t = static_cast<int>(threadIdx.x);
  s.values[t] = static_cast<float>(t + 1);
  __syncthreads();
  const int next = right ? (t + 1) % kThreads : t + 1;
  out[t] = s.values[next];  // fault: bounds
}

std::string run_bounds(bool right) {
  auto expected = ramp(kThreads);
  std::rotate(expected.begin(), expected.begin() + 1, expected.end());
  std::vector<float> out(kThreads);
  FD_LAUNCH(one_past, 1, kThreads, 0, nullptr, out.data(), right);
  return compare(out, expected);
}

__global__ void one_past_dynamic(float* out, bool right) {
  FD_DYNAMIC_SHARED(float, s);
  const int t = static_cast<int>(threadIdx.x);
  s[t + (right ? 0 : 1)] = static_cast<float>(t + 1);  // fault: dynamic
  __syncthreads();
  out[t] = s[kThreads - 1 - t];
}

std::string run_dynamic(bool right) {
  auto expected = ramp(kThreads);
  std::reverse(expected.begin(), expected.end());
  std::vector<float> out(kThreads);
  FD_LAUNCH(one_past_dynamic, 1, kThreads, kThreads * sizeof(float), nullptr, out.data(), right);
  return compare(out, expected);
}

__global__ void one_past_global(float* out, int n, bool right) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (t < n + (right ? 0 : 1)) out[t] = static_cast<float>(t + 1);  // fault: global
}

std::string run_global(bool right) {
  std::vector<float> out(100);
  FD_LAUNCH(one_past_global, 4, 32, 0, nullptr, out.data(), 100, right);
  return compare(out, ramp(100));
}

// ---- more dynamic shared memory than a kernel has unless asked for ----

__global__ void fill_large(float* out) {
  FD_DYNAMIC_SHARED(float, s);
  const int t = static_cast<int>(threadIdx.x);
  s[100 * t] = static_cast<float>(t + 1);
  out[t] = s[100 * t];
}

std::string run_large(bool right) {
  constexpr size_t kBytes = 100 * kThreads * sizeof(float);
  std::vector<float> out(kThreads);
  FD_ALLOW_SHARED(fill_large, right ? kBytes : 0);
  FD_LAUNCH(fill_large, 1, kThreads, kBytes, nullptr, out.data());  // fault: large
  return compare(out, ramp(kThreads));
}

// ---- a fragment of a matrix in half a warp ----

struct alignas(16) Rows {
  uint16_t values[32][8];
};

__global__ void load_fragment(float* out) {
  FD_SHARED(Rows, s);
  const int t = static_cast<int>(threadIdx.x);
  for (int row = t; row < 32; row += static_cast<int>(blockDim.x))
    for (int i = 0; i < 8; ++i) s.values[row][i] = static_cast<uint16_t>(row + 1);
  __syncthreads();
  uint32_t words[4];
  load_matrices(s.values[t], words);  // fault: fragment
  out[t] = static_cast<float>(words[t / 8] & 0xffff);
}

std::string run_fragment(bool right) {
  std::vector<float> out(right ? 32 : 16), expected;
  for (int t = 0; t < 32; ++t) expected.push_back(static_cast<float>(t / 8 * 8 + t / 4 + 1));
  FD_LAUNCH(load_fragment, 1, right ? 32 : 16, 0, nullptr, out.data());
  return compare(out, expected);
}

const std::map<std::string, std::function<std::string(bool)>> cases = {
    {"diverge", run_diverge},     {"leave", run_leave},
    {"deadlock", run_deadlock},   {"barrier", run_barrier},
    {"warp", run_warp},           {"inactive", run_inactive},
    {"gone", run_gone},           {"caller", run_caller},
    {"async", run_async},         {"misaligned", run_misaligned},
    {"bounds", run_bounds},       {"dynamic", run_dynamic},
    {"global", run_global},       {"uninitialised", run_uninitialised},
    {"redundant", run_redundant}, {"unwaited", run_unwaited},
    {"large", run_large},         {"fragment", run_fragment},
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* run_case(const char* name, int right) {
  thread_local std::string said;
  try {
    said = cases.at(name)(right != 0);
  } catch (const simt::Error& e) {
    said = e.what();
  }
  return said.c_str();
}

int main(int, char** arguments) {
  for (int seed = 0; seed < std::stoi(arguments[3]); ++seed) {
    fastdecode_simt_configure(static_cast<uint64_t>(seed), std::stoi(arguments[4]), 1 + seed % 8);
    std::cout << run_case(arguments[1], std::stoi(arguments[2])) << std::endl;
  }
}
