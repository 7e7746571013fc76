// Every op on hostile sizes and rows: each instruction-set build, thread count, layout of the inputs and former content
// of the outputs must give the same bytes. Every buffer is exactly as large as its contract says, so that a build under
// AddressSanitizer and UBSan stops at the first step outside.
//   kernels                      runs all
//   kernels overrun 1|3|4        must be stopped by AddressSanitizer: reads one logit too many
//   kernels short-output 1|3|4   by AddressSanitizer, too: writes one byte too many
//   kernels misaligned 1|3|4     by UBSan: logits at an odd address
#include <fastdecode/attention/merge_states.h>
#include <fastdecode/attention/paged_attention.h>
#include <fastdecode/attention/prefix_attention.h>
#include <fastdecode/core/exec.h>
#include <fastdecode/gemv/linear.h>
#include <fastdecode/kvquant/kv_append.h>
#include <fastdecode/kvquant/kv_dequant.h>
#include <fastdecode/kvquant/kv_flush.h>
#include <fastdecode/kvquant/kv_keep.h>
#include <fastdecode/kvquant/kv_report.h>
#include <fastdecode/sample/apply_token_bitmask.h>
#include <fastdecode/sample/penalize.h>
#include <fastdecode/sample/row_stats.h>
#include <fastdecode/sample/sample.h>
#include <fastdecode/sample/target_probs.h>
#include <fastdecode/sample/token_logprobs.h>
#include <fastdecode/sample/topk_logits.h>
#include <fastdecode/tree/tree_check.h>
#include <fastdecode/tree/tree_mask.h>
#include <fastdecode/verify/commit.h>
#include <fastdecode/verify/verify_chain.h>
#include <fastdecode/verify/verify_chain_greedy.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <thread>
#include <vector>

using namespace fastdecode;
using Bytes = std::vector<std::byte>;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

struct Case {
  int64_t batch, rows, vocab_size;
  DType dtype;
  int variant = 0;         // which optional arguments are given
  bool strided = false;    // rows with gaps of NaN or of a bad id between them
  std::byte before{0xaa};  // what outputs hold before the call
};

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
};

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
DType compute(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// Multiples of 1/8 below 32 and of 1/256 below 1 are exact in every dtype.
void put(Bytes& to, int64_t index, DType dtype, double value) {
  std::byte* at = to.data() + index * size_of(dtype);
  const auto single = static_cast<float>(value);
  if (dtype == DType::kFloat64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == DType::kFloat32) {
    std::memcpy(at, &single, 4);
  } else if (dtype == DType::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const auto high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(at, &high, 2);
  } else {
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
    uint16_t bits = std::isnan(value)   ? 0x7e00
                    : std::isinf(value) ? 0x7c00
                    : value == 0        ? 0
                                        : static_cast<uint16_t>((exponent + 14) << 10 | int(fraction * 2048 - 1024));
    if (std::signbit(value)) bits |= 0x8000;
    std::memcpy(at, &bits, 2);
  }
}

struct Rows {
  Bytes data;
  int64_t batch_stride, row_stride;
};

// [batch, rows, vocab_size]; the kinds of rows take turns.
Rows make_rows(const Case& c, int64_t rows, DType dtype, uint64_t seed, bool probs) {
  Random random{seed};
  const int64_t V = c.vocab_size;
  Rows out{.data = {}, .batch_stride = 0, .row_stride = V + 3 * c.strided};
  out.batch_stride = rows * out.row_stride + 5 * c.strided;
  const int64_t elements = c.batch && rows ? (c.batch - 1) * out.batch_stride + (rows - 1) * out.row_stride + V : 0;
  out.data.resize(elements * size_of(dtype));
  for (int64_t i = 0; i < elements; ++i) put(out.data, i, dtype, kNaN);
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t kind = (3 * b + row) % 8, special = random.below(V);
      for (int64_t v = 0; v < V; ++v) {
        const auto noise = static_cast<double>(random.below(511) - 255);
        double value = probs ? std::fabs(noise) / 256 : noise / 8;
        if (kind == 1) value = probs ? std::floor(value * 2) / 2 : std::floor(value / 16);  // ties
        if (kind == 2) value = 0.5;
        if (kind == 3) value = v == special ? 0.25 : probs ? 0 : -kInf;
        if (kind == 4) value = probs ? 0 : -kInf;
        if (kind == 5 && v == special) value = kNaN;
        if (kind == 6 && v == special) value = kInf;
        put(out.data, b * out.batch_stride + row * out.row_stride + v, dtype, value);
      }
    }
  }
  return out;
}

// [batch, n] integers of one type with a stride of their own.
template <class T>
struct Table {
  std::vector<T> data;
  int64_t stride;
};

template <class T, class Value>
Table<T> make_table(const Case& c, int64_t n, const Value& value) {
  Table<T> out{.data = {}, .stride = n + 2 * c.strided};
  out.data.assign(c.batch ? (c.batch - 1) * out.stride + n : 0, static_cast<T>(77));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t i = 0; i < n; ++i) out.data[b * out.stride + i] = static_cast<T>(value(b, i));
  return out;
}

// Output buffers of exact sizes; `all` is their content after the call.
class Outputs {
 public:
  explicit Outputs(std::byte before) : before_(before) {}
  template <class T>
  T* add(int64_t count) {
    return static_cast<T*>(add_bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* add_bytes(int64_t bytes) {
    buffers_.emplace_back(bytes, before_);
    return buffers_.back().data();
  }
  Bytes all() const {
    Bytes joined;
    for (const Bytes& buffer : buffers_) joined.insert(joined.end(), buffer.begin(), buffer.end());
    return joined;
  }

 private:
  std::byte before_;
  std::vector<Bytes> buffers_;
};

// active bool [batch], or nullptr
struct Active {
  std::vector<char> bytes;
  const bool* data;
  explicit Active(const Case& c)
      : bytes(c.batch), data(c.variant % 2 ? reinterpret_cast<bool*>(bytes.data()) : nullptr) {
    for (int64_t b = 0; b < c.batch; ++b) bytes[b] = b % 4 != 2;
  }
};

// Where each request's rows begin among `total` flat ones: uneven, some of nobody; or, in every third case, nonsense.
std::vector<int32_t> make_row_start(const Case& c, int64_t total) {
  std::vector<int32_t> starts{1};
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t next = starts.back() + (b % 4 == 3 ? 0 : c.rows + b % 2);
    starts.push_back(static_cast<int32_t>(std::min(next, std::max<int64_t>(total, 1))));
  }
  if (c.vocab_size % 3 == 0)
    for (size_t i = 0; i < starts.size(); ++i) starts[i] = i % 2 ? -5 : std::numeric_limits<int32_t>::max();
  return starts;
}

// The same number of rows, as [batch * rows, vocab_size].
Case flatten(Case c) {
  c.batch *= c.rows;
  c.rows = 1;
  return c;
}

// Filters with values at and past their limits. `given` 0: none; 1: cuts; 2: bias and bans, too; 3: all.
struct Filters {
  std::vector<float> temperature, top_p, min_p, typical_p;
  std::vector<int32_t> top_k;
  std::vector<int64_t> offset, seed;
  Table<float> bias;
  Table<int64_t> bans, min_lengths;
  Table<int32_t> bitmask;
  FilterArgs args;

