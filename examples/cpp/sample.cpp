// Draws one token from each of four rows of logits. `sample 3` runs the AVX2 build instead of the best one.
#include <fastdecode/sample/row_stats.h>
#include <fastdecode/sample/sample.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace fastdecode;

int main(int argc, char** argv) {
  const int64_t batch = 4, vocab_size = 32000;
  std::vector<float> logits(batch * vocab_size);  // your model's output
  for (int64_t i = 0; i < batch * vocab_size; ++i) logits[i] = static_cast<float>(i * i % 10007) / 1024;

  const std::vector<float> temperature(batch, 0.8f), top_p(batch, 0.9f);
  const std::vector<int32_t> top_k(batch, 50);
  const std::vector<int64_t> seed{1, 2, 3, 4}, position{17, 0, 5, 128};  // a draw depends on these and nothing else
  std::vector<int64_t> tokens(batch), argmax(batch);
  std::vector<int32_t> status(batch);
  std::vector<float> max(batch), second(batch), logsumexp(batch), entropy(batch);

  const Exec exec{.cpu_level = argc > 1 ? std::atoi(argv[1]) : best_cpu_level()};

  RowStatsArgs stats{.logits = logits.data(),
                     .max = max.data(),
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
  std::vector<std::byte> scratch(cpu::row_stats_scratch_bytes(stats, exec));
  stats.scratch = scratch.data();
  cpu::row_stats(stats, exec);

  SampleArgs draw{.logits = logits.data(),
                  .filters = {.temperature = temperature.data(), .top_k = top_k.data(), .top_p = top_p.data()},
                  .random = {.seed = seed.data(), .offset = position.data()},
                  .tokens = tokens.data(),
                  .status = status.data(),
                  .batch = batch,
                  .vocab_size = vocab_size,
                  .batch_stride = vocab_size,
                  .dtype = DType::kFloat32};
  scratch.resize(cpu::sample_scratch_bytes(draw, exec));
  draw.scratch = scratch.data();
  cpu::sample(draw, exec);

  for (int64_t b = 0; b < batch; ++b)
    std::printf("row %d: drew %d, entropy %.9g nats, most likely %d\n", int(b), int(tokens[b]), entropy[b],
                int(argmax[b]));
}
