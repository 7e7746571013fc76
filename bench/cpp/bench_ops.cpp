// Kernel times without Python and torch, by instruction-set level and threads.
//   cmake -S . -B build/cpp -DFASTDECODE_TORCH=OFF -DFASTDECODE_BENCHMARKS=ON && cmake --build build/cpp --parallel
//   build/cpp/bench/cpp/bench_ops --benchmark_filter='sample.*level:4.*threads:1'
// Inputs come in turn from a buffer of twice the last-level cache, so they are read from memory. bytes_per_second and
// per_logit (a time) count the rows that the op has to read. Where the machine is busy, CPU is nearer to the truth than
// Time, for one thread.
#include <benchmark/benchmark.h>
#include <fastdecode/core/exec.h>
#include <fastdecode/sample/row_stats.h>
#include <fastdecode/sample/sample.h>
#include <fastdecode/verify/commit.h>
#include <fastdecode/verify/verify_chain.h>
#include <fastdecode/verify/verify_chain_greedy.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

using namespace fastdecode;
using benchmark::State;

namespace {

// --- threads, each on a processor of its own ------------------------------------------------------------------------

std::vector<int> usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof(set), &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

// The calling thread does i = 0, worker k does i = k + 1. Those who wait sleep after a short spin.
class Pool {
 public:
  explicit Pool(const std::vector<int>& cpus) {
    for (size_t k = 1; k < cpus.size(); ++k)
      workers_.emplace_back(
          [this, k, cpu = cpus[k]](std::stop_token stop) { work(stop, static_cast<int64_t>(k), cpu); });
    pin(cpus[0]);
  }
  ~Pool() {
    for (std::jthread& worker : workers_) worker.request_stop();
    next();
  }
  int32_t size() const { return static_cast<int32_t>(workers_.size()) + 1; }

  void run(int64_t count, void (*body)(void*, int64_t), void* context) {
    count_ = count, body_ = body, context_ = context;
    pending_ = static_cast<int32_t>(workers_.size());
    next();
    body(context, 0);
    for (int32_t left; (left = pending_) != 0;) pending_.wait(left);
  }

 private:
  void next() {
    ++turn_;
    turn_.notify_all();
  }
  void work(const std::stop_token& stop, int64_t i, int cpu) {
    pin(cpu);
    for (int32_t seen = 0;; ++seen) {
      turn_.wait(seen);
      if (stop.stop_requested()) return;
      if (i < count_) body_(context_, i);
      if (--pending_ == 0) pending_.notify_one();
    }
  }

  std::atomic<int32_t> turn_{0}, pending_{0};
  int64_t count_ = 0;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::vector<std::jthread> workers_;
};

Pool& pool() {
  static Pool instance(usable_cpus());
  return instance;
}

Exec make_exec(int64_t level, int64_t threads) {
  Exec exec{.num_threads = static_cast<int32_t>(threads), .cpu_level = static_cast<int32_t>(level)};
  exec.parallel_for = [](int64_t count, void (*body)(void*, int64_t), void* context) {
    pool().run(count, body, context);
  };
  return exec;
}

// --- inputs ---------------------------------------------------------------------------------------------------------

int64_t buffer_elements() {
  const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 32 << 20);
  return 2 * cache / static_cast<int64_t>(sizeof(float));
}

// About normal with standard deviation 2: sums of 12 uniforms.
const std::vector<float>& logits() {
  static const std::vector<float> values = [] {
    std::vector<float> out(buffer_elements());
    uint64_t state = 1;
    for (float& value : out) {
      uint64_t sum = 0;
      for (int i = 0; i < 3; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (state >> 48) + (state >> 32 & 0xffff) + (state >> 40 & 0xffff) + (state >> 52 << 4);
      }
      value = static_cast<float>(static_cast<double>(sum) / 65536 - 6) * 2;
    }
    return out;
  }();
  return values;
}

// The same as weights: e^logit, which sums to more than 1. verify_chain takes probabilities as they are.
const std::vector<float>& probs() {
  static const std::vector<float> values = [] {
    std::vector<float> out = logits();
    for (float& value : out) value = std::exp(value) / 1e6f;
    return out;
  }();
  return values;
}

// Places in the buffer, in turn, with room for `elements`.
class Turns {
 public:
  explicit Turns(int64_t elements) : step_((elements + 1023) / 1024 * 1024), last_(buffer_elements() - step_) {}
  int64_t next() { return at_ = at_ + step_ > last_ ? 0 : at_ + step_; }

 private:
  int64_t step_, last_, at_ = 0;
};

void count_rows(State& state, int64_t rows, int64_t vocab_size) {
  using benchmark::Counter;
  const auto logits = static_cast<double>(state.iterations() * rows * vocab_size);
  state.SetBytesProcessed(static_cast<int64_t>(logits) * static_cast<int64_t>(sizeof(float)));
  state.counters["per_logit"] = Counter(logits, Counter::kIsRate | Counter::kInvert);
}