  Filters(const Case& c, int given, int64_t rows = 1, bool flat = false)
      : bias(make_table<float>(c, c.vocab_size, [](int64_t b, int64_t v) { return (b + v) % 9 ? 0.5 : -kInf; })),
        bans(make_table<int64_t>(c, 3,
                                 [&](int64_t b, int64_t i) { return i == 2 ? -1 : (b + i) % (c.vocab_size + 1); })),
        min_lengths(make_table<int64_t>(c, 3, [](int64_t b, int64_t i) { return b + 5 * i; })) {
    for (int64_t b = 0; b < c.batch; ++b) {
      temperature.push_back(std::vector<float>{0.8f, 0.0f, 1.0f, float(kNaN), 1e-30f, float(kInf)}[b % 6]);
      top_k.push_back(std::vector<int32_t>{0, 50, 1, -3, 1 << 30}[b % 5]);
      top_p.push_back(std::vector<float>{0.9f, 1.0f, 0.0f, 1e-6f, 0.5f}[(b + 1) % 5]);
      min_p.push_back(std::vector<float>{0.0f, 0.1f, 1.0f, 2.0f}[(b / 2) % 4]);
      typical_p.push_back(std::vector<float>{0.9f, 1.0f, 0.0f, 0.2f}[(b / 3) % 4]);
      offset.push_back(b % 3 ? b : std::numeric_limits<int64_t>::max() - 64);
      seed.push_back(b % 3 ? b : -1);
    }
    args.offset = offset.data();
    if (given == 0) return;
    args.temperature = temperature.data(), args.top_k = top_k.data();
    args.top_p = top_p.data(), args.min_p = min_p.data();
    if (given == 1) return;
    args.bias = bias.data.data(), args.bias_stride = bias.stride;
    args.ban_ids = bans.data.data(), args.num_bans = 3, args.ban_stride = bans.stride;
    args.min_lengths = min_lengths.data.data(), args.min_length_stride = min_lengths.stride;
    if (given == 2) return;
    args.typical_p = typical_p.data(), args.order = kOrderJoint;
    const int64_t words = (c.vocab_size + 31) / 32, masks = flat ? 1 : rows;
    Random random{14};
    bitmask = make_table<int32_t>(flat ? flatten({c.batch, rows, 1, c.dtype, 0, c.strided}) : c, masks * words,
                                  [&](int64_t, int64_t) { return static_cast<int32_t>(random.next()); });
    args.bitmask = bitmask.data.data();
    (flat ? args.bitmask_flat_stride : args.bitmask_stride) = bitmask.stride;
    if (!flat) args.bitmask_row_stride = words;
  }
};

// Lengths 0..K and one outside.
Table<int32_t> make_lens(const Case& c, int64_t K) {
  return make_table<int32_t>(c, 1, [=](int64_t b, int64_t) {
    return b % 5 == 4 ? K + 1 : b % 7 == 6 ? -1 : b % (K + 1);
  });
}

double uniform(int64_t b, int64_t i) {
  return std::vector<double>{0.25, 1e-300, std::nextafter(1.0, 0.0), 0.5, 0.75}[(b + 2 * i) % 5];
}

Bytes run_row_stats(const Case& c, const Exec& exec) {
  const Rows logits = make_rows(c, c.rows, c.dtype, 1, false);
  const Active active(c);
  const int64_t rows = c.batch * c.rows, bytes = rows * size_of(compute(c.dtype));
  Outputs out(c.before);
  RowStatsArgs args{.logits = logits.data.data(),
                    .active = active.data,
                    .max = out.add_bytes(bytes),
                    .argmax = out.add<int64_t>(rows),
                    .second = out.add_bytes(bytes),
                    .logsumexp = out.add_bytes(bytes),
                    .entropy = out.add_bytes(bytes),
                    .status = out.add<int32_t>(rows),
                    .batch = c.batch,
                    .rows = c.rows,
                    .vocab_size = c.vocab_size,
                    .batch_stride = logits.batch_stride,
                    .row_stride = logits.row_stride,
                    .dtype = c.dtype};
  Bytes scratch(cpu::row_stats_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::row_stats(args, exec);
  return out.all();
}

Bytes run_penalize(const Case& c, const Exec& exec) {
  const int64_t V = c.vocab_size, max_length = std::vector<int64_t>{0, 1, 40, 700}[c.variant];
  Case dense = c;
  dense.strided = false;
  const Rows logits = make_rows(c, c.rows, c.dtype, 11, false);
  const auto tokens = make_table<int64_t>(
      c, max_length, [=](int64_t b, int64_t i) { return i % 7 == 6 ? (i % 2 ? V : -1) : (b + i * i) % V; });
  const auto lengths = make_lens(dense, max_length);
  const auto prompts = make_table<int32_t>(
      dense, 1, [&](int64_t b, int64_t) { return b % 8 == 7 ? lengths.data[b] + 1 : lengths.data[b] / 2; });
  const auto drafts = make_table<int64_t>(c, c.rows - 1, [=](int64_t b, int64_t i) { return (b + i) % (V + 1); });
  const auto factor =
      make_table<float>(dense, 1, [](int64_t b, int64_t) { return std::vector<double>{1.3, 1, 0.5, 0, -1}[b % 5]; });
  const Active active(c);
  Outputs out(c.before);
  PenalizeArgs args{.logits = logits.data.data(),
                    .tokens = tokens.data.data(),
                    .lengths = lengths.data.data(),
                    .prompt_lengths = c.variant % 2 ? prompts.data.data() : nullptr,
                    .draft_tokens = c.variant > 1 ? drafts.data.data() : nullptr,
                    .repetition = factor.data.data(),
                    .presence = factor.data.data(),
                    .frequency = factor.data.data(),
                    .active = active.data,
                    .penalized = out.add_bytes(c.batch * c.rows * V * size_of(compute(c.dtype))),
                    .status = out.add<int32_t>(c.batch),
                    .batch = c.batch,
                    .rows = c.rows,
                    .vocab_size = V,
                    .max_length = max_length,
                    .batch_stride = logits.batch_stride,
                    .row_stride = logits.row_stride,
                    .token_stride = tokens.stride,
                    .draft_stride = drafts.stride,
                    .dtype = c.dtype};
  Bytes scratch(cpu::penalize_scratch_bytes(args, exec), c.before);
  args.scratch = scratch.data();
  cpu::penalize(args, exec);
  return out.all();
}

Bytes run_apply_token_bitmask(const Case& c, const Exec& exec) {
  const bool indexed = c.variant > 1;
  const int64_t rows = indexed ? 1 : c.rows, V = c.vocab_size, words = c.variant == 1 ? V / 32 : (V + 31) / 32;
  Rows logits = make_rows(c, rows, c.dtype, 12, false);
  Random random{13};
  // [batch, rows, words], rows next to each other; with indices every other one of them is for a row
  const auto masks =
      make_table<int32_t>(c, rows * words, [&](int64_t, int64_t) { return static_cast<int32_t>(random.next()); });
  Case dense = c;
  dense.strided = false;
  const auto indices = make_table<int32_t>(dense, 1, [&](int64_t b, int64_t) {
    return b % 4 == 3 ? c.batch : b % 4 == 2 ? -1 : b / 2;
  });
  const Active active(c);
  cpu::apply_token_bitmask({.logits = logits.data.data(),
                            .bitmask = masks.data.data(),
                            .indices = indexed ? indices.data.data() : nullptr,
                            .active = active.data,
                            .indexed = indexed,
                            .batch = c.batch,
                            .rows = rows,
                            .vocab_size = V,
                            .words = words,
                            .num_indices = indexed ? c.batch : 0,
                            .batch_stride = logits.batch_stride,
                            .row_stride = logits.row_stride,
                            .mask_stride = masks.stride,
                            .mask_row_stride = words,
                            .dtype = c.dtype},
                           exec);
  Bytes changed;
  const int64_t bytes = size_of(c.dtype);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t row = 0; row < rows; ++row) {
      const auto begin = logits.data.begin() + (b * logits.batch_stride + row * logits.row_stride) * bytes;
      changed.insert(changed.end(), begin, begin + V * bytes);
    }
  return changed;
}

Bytes run_topk_logits(const Case& c, const Exec& exec) {
  const Rows logits = make_rows(c, c.rows, c.dtype, 15, false);
  const Active active(c);
  const int64_t rows = c.batch * c.rows,
                k = std::min<int64_t>(c.vocab_size, std::vector<int64_t>{1, 5, 300, 1 << 20}[c.variant]);
  Outputs out(c.before);
  TopkLogitsArgs args{.logits = logits.data.data(),
                      .active = active.data,
                      .values = out.add_bytes(rows * k * size_of(compute(c.dtype))),
                      .ids = out.add<int64_t>(rows * k),
                      .status = out.add<int32_t>(rows),
                      .batch = c.batch,
                      .rows = c.rows,
                      .vocab_size = c.vocab_size,
                      .k = k,
                      .batch_stride = logits.batch_stride,
                      .row_stride = logits.row_stride,
                      .dtype = c.dtype};
  Bytes scratch(cpu::topk_logits_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::topk_logits(args, exec);
  return out.all();
}

Bytes run_target_probs(const Case& c, const Exec& exec) {
  const bool flat = c.variant > 3;
  const int64_t rows = c.batch * c.rows;
  const Rows logits = flat ? make_rows(flatten(c), 1, c.dtype, 2, false) : make_rows(c, c.rows, c.dtype, 2, false);
  const std::vector<int32_t> row_start = make_row_start(c, rows);
  const Active active(c);
  const Filters filters(c, c.variant % 4, c.rows, flat);
  Outputs out(c.before);
  TargetProbsArgs args{.logits = logits.data.data(),
                       .row_start = flat ? row_start.data() : nullptr,
                       .filters = filters.args,
                       .active = active.data,
                       .probs = out.add_bytes(rows * c.vocab_size * size_of(compute(c.dtype))),
                       .status = out.add<int32_t>(rows),
                       .batch = c.batch,
                       .rows = flat ? rows : c.rows,
                       .vocab_size = c.vocab_size,
                       .batch_stride = flat ? 0 : logits.batch_stride,
                       .row_stride = flat ? logits.batch_stride : logits.row_stride,
                       .dtype = c.dtype};
  Bytes scratch(cpu::target_probs_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::target_probs(args, exec);
  return out.all();
}

Bytes run_sample(const Case& c, const Exec& exec) {
  const Rows logits = make_rows(c, 1, c.dtype, 3, false);
  const Active active(c);
  const Filters filters(c, c.variant % 4);
  const auto uniforms = make_table<double>(c, 1, uniform);
  RandomArgs random{.seed = filters.seed.data(), .offset = filters.offset.data()};
  if (c.variant > 3) random = {.uniforms = uniforms.data.data(), .uniform_stride = uniforms.stride};
  Outputs out(c.before);
  SampleArgs args{.logits = logits.data.data(),
                  .filters = filters.args,
                  .random = random,
                  .active = active.data,
                  .tokens = out.add<int64_t>(c.batch),
                  .status = out.add<int32_t>(c.batch),
                  .batch = c.batch,
                  .vocab_size = c.vocab_size,
                  .batch_stride = logits.batch_stride,
                  .stream = kStreamUser,
                  .node = (1 << 24) - 1,
                  .dtype = c.dtype};
  Bytes scratch(cpu::sample_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::sample(args, exec);
  return out.all();
}

Bytes run_token_logprobs(const Case& c, const Exec& exec) {
  const bool flat = c.variant > 3;
  const Rows logits = flat ? make_rows(flatten(c), 1, c.dtype, 4, false) : make_rows(c, c.rows, c.dtype, 4, false);
  const int64_t V = c.vocab_size, rows = c.batch * c.rows, bytes = size_of(compute(c.dtype));
  const std::vector<int32_t> row_start = make_row_start(c, rows);
  const auto token = [=](int64_t b, int64_t i) { return std::vector<int64_t>{V - 1, -1, 0, V, -2}[(b + i) % 5]; };
  Case one = c;
  one.batch = 1, one.strided = false;
  const auto tokens = flat ? make_table<int64_t>(one, rows, token) : make_table<int64_t>(c, c.rows, token);
  const int64_t top = std::min<int64_t>(V, std::vector<int64_t>{0, 1, 5, 300}[c.variant % 4]);
  const Active active(c);
  const Filters filters(c, (c.variant + 1) % 4, c.rows, flat);
  Outputs out(c.before);
  TokenLogprobsArgs args{.logits = logits.data.data(),
                         .tokens = tokens.data.data(),
                         .row_start = flat ? row_start.data() : nullptr,
                         .filters = filters.args,
                         .active = active.data,
                         .logprobs = out.add_bytes(rows * bytes),
                         .top_ids = out.add<int64_t>(rows * top),
                         .top_logprobs = out.add_bytes(rows * top * bytes),
                         .status = out.add<int32_t>(rows),
                         .batch = c.batch,
                         .rows = flat ? rows : c.rows,
                         .vocab_size = V,
                         .top = top,
                         .batch_stride = flat ? 0 : logits.batch_stride,
                         .row_stride = flat ? logits.batch_stride : logits.row_stride,
                         .token_stride = flat ? 1 : tokens.stride,
                         .dtype = c.dtype};
  Bytes scratch(cpu::token_logprobs_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::token_logprobs(args, exec);
  return out.all();
}

struct Verification {
  Rule rule;
  bool from_probs = false, drafted = false, uniforms = false;
  int filters = 0;
  bool flat = false, mapped = false;  // ragged rows; a vocabulary of the drafter's own
  Bonus bonus = kBonusGreedy;
};

constexpr Verification kVerifications[] = {
    {.rule = kRuleRatio, .drafted = true, .filters = 1},
    {.rule = kRuleRatio, .from_probs = true, .drafted = true, .uniforms = true},
    {.rule = kRuleRatio, .from_probs = true, .flat = true},
    {.rule = kRuleRatio, .drafted = true, .uniforms = true, .filters = 3, .flat = true, .mapped = true},
    {.rule = kRuleRatio, .filters = 2},
    {.rule = kRuleCoupled, .filters = 3},
    {.rule = kRuleCoupled, .uniforms = true, .flat = true, .mapped = true},
    {.rule = kRuleBlock, .from_probs = true, .drafted = true, .uniforms = true},
    {.rule = kRuleBlock, .drafted = true, .filters = 3, .mapped = true},
    {.rule = kRuleBlock, .uniforms = true, .filters = 1, .flat = true},
    {.rule = kRuleTypical, .filters = 1, .flat = true},
    {.rule = kRuleTypical, .from_probs = true, .uniforms = true, .mapped = true, .bonus = kBonusSample},
    {.rule = kRuleTopBeta},
    {.rule = kRuleTopBeta, .flat = true, .mapped = true},
};

Bytes run_verify_chain(const Case& c, const Exec& exec) {
  const Verification& v = kVerifications[c.variant];
  const int64_t V = c.vocab_size, K = c.rows - 1, draft_V = v.mapped ? V / 2 + 1 : V, rows = c.batch * (K + 1);
  const DType draft_dtype = c.variant % 2 ? compute(c.dtype) : c.dtype;
  Case dense = c, drafts = c;
  dense.strided = false;  // draft_lens has no stride
  drafts.vocab_size = draft_V;
  const auto lens = make_lens(dense, K);
  const auto draft_tokens = make_table<int64_t>(
      c, K, [=](int64_t b, int64_t i) { return b % 6 == 5 ? (i % 2 ? draft_V : -1) : (7 * b + 3 * i) % draft_V; });
  std::vector<int64_t> draft_to_target(draft_V);
  for (int64_t d = 0; d < draft_V; ++d)
    draft_to_target[d] = d % 5 == 4 ? -1 : d % 11 == 10 ? V : std::min(2 * d, V - 1);
  const Rows target =
      v.flat ? make_rows(flatten(c), 1, c.dtype, 5, v.from_probs) : make_rows(c, K + 1, c.dtype, 5, v.from_probs);
  const Rows draft = make_rows(drafts, K, draft_dtype, 6, true);
  const std::vector<int32_t> row_start = make_row_start(c, rows);
  const Filters filters(c, v.filters, K + 1, v.flat);
  const auto eps = make_table<float>(dense, 1, [](int64_t b, int64_t) { return b % 3 ? 0.09 : 0; });
  const auto delta = make_table<float>(dense, 1, [](int64_t b, int64_t) { return b % 4 ? 0.3 : 2; });
  const auto beta = make_table<int32_t>(dense, 1, [=](int64_t b, int64_t) { return b % 4 ? b : V + 1; });
  const auto tau = make_table<float>(dense, 1, [](int64_t b, int64_t) { return b % 3 ? 1.5 : 0; });
  const Active active(c);
  const auto uniforms = make_table<double>(c, K + 1, uniform);
  RandomArgs random{.seed = filters.seed.data(), .offset = filters.offset.data()};
  if (v.uniforms) random = {.uniforms = uniforms.data.data(), .uniform_stride = uniforms.stride};
  const bool typical = v.rule == kRuleTypical, top_beta = v.rule == kRuleTopBeta;
  Outputs out(c.before);
  VerifyChainArgs args{.draft_tokens = draft_tokens.data.data(),
                       .draft_probs = v.drafted ? draft.data.data() : nullptr,
                       .draft_lens = c.variant % 3 ? lens.data.data() : nullptr,
                       .draft_to_target = v.mapped ? draft_to_target.data() : nullptr,
                       .target = target.data.data(),
                       .row_start = v.flat ? row_start.data() : nullptr,
                       .target_is_probs = v.from_probs,
                       .rule = v.rule,
                       .filters = filters.args,
                       .eps = typical ? eps.data.data() : nullptr,
                       .delta = typical ? delta.data.data() : nullptr,
                       .bonus = v.bonus,
                       .beta = top_beta ? beta.data.data() : nullptr,
                       .tau = top_beta ? tau.data.data() : nullptr,
                       .random = random,
                       .active = active.data,
                       .emit_bonus = c.variant % 4 != 3,
                       .tokens = out.add<int64_t>(c.batch * (K + 1)),
                       .num_accepted = out.add<int32_t>(c.batch),
                       .num_emitted = out.add<int32_t>(c.batch),
                       .status = out.add<int32_t>(c.batch),
                       .batch = c.batch,
                       .K = K,
                       .vocab_size = V,
                       .draft_vocab_size = draft_V,
                       .num_rows = rows,
                       .draft_stride = draft_tokens.stride,
                       .draft_prob_stride = draft.batch_stride,
                       .draft_prob_row_stride = draft.row_stride,
                       .target_stride = v.flat ? 0 : target.batch_stride,
                       .target_row_stride = v.flat ? target.batch_stride : target.row_stride,
                       .dtype = c.dtype,
                       .draft_dtype = draft_dtype};
  Bytes scratch(cpu::verify_chain_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::verify_chain(args, exec);
  return out.all();
}

Bytes run_verify_chain_greedy(const Case& c, const Exec& exec) {
  const int64_t K = c.vocab_size - 1;
  Case dense = c;
  dense.strided = false;
  const auto lens = make_lens(dense, K);
  const auto draft_tokens = make_table<int64_t>(c, K, [](int64_t b, int64_t i) { return (b + i) % 64; });
  const auto target_ids = make_table<int64_t>(c, K + 1, [](int64_t b, int64_t i) {
    return i == 100 + b ? -1 : i == 5 * b ? 64 : (b + i) % 64;
  });
  const Active active(c);
  Outputs out(c.before);
  const VerifyChainGreedyArgs args{.draft_tokens = draft_tokens.data.data(),
                                   .target_ids = target_ids.data.data(),
                                   .draft_lens = c.variant ? lens.data.data() : nullptr,
                                   .active = active.data,
                                   .tokens = out.add<int64_t>(c.batch * (K + 1)),
                                   .num_accepted = out.add<int32_t>(c.batch),
                                   .num_emitted = out.add<int32_t>(c.batch),
                                   .status = out.add<int32_t>(c.batch),
                                   .batch = c.batch,
                                   .K = K,
                                   .draft_stride = draft_tokens.stride,
                                   .target_stride = target_ids.stride};
  cpu::verify_chain_greedy(args, exec);
  return out.all();
}

Bytes run_commit(const Case& c, const Exec& exec) {
  const int64_t K1 = c.vocab_size;
  Case dense = c;
  dense.strided = false;
  const auto emitted = make_lens(dense, K1);
  const auto tokens = make_table<int64_t>(c, K1, [](int64_t b, int64_t i) { return (b + i) % 100; });
  const auto stops = make_table<int64_t>(c, 2, [](int64_t b, int64_t i) { return i ? -1 : 40 * b; });
  const auto caps = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 3 ? b * 50 : 0; });
  Outputs out{std::byte{0}};  // lengths and finished are read, too
  auto* lengths = out.add<int32_t>(c.batch);
  auto* finished = out.add<bool>(c.batch);
  for (int64_t b = 0; b < c.batch; ++b) lengths[b] = static_cast<int32_t>(2 * b), finished[b] = b % 6 == 3;
  Outputs written(c.before);
  const CommitArgs args{.tokens = tokens.data.data(),
                        .num_emitted = emitted.data.data(),
                        .lengths = lengths,
                        .finished = finished,
                        .max_lengths = c.variant % 2 ? caps.data.data() : nullptr,
                        .stop_ids = c.variant < 2 ? stops.data.data() : nullptr,
                        .num_committed = written.add<int32_t>(c.batch),
                        .reason = written.add<int32_t>(c.batch),
                        .batch = c.batch,
                        .K1 = K1,
                        .num_stops = c.variant < 2 ? 2 : 0,
                        .token_stride = tokens.stride,
                        .stop_stride = stops.stride};
  cpu::commit(args, exec);
  Bytes all = out.all();
  for (const std::byte byte : written.all()) all.push_back(byte);
  return all;
}

Bytes run_linear(const Case& c, const Exec& exec) {
  const int64_t M = c.batch, N = c.vocab_size, K = std::vector<int64_t>{65, 1, 0, 64, 17, 3}[c.variant];
  const int64_t panels = (N + kPanel - 1) / kPanel;
  Case x_shape = c, weight_shape = c, residual_shape = c, bias_shape = c;
  x_shape.vocab_size = std::max<int64_t>(K, 1);
  weight_shape.strided = false, weight_shape.batch = 1,
  weight_shape.vocab_size = std::max<int64_t>(panels * K * kPanel, 1);
  bias_shape.batch = 1;
  const Rows x = make_rows(x_shape, 1, c.dtype, 7, true), weight = make_rows(weight_shape, 1, c.dtype, 8, true);
  const Rows bias = make_rows(bias_shape, 1, c.dtype, 9, true),
             residual = make_rows(residual_shape, 1, c.dtype, 10, true);
  Outputs out(c.before);
  const LinearArgs args{.x = x.data.data(),
                        .weight = weight.data.data(),
                        .bias = c.variant % 2 ? bias.data.data() : nullptr,
                        .residual = c.variant > 1 ? residual.data.data() : nullptr,
                        .y = out.add_bytes(M * N * size_of(c.dtype)),
                        .M = M,
                        .N = N,
                        .K = K,
                        .x_stride = x.batch_stride,
                        .residual_stride = residual.batch_stride,
                        .dtype = c.dtype};
  cpu::linear(args, exec);
  return out.all();
}

// Chains, stars and trees between them; one broken tree in five.
Table<int32_t> make_parents(const Case& c, int64_t slots) {
  return make_table<int32_t>(c, slots, [&](int64_t b, int64_t i) {
    if (b % 5 == 4 && i == slots / 2) return i;
    return i == 0 ? -1 : b % 3 == 0 ? i - 1 : b % 3 == 1 ? 0 : (i - 1) / 2;
  });
}

Bytes run_tree_check(const Case& c, const Exec& exec) {
  const int64_t N = c.vocab_size - 1;
  Case dense = c;
  dense.strided = false;
  const auto count = make_lens(dense, N);
  const auto parents = make_parents(c, N);
  Outputs out(c.before);
  cpu::tree_check({.parents = parents.data.data(),
                   .num_nodes = c.variant ? count.data.data() : nullptr,
                   .code = out.add<int32_t>(c.batch),
                   .batch = c.batch,
                   .num_slots = N,
                   .parent_stride = parents.stride},
                  exec);
  return out.all();
}

Bytes run_tree_mask(const Case& c, const Exec& exec) {
  const int64_t N = std::min(c.vocab_size - 1, kMaxTreeSlots);
  Case dense = c;
  dense.strided = false;
  const auto count = make_lens(dense, N);
  const auto parents = make_parents(c, N);
  Outputs out(c.before);
  cpu::tree_mask({.parents = parents.data.data(),
                  .num_nodes = c.variant ? count.data.data() : nullptr,
                  .mask = out.add<int32_t>(c.batch * N * ((N + 31) / 32)),
                  .depths = out.add<int32_t>(c.batch * N),
                  .batch = c.batch,
                  .num_slots = N,
                  .parent_stride = parents.stride},
                 exec);
  return out.all();
}

// Keys or values of a cache, tokens of a page before heads, no gaps; and how large its three buffers are.
struct StoreSizes {
  int64_t data, scale, tail;
};

StoreSizes lay_out(const KVPages& p, bool is_key, KVStore& s) {
  const int64_t bits = code_bits(p.scheme), H = p.num_heads, D = p.head_dim, groups = D / p.group;
  const int64_t width = bits ? D * bits / 8 : D, each = bits ? 1 : size_of(p.dtype);
  const bool fp8 = p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2;
  s.token_stride = H * width, s.head_stride = width, s.page_stride = p.page_size * H * width;
  s.scale_head_stride = fp8 ? groups : 2 * groups, s.scale_token_stride = H * s.scale_head_stride;
  s.scale_page_stride = p.page_size * s.scale_token_stride;
  StoreSizes sizes{p.num_pages * s.page_stride * each, p.num_pages * s.scale_page_stride * (fp8 ? 4 : 2), 0};
  if (p.scheme == kKVPlain) sizes.scale = 0;
  if (p.static_scale) {
    s.scale_page_stride = s.scale_token_stride = 0, s.scale_head_stride = 1;
    sizes.scale = H * 4;
  }
  if (!is_kivi(p.scheme)) return sizes;
  if (is_key) {
    s.token_stride = 0, s.head_stride = D * p.page_size * bits / 8, s.page_stride = H * s.head_stride;
    s.scale_token_stride = 0, s.scale_head_stride = p.page_size / p.group * 2 * D;
    s.scale_page_stride = H * s.scale_head_stride;
    sizes.scale = p.num_pages * s.scale_page_stride * 2;
  }
  s.tail_head_stride = D, s.tail_token_stride = H * D, s.tail_batch_stride = p.tail_size * H * D;
  sizes.tail = p.tail_batch * s.tail_batch_stride * size_of(p.tail_dtype);
  return sizes;
}

enum class KVOp { kAppend, kFlush, kKeep, kDequant, kReport };

// One op on a cache, after those that fill it. The variant is the scheme, with and without rotation.
template <KVOp kOp>
Bytes run_kv(const Case& c, const Exec& exec) {
  constexpr int64_t kTableWidth = 4;
  const auto scheme = static_cast<KVScheme>(kOp == KVOp::kFlush ? kKVKivi4 + c.variant / 2 : c.variant / 2);
  const bool rotates = c.variant % 2, kivi = is_kivi(scheme);
  const int64_t B = c.batch, H = 2, Hq = 3, D = 8 * (1 + c.vocab_size % 17), count = std::min<int64_t>(7 * c.rows, 16);
  KVPages p{.num_pages = B * kTableWidth, .page_size = kivi ? 16 : 5, .num_heads = H, .head_dim = D};
  p.scheme = scheme, p.group = kivi || c.rows == 3 ? 8 : D, p.tail_batch = kivi ? B : 0, p.tail_size = kivi ? 16 : 0;
  p.dtype = p.tail_dtype = c.rows == 3 ? DType::kFloat16 : c.dtype, p.static_scale = rotates && c.rows == 3;
  p.static_scale = p.static_scale && (scheme == kKVFp8E4M3 || scheme == kKVFp8E5M2);
  Outputs cache{std::byte{0x11}};
  for (KVStore* s : {&p.k, &p.v}) {
    const StoreSizes sizes = lay_out(p, s == &p.k, *s);
    s->data = cache.add_bytes(sizes.data);
    s->scale = cache.add_bytes(sizes.scale);
    s->tail = cache.add_bytes(sizes.tail);
    for (int64_t h = 0; p.static_scale && h < H; ++h) static_cast<float*>(s->scale)[h] = 0.25f;
  }
  Case shape = c, dense = c;
  shape.batch = B * count, shape.vocab_size = D, dense.strided = false;
  const Rows k = make_rows(shape, H, c.dtype, 21, false), v = make_rows(shape, H, c.dtype, 22, false);
  Rows q = make_rows(shape, Hq, c.dtype, 23, false);
  const auto table = make_table<int32_t>(
      c, kTableWidth, [](int64_t b, int64_t i) { return b % 8 == 7 && i == 1 ? -1 : kTableWidth * b + (i ^ 3); });
  std::vector<int64_t> slots, positions;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t in_page = (kTableWidth * b + (t / p.page_size ^ 3)) * p.page_size + t % p.page_size;
      slots.push_back(t == 9 ? -1 : b == 2 && t == 3 ? 1 << 20 : kivi ? b * p.tail_size + t : in_page);
      positions.push_back(b == 3 && t == 2 ? 32 : t);
    }
  const DType wide = compute(c.dtype);
  Bytes rope(32 * D * size_of(wide));
  for (int64_t i = 0; i < 32 * D; ++i) put(rope, i, wide, static_cast<double>(i % 17 - 8) / 8);
  Outputs out(c.before);
  cpu::kv_append({.k = k.data.data(),
                  .v = v.data.data(),
                  .slots = slots.data(),
                  .q = rotates ? q.data.data() : nullptr,
                  .rope = rotates ? rope.data() : nullptr,
                  .positions = rotates ? positions.data() : nullptr,
                  .status = out.add<int32_t>(B * count),
                  .pages = p,
                  .num_tokens = B * count,
                  .num_q_heads = rotates ? Hq : 0,
                  .num_positions = rotates ? 32 : 0,
                  .k_token_stride = k.batch_stride,
                  .k_head_stride = k.row_stride,
                  .v_token_stride = v.batch_stride,
                  .v_head_stride = v.row_stride,
                  .q_token_stride = q.batch_stride,
                  .q_head_stride = q.row_stride,
                  .dtype = c.dtype,
                  .positions_are_32 = false,
                  .interleaved = c.rows == 3},
                 exec);
  const auto begin = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 4 == 3 ? 8 : b % 5 == 4; });
  const auto end = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 3 == 2 ? 0 : 16; });
  if (kivi && kOp != KVOp::kAppend && kOp != KVOp::kKeep) {
    cpu::kv_flush({.pages = p,
                   .page_table = table.data.data(),
                   .begin = begin.data.data(),
                   .end = end.data.data(),
                   .status = out.add<int32_t>(B),
                   .batch = B,
                   .max_pages = kTableWidth,
                   .page_table_stride = table.stride},
                  exec);
  }
  const auto path =
      make_table<int32_t>(c, 4, [](int64_t b, int64_t i) { return b % 6 == 5 ? 3 - i : i * (i + 1) / 2; });
  const auto num_keep = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 7 == 6 ? 5 : 4; });
  const auto base = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 3 + 1; });
  if (kOp == KVOp::kKeep) {
    cpu::kv_keep({.pages = p,
                  .path = path.data.data(),
                  .num_keep = num_keep.data.data(),
                  .page_table = kivi ? nullptr : table.data.data(),
                  .base_lens = base.data.data(),
                  .status = out.add<int32_t>(B),
                  .batch = B,
                  .max_keep = 4,
                  .max_pages = kTableWidth,
                  .page_table_stride = table.stride,
                  .path_stride = path.stride},
                 exec);
  }
  const auto lens = make_table<int32_t>(dense, 1, [=](int64_t b, int64_t) { return b % 5 == 4 ? 99 : count - b % 3; });
  const auto tails = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 4; });
  const int32_t* tail_lens = kivi && rotates ? tails.data.data() : nullptr;
  if (kOp == KVOp::kDequant) {
    cpu::kv_dequant({.pages = p,
                     .page_table = table.data.data(),
                     .kv_lens = lens.data.data(),
                     .tail_lens = tail_lens,
                     .k = out.add_bytes(B * count * H * D * size_of(c.dtype)),
                     .v = out.add_bytes(B * count * H * D * size_of(c.dtype)),
                     .status = out.add<int32_t>(B),
                     .batch = B,
                     .length = count,
                     .max_pages = kTableWidth,
                     .page_table_stride = table.stride,
                     .dtype = c.dtype},
                    exec);
  }
  if (kOp == KVOp::kReport) {
    cpu::kv_report({.k = k.data.data(),
                    .v = v.data.data(),
                    .pages = p,
                    .page_table = table.data.data(),
                    .kv_lens = lens.data.data(),
                    .tail_lens = tail_lens,
                    .errors = out.add<double>(2 * B * H * 3),
                    .status = out.add<int32_t>(B),
                    .batch = B,
                    .length = count,
                    .max_pages = kTableWidth,
                    .page_table_stride = table.stride,
                    .k_batch_stride = count * k.batch_stride,
                    .k_token_stride = k.batch_stride,
                    .k_head_stride = k.row_stride,
                    .v_batch_stride = count * v.batch_stride,
                    .v_token_stride = v.batch_stride,
                    .v_head_stride = v.row_stride,
                    .dtype = c.dtype},
                   exec);
  }
  Bytes all = out.all();
  for (const std::byte byte : cache.all()) all.push_back(byte);
  for (int64_t i = 0; i < B * count * Hq; ++i) {  // q without what lies between its rows
    const auto* row = q.data.data() + (i / Hq * q.batch_stride + i % Hq * q.row_stride) * size_of(c.dtype);
    all.insert(all.end(), row, row + D * size_of(c.dtype));
  }
  return all;
}

