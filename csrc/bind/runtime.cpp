#include "bind/runtime.h"

#include <sched.h>

#include <atomic>

#include "bind/device.h"

namespace fastdecode::bind {
namespace {

std::atomic<int32_t>& level() {
  static std::atomic<int32_t> value{best_cpu_level()};
  return value;
}

int64_t best_level() { return best_cpu_level(); }

// Returns the level that was set before.
int64_t set_cpu_level(int64_t wanted) {
  FD_CHECK_ARG(wanted == 1 || wanted == 3 || wanted == 4, "set_cpu_level: level: expected 1, 3 or 4, got ", wanted);
  FD_CHECK_ARG(wanted <= best_cpu_level(), "set_cpu_level: level: expected at most ", best_cpu_level(),
               " on this machine, got ", wanted);
  return level().exchange(static_cast<int32_t>(wanted));
}

// Binds thread i of torch's pool to cpus[i]. Unpinned threads that spin can be stacked on one core for milliseconds.
int64_t pin_threads(std::vector<int64_t> cpus) {
  for (const int64_t cpu : cpus)
    FD_CHECK_ARG(cpu >= 0 && cpu < CPU_SETSIZE, "pin_threads: cpus: expected 0..", CPU_SETSIZE - 1, ", got ", cpu);
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  FD_CHECK_ARG(static_cast<int64_t>(cpus.size()) >= threads, "pin_threads: cpus: expected one for each of ", threads,
               " threads, got ", cpus.size());
  std::atomic<int64_t> pinned{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[begin], &set);
    if (sched_setaffinity(0, sizeof(set), &set) == 0) ++pinned;
  });
  return pinned;
}

}  // namespace

int32_t current_cpu_level() { return level().load(std::memory_order_relaxed); }

}  // namespace fastdecode::bind

STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("best_cpu_level() -> int");
  m.def("set_cpu_level(int level) -> int");
  m.def("pin_threads(int[] cpus) -> int");
}

// No tensor to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, CompositeExplicitAutograd, m) {
  using namespace fastdecode::bind;
  m.impl("best_cpu_level", TORCH_BOX(&best_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
  m.impl("pin_threads", TORCH_BOX(&pin_threads));
}