// --- ops: arguments vocab_size, batch, level, threads
// -----------------------------------------------------------------

void row_stats(State& state) {
  const int64_t vocab_size = state.range(0), batch = state.range(1);
  const Exec exec = make_exec(state.range(2), state.range(3));
  std::vector<float> max(batch), second(batch), logsumexp(batch), entropy(batch);
  std::vector<int64_t> argmax(batch);
  std::vector<int32_t> status(batch);
  RowStatsArgs args{.max = max.data(),
                    .argmax = argmax.data(),
                    .second = second.data(),
                    .logsumexp = logsumexp.data(),
                    .entropy = entropy.data(),
                    .status = status.data(),
                    .batch = batch,
                    .rows = 1,
                    .vocab_size = vocab_size,
                    .batch_stride = vocab_size,
                    .dtype = DType::kFloat32};
  std::vector<std::byte> scratch(cpu::row_stats_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  Turns turns(batch * vocab_size);
  for (auto _ : state) {
    args.logits = logits().data() + turns.next();
    cpu::row_stats(args, exec);
  }
  count_rows(state, batch, vocab_size);
}

void sample(State& state, float temperature, int32_t top_k, float top_p) {
  const int64_t vocab_size = state.range(0), batch = state.range(1);
  const Exec exec = make_exec(state.range(2), state.range(3));
  const std::vector<float> temperatures(batch, temperature), top_ps(batch, top_p);
  const std::vector<int32_t> top_ks(batch, top_k);
  std::vector<int64_t> seed(batch), offset(batch), tokens(batch);
  for (int64_t b = 0; b < batch; ++b) seed[b] = b;
  std::vector<int32_t> status(batch);
  SampleArgs args{.filters = {.temperature = temperatures.data()},
                  .random = {.seed = seed.data(), .offset = offset.data()},
                  .tokens = tokens.data(),
                  .status = status.data(),
                  .batch = batch,
                  .vocab_size = vocab_size,
                  .batch_stride = vocab_size,
                  .dtype = DType::kFloat32};
  if (top_k) args.filters.top_k = top_ks.data();
  if (top_p < 1) args.filters.top_p = top_ps.data();
  std::vector<std::byte> scratch(cpu::sample_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  Turns turns(batch * vocab_size);
  for (auto _ : state) {
    args.logits = logits().data() + turns.next();
    for (int64_t& position : offset) ++position;
    cpu::sample(args, exec);
  }
  count_rows(state, batch, vocab_size);
}

// Ratio rule with 4 drafts, all of them accepted or the first one rejected; batch 1.
void verify_chain(State& state, bool from_probs, bool accepted) {
  constexpr int64_t K = 4;
  const int64_t vocab_size = state.range(0), batch = state.range(1);
  const Exec exec = make_exec(state.range(2), state.range(3));
  const std::vector<double> uniforms(batch * (K + 1), accepted ? 1e-9 : 1 - 1e-9);
  std::vector<int64_t> draft_tokens(batch * K);
  const std::vector<float> temperature(batch, 0.8f);
  std::vector<int64_t> tokens(batch * (K + 1));
  std::vector<int32_t> num_accepted(batch), num_emitted(batch), status(batch);
  VerifyChainArgs args{.draft_tokens = draft_tokens.data(),
                       .target_is_probs = from_probs,
                       .rule = kRuleRatio,
                       .random = {.uniforms = uniforms.data(), .uniform_stride = K + 1},
                       .emit_bonus = true,
                       .tokens = tokens.data(),
                       .num_accepted = num_accepted.data(),
                       .num_emitted = num_emitted.data(),
                       .status = status.data(),
                       .batch = batch,
                       .K = K,
                       .vocab_size = vocab_size,
                       .draft_vocab_size = vocab_size,
                       .draft_stride = K,
                       .draft_prob_stride = K * vocab_size,
                       .draft_prob_row_stride = vocab_size,
                       .target_stride = (K + 1) * vocab_size,
                       .target_row_stride = vocab_size,
                       .dtype = DType::kFloat32,
                       .draft_dtype = DType::kFloat32};
  if (!from_probs) args.filters.temperature = temperature.data();
  std::vector<std::byte> scratch(cpu::verify_chain_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  const auto& target = from_probs ? probs() : logits();
  const int64_t target_elements = batch * (K + 1) * vocab_size;
  Turns turns(target_elements + batch * K * vocab_size);
  bool as_wanted = true;
  for (auto _ : state) {
    const int64_t at = turns.next();
    args.target = target.data() + at;
    args.draft_probs = probs().data() + at + target_elements;
    // an id that the drafter likes and the target does not; some tens of logits to look at
    const float *likes = logits().data() + at + target_elements, *dislikes = logits().data() + at;
    int64_t id = 0;
    while (likes[id] < 2 || dislikes[id] > -2) ++id;
    draft_tokens[0] = id;
    cpu::verify_chain(args, exec);
    as_wanted = as_wanted && num_accepted[0] == (accepted ? K : 0) && status[0] == 0;
  }
  if (!as_wanted) state.SkipWithError("drafts were not accepted or rejected as this benchmark wants");
  // from probabilities: one row after acceptance, two for a residual. From logits: a law per row looked at.
  count_rows(state, batch * (accepted ? (from_probs ? 1 : K + 1) : 2), vocab_size);
}

// Tables of a few integers: what remains is the call. The vocabulary does not matter.
void verify_chain_greedy(State& state) {
  constexpr int64_t K = 4;
  const int64_t batch = state.range(1);
  const Exec exec = make_exec(state.range(2), state.range(3));
  const std::vector<int64_t> draft_tokens(batch * K, 7), target_ids(batch * (K + 1), 7);
  std::vector<int64_t> tokens(batch * (K + 1));
  std::vector<int32_t> num_accepted(batch), num_emitted(batch), status(batch);
  const VerifyChainGreedyArgs args{.draft_tokens = draft_tokens.data(),
                                   .target_ids = target_ids.data(),
                                   .tokens = tokens.data(),
                                   .num_accepted = num_accepted.data(),
                                   .num_emitted = num_emitted.data(),
                                   .status = status.data(),
                                   .batch = batch,
                                   .K = K,
                                   .draft_stride = K,
                                   .target_stride = K + 1};
  for (auto _ : state) {
    cpu::verify_chain_greedy(args, exec);
    benchmark::ClobberMemory();
  }
}

void commit(State& state) {
  constexpr int64_t K1 = 5;
  const int64_t batch = state.range(1);
  const Exec exec = make_exec(state.range(2), state.range(3));
  const std::vector<int64_t> tokens(batch * K1, 7), stop_ids(batch * 2, 9);
  const std::vector<int32_t> num_emitted(batch, K1), max_lengths(batch, 1 << 30);
  std::vector<int32_t> lengths(batch), num_committed(batch), reason(batch);
  std::vector<char> finished(batch);
  const CommitArgs args{.tokens = tokens.data(),
                        .num_emitted = num_emitted.data(),
                        .lengths = lengths.data(),
                        .finished = reinterpret_cast<bool*>(finished.data()),
                        .max_lengths = max_lengths.data(),
                        .stop_ids = stop_ids.data(),
                        .num_committed = num_committed.data(),
                        .reason = reason.data(),
                        .batch = batch,
                        .K1 = K1,
                        .num_stops = 2,
                        .token_stride = K1,
                        .stop_stride = 2};
  for (auto _ : state) {
    std::fill(lengths.begin(), lengths.end(), 0);
    cpu::commit(args, exec);
    benchmark::ClobberMemory();
  }
}

template <class Function, class... Parts>
void add(const std::string& name, const std::vector<int64_t>& vocab_sizes, const std::vector<int64_t>& batches,
         Function function, Parts... parts) {
  auto* entry = benchmark::RegisterBenchmark(name.c_str(), function, parts...);
  entry->ArgNames({"vocab", "batch", "level", "threads"})->Unit(benchmark::kMicrosecond)->UseRealTime();
  std::vector<int64_t> threads{1};
  if (pool().size() > 1) threads.push_back(pool().size());
  for (const int64_t vocab_size : vocab_sizes)
    for (const int64_t batch : batches)
      for (const int64_t level : {1, 3, 4})
        for (const int64_t count : threads)
          if (level <= best_cpu_level()) entry->Args({vocab_size, batch, level, count});
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<int64_t> vocab_sizes{128256, 151936};
  add("row_stats", vocab_sizes, {1, 8}, row_stats);
  add("sample/temperature", vocab_sizes, {1, 8}, sample, 0.8f, 0, 1.0f);
  add("sample/top_k50_top_p0.9", vocab_sizes, {1, 8}, sample, 0.8f, 50, 0.9f);
  add("verify_chain/probs/accepted", vocab_sizes, {1}, verify_chain, true, true);
  add("verify_chain/probs/rejected", vocab_sizes, {1}, verify_chain, true, false);
  add("verify_chain/logits/accepted", vocab_sizes, {1}, verify_chain, false, true);
  add("verify_chain/logits/rejected", vocab_sizes, {1}, verify_chain, false, false);
  add("verify_chain_greedy", {0}, {1, 64}, verify_chain_greedy);
  add("commit", {0}, {1, 64}, commit);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  logits(), probs();  // not in the time of the first benchmark
  benchmark::RunSpecifiedBenchmarks();
}