// Attention to a cache of any bytes that are numbers. The variant is the scheme; odd: with a tree, or a window.
template <bool kPrefix>
Bytes run_attention(const Case& c, const Exec& exec) {
  const auto scheme = static_cast<KVScheme>(c.variant / 2);
  const bool odd = c.variant % 2, kivi = is_kivi(scheme);
  const int64_t B = c.batch, H = 2, Hq = 6, N = c.rows, D = 16 * (1 + c.vocab_size % 3);
  const int64_t page_size = kivi ? 16 : 5, length = std::clamp<int64_t>(c.vocab_size, 3, 150), room = length + 40;
  const int64_t max_pages = (room + page_size - 1) / page_size;
  KVPages p{.num_pages = B * max_pages, .page_size = page_size, .num_heads = H, .head_dim = D};
  p.scheme = scheme, p.group = kivi ? 8 : D, p.tail_batch = kivi ? B : 0, p.tail_size = kivi ? 16 : 0;
  p.dtype = p.tail_dtype = odd ? DType::kBFloat16 : c.dtype;
  p.static_scale = odd && (scheme == kKVFp8E4M3 || scheme == kKVFp8E5M2);
  Outputs cache{std::byte{0}};
  for (KVStore* s : {&p.k, &p.v}) {
    const StoreSizes sizes = lay_out(p, s == &p.k, *s);
    auto fill = [](int64_t bytes, DType dtype, double low, double high) {
      Bytes made(bytes);
      for (int64_t i = 0; i < bytes / size_of(dtype); ++i) put(made, i, dtype, i % 7 ? low * (i % 5) : high);
      return made;
    };
    auto keep = [&](const Bytes& made) {
      void* to = cache.add_bytes(made.size());
      if (!made.empty()) std::memcpy(to, made.data(), made.size());
      return to;
    };
    const bool fp8 = scheme == kKVFp8E4M3 || scheme == kKVFp8E5M2;
    Bytes codes(sizes.data);
    for (int64_t i = 0; i < sizes.data; ++i) codes[i] = static_cast<std::byte>(fp8 ? i * 7 % 96 : i * 89 % 251);
    s->data = keep(scheme == kKVPlain ? fill(sizes.data, p.dtype, 0.25, -1.5) : codes);
    s->scale = keep(fill(sizes.scale, fp8 ? DType::kFloat32 : DType::kFloat16, 0.015625, 0.125));
    s->tail = keep(fill(sizes.tail, p.tail_dtype, 0.5, -0.25));
  }
  const int64_t rows = kPrefix ? B * N + 1 : B * N;
  Case shape = c, dense = c;
  shape.batch = rows, shape.vocab_size = D, dense.strided = false;
  const Rows q = make_rows(shape, Hq, c.dtype, 31, true);
  const auto table = make_table<int32_t>(c, max_pages, [&](int64_t b, int64_t i) {
    if (b % 7 == 5 && i == 0) return int64_t{-1};
    return i * page_size < length ? b * max_pages + (max_pages - 1 - i) : int64_t{1} << 30;
  });
  const auto lens = make_table<int32_t>(dense, 1, [&](int64_t b, int64_t) { return b % 6 == 4 ? -1 : length - b % 3; });
  const auto tails = make_table<int32_t>(dense, 1, [](int64_t b, int64_t) { return b % 3; });
  const auto counts =
      make_table<int32_t>(dense, 1, [&](int64_t b, int64_t) { return b % 4 == 3 ? 0 : std::min(N, length - b % 3); });
  std::vector<int32_t> starts(B + 1), masks(B * N);
  for (int64_t i = 0; i <= B; ++i) starts[i] = static_cast<int32_t>(i * N);
  for (int64_t i = 0; i < B * N; ++i) masks[i] = static_cast<int32_t>(1 << i % N | 1);
  Outputs out(c.before), sums(c.before);
  const int64_t head_rows = rows * Hq;
  if constexpr (kPrefix) {
    PrefixAttentionArgs a{.q = q.data.data(),
                          .pages = p,
                          .group_start = starts.data(),
                          .page_table = table.data.data(),
                          .prefix_lens = lens.data.data(),
                          .out = sums.add_bytes(head_rows * D * size_of(c.dtype)),
                          .lse = sums.add_bytes(head_rows * size_of(compute(c.dtype))),
                          .status = out.add<int32_t>(B),
                          .scratch = nullptr,
                          .num_rows = rows,
                          .num_groups = B,
                          .num_q_heads = Hq,
                          .max_pages = max_pages,
                          .page_table_stride = table.stride,
                          .q_row_stride = q.batch_stride,
                          .q_head_stride = q.row_stride,
                          .scale = 0.25,
                          .softcap = odd ? 8.0 : 0.0,
                          .dtype = c.dtype};
    Bytes scratch(cpu::prefix_attention_scratch_bytes(a, exec));
    a.scratch = scratch.data();
    cpu::prefix_attention(a, exec);
  } else {
    PagedAttentionArgs a{.q = q.data.data(),
                         .pages = p,
                         .page_table = table.data.data(),
                         .kv_lens = lens.data.data(),
                         .num_queries = counts.data.data(),
                         .tail_lens = kivi ? tails.data.data() : nullptr,
                         .coded_lens = nullptr,
                         .tree_mask = odd ? masks.data() : nullptr,
                         .out = sums.add_bytes(head_rows * D * size_of(c.dtype)),
                         .lse = sums.add_bytes(head_rows * size_of(compute(c.dtype))),
                         .status = out.add<int32_t>(B),
                         .scratch = nullptr,
                         .batch = B,
                         .num_slots = N,
                         .num_q_heads = Hq,
                         .max_pages = max_pages,
                         .page_table_stride = table.stride,
                         .q_batch_stride = N * q.batch_stride,
                         .q_slot_stride = q.batch_stride,
                         .q_head_stride = q.row_stride,
                         .window = odd ? 0 : 40,
                         .scale = 0.25,
                         .softcap = 0,
                         .causal = true,
                         .dtype = c.dtype};
    Bytes scratch(cpu::paged_attention_scratch_bytes(a, exec));
    a.scratch = scratch.data();
    cpu::paged_attention(a, exec);
  }
  Bytes all = out.all();
  if (c.dtype == DType::kBFloat16) return all;  // AVX-512 has products of its own
  for (const std::byte byte : sums.all()) all.push_back(byte);
  return all;
}

