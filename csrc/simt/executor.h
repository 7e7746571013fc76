// Runs CUDA kernels on the host, for tests: every thread of a block is a fiber, a seed decides the order in which they
// run, and what CUDA calls undefined is reported. docs/simt.md says what it catches and what it cannot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt/vector_types.h"

namespace fastdecode::simt {

// A fault of a kernel; names the kernel, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Read at each launch. A launch's order depends on `seed` and its own shape only, so a failure repeats.
struct Config {
  uint64_t seed = 0;
  int poison = 0;            // what fills shared memory before each block: 0 large finite numbers, 1 NaN and -1
  int live_blocks = 4;       // 1..8 blocks in flight at once
  std::string skip_barrier;  // "file:line" of a __syncthreads or __syncwarp that does nothing; "" = none
};
Config& config();

// Where a call stands in the kernel's source.
#define FD_SIMT_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Throws Error unless ptr is a multiple of bytes, a power of two.
[[noreturn]] void misaligned(const void* ptr, size_t bytes, const char* file, int line);
inline void check_aligned(const void* ptr, size_t bytes, FD_SIMT_WHERE) {
  if (reinterpret_cast<uintptr_t>(ptr) & (bytes - 1)) misaligned(ptr, bytes, file, line);
}

// Static shared memory: one slot per declaration and template instantiation, the same place in every block's arena.
struct SharedSlot {
  uint64_t launch = 0;  // that `offset` belongs to
  size_t offset = 0;
};
void* shared_memory(SharedSlot& slot, size_t bytes, size_t alignment);
void* dynamic_shared_memory(size_t alignment);

template <class T>
T& shared(SharedSlot& slot) {
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_destructible_v<T>,
                "nothing constructs shared memory");
  return *static_cast<T*>(shared_memory(slot, sizeof(T), alignof(T)));
}

// Lets launches of this kernel have more than 48 KiB of dynamic shared memory.
void allow_shared(const void* kernel, size_t bytes);

// One grid, to its end. body(context) is the kernel with its arguments, called once by each thread.
void run_grid(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
              void* context);

template <class... Parameters, class... Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const void* /*stream: all are in order*/,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((!std::is_reference_v<Parameters> && ...), "a kernel takes its parameters by value");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied as bytes");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;  // converted once, copied into every thread
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  run_grid(
      name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](void* context) {
        const Call& c = *static_cast<Call*>(context);
        std::apply(c.kernel, c.values);
      },
      &call);
}

}  // namespace fastdecode::simt

// The same by ctypes, on the library that holds the kernels. Not to be called during a launch.
extern "C" {
#define FD_SIMT_API __attribute__((visibility("default")))
FD_SIMT_API void fastdecode_simt_configure(uint64_t seed, int poison, int live_blocks);
// The barriers that any launch so far has executed, in the order of their first execution.
FD_SIMT_API int fastdecode_simt_barrier_count();
FD_SIMT_API const char* fastdecode_simt_barrier_site(int i);     // "file:line"; nullptr if there is no i
FD_SIMT_API const char* fastdecode_simt_barrier_kind(int i);     // "__syncthreads" or "__syncwarp"
FD_SIMT_API uint64_t fastdecode_simt_barrier_executions(int i);  // by blocks or warps; not while it is skipped
// Makes that barrier ("file:line") do nothing; nullptr or "" restores all.
FD_SIMT_API void fastdecode_simt_skip_barrier(const char* site);
}