Bytes run_merge_states(const Case& c, const Exec& exec) {
  const int64_t rows = c.batch * c.rows, heads = 2, states = 1 + 5 * c.variant;
  Case shape = c;
  shape.batch = rows, shape.strided = false;
  std::vector<Rows> outs, lses;
  MergeStatesArgs a{};
  for (int64_t i = 0; i < states; ++i) {
    outs.push_back(make_rows(shape, heads, c.dtype, 41 + i, true));
    Case one = shape;
    one.vocab_size = heads;
    lses.push_back(make_rows(one, 1, compute(c.dtype), 61 + i, false));
  }
  for (int64_t i = 0; i < states; ++i) a.outs[i] = outs[i].data.data(), a.lses[i] = lses[i].data.data();
  Outputs out(c.before);
  a.out = out.add_bytes(rows * heads * c.vocab_size * size_of(c.dtype));
  a.lse = out.add_bytes(rows * heads * size_of(compute(c.dtype)));
  a.num_states = states, a.num_rows = rows, a.num_heads = heads, a.head_dim = c.vocab_size, a.dtype = c.dtype;
  cpu::merge_states(a, exec);
  return out.all();
}

struct Op {
  const char* name;
  Bytes (*run)(const Case&, const Exec&);
  int variants;
  bool wide_only = false;  // no 16-bit dtypes
};

constexpr Op kOps[] = {
    {"row_stats", run_row_stats, 2},
    {"penalize", run_penalize, 4},
    {"apply_token_bitmask", run_apply_token_bitmask, 4},
    {"topk_logits", run_topk_logits, 4},
    {"target_probs", run_target_probs, 8},
    {"sample", run_sample, 8},
    {"token_logprobs", run_token_logprobs, 8},
    {"verify_chain", run_verify_chain, std::size(kVerifications)},
    {"verify_chain_greedy", run_verify_chain_greedy, 2, true},
    {"commit", run_commit, 4, true},
    {"linear", run_linear, 6, true},
    {"kv_append", run_kv<KVOp::kAppend>, 14},
    {"kv_flush", run_kv<KVOp::kFlush>, 4},
    {"kv_keep", run_kv<KVOp::kKeep>, 14},
    {"kv_dequant", run_kv<KVOp::kDequant>, 14},
    {"kv_report", run_kv<KVOp::kReport>, 14},
    {"paged_attention", run_attention<false>, 14},
    {"prefix_attention", run_attention<true>, 14},
    {"merge_states", run_merge_states, 4},
    {"tree_check", run_tree_check, 2, true},
    {"tree_mask", run_tree_mask, 2, true},
};

void run_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::vector<std::jthread> threads;
  for (int64_t i = 1; i < count; ++i) threads.emplace_back(body, context, i);
  body(context, 0);
}

int64_t check(const Op& op, const Case& first) {
  const Bytes expected = op.run(first, Exec{});
  int64_t runs = 1;
  for (const int32_t level : {1, 3, 4}) {
    if (level > best_cpu_level()) break;
    for (const bool changed : {false, true}) {
      Case c = first;
      Exec exec{.cpu_level = level};
      if (changed) {
        c.strided = true, c.before = std::byte{0x55};
        exec.parallel_for = run_threads, exec.num_threads = 3;
      }
      ++runs;
      if (op.run(c, exec) == expected) continue;
      std::printf("%s: batch %d, rows %d, vocab_size %d, dtype %d, variant %d: other bytes at level %d%s\n", op.name,
                  int(c.batch), int(c.rows), int(c.vocab_size), int(c.dtype), c.variant, level,
                  changed ? " with strides, other output contents, three threads" : "");
      std::exit(1);
    }
  }
  return runs;
}

void check_all() {
  for (const Op& op : kOps) {
    int64_t runs = 0;
    for (int variant = 0; variant < op.variants; ++variant)
      for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        if (op.wide_only && size_of(dtype) < 4) continue;
        for (const int64_t vocab_size : {1, 2, 63, 64, 65, 2047, 2048, 2049})
          for (const int64_t batch : {0, 1, 9})
            for (const int64_t rows : {1, 3}) runs += check(op, {batch, rows, vocab_size, dtype, variant});
        runs += check(op, {24, 1, 2049, dtype, variant});  // enough work for three threads, in rows
        runs += check(op, {1, 1, 50000, dtype, variant});  // and in parts of one row
      }
    std::printf("%s: %d runs\n", op.name, int(runs));
  }
}

void break_contract(const std::string& how, int32_t level) {
  std::vector<float> logits(65), values(4);
  Bytes argmax(how == "short-output" ? 7 : 8);
  int32_t status;
  const Exec exec{.cpu_level = level};
  const std::byte* begin = reinterpret_cast<std::byte*>(logits.data()) + (how == "misaligned");
  RowStatsArgs args{.logits = begin, .max = &values[0], .second = &values[1]};
  args.argmax = reinterpret_cast<int64_t*>(argmax.data());
  args.logsumexp = &values[2], args.entropy = &values[3], args.status = &status;
  args.batch = args.rows = 1, args.dtype = DType::kFloat32;
  args.vocab_size = how == "overrun" ? 66 : 64;
  Bytes scratch(cpu::row_stats_scratch_bytes(args, exec));
  args.scratch = scratch.data();
  cpu::row_stats(args, exec);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) {
    break_contract(argv[1], std::atoi(argv[2]));
  } else {
    check_all();
  }
}
