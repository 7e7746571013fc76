#include <algorithm>
#include <limits>
#include <type_traits>

#include "core/cuda/device.cuh"
#include "core/cuda/vector.cuh"
#include "core/dtype.h"
#include "sample/penalties.h"

// Three launches. The first copies the logits and clears the counts of those ids that the text holds, no others. The
// second counts. The third overwrites, for every token of the text, the logit of its id: tokens of one id do the same
// work and write the same value, so that nobody has to know which of them is the first.
namespace fastdecode::FD_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksAtOnce = 2048 / kThreads;

// A count is how often the output holds an id. This bit says that drafts hold it too: how often depends on the row.
constexpr uint32_t kDrafted = 0x80000000u;

struct Request {
  bool active, good;  // good: its lengths are in range
  int64_t length, prompt_length;
  const int64_t *tokens, *drafts;
  uint32_t* counts;  // of ids that tokens or drafts hold; others are not initialised
};

__device__ Request request_of(const PenalizeArgs& a, int64_t b) {
  Request r{};
  r.active = !a.active || a.active[b];
  if (!r.active) return r;
  r.length = a.lengths[b], r.prompt_length = a.prompt_lengths ? a.prompt_lengths[b] : 0;
  r.good = r.length >= 0 && r.length <= a.max_length && r.prompt_length >= 0 && r.prompt_length <= r.length;
  r.tokens = a.tokens + b * a.token_stride;
  r.drafts = a.draft_tokens ? a.draft_tokens + b * a.draft_stride : nullptr;
  r.counts = static_cast<uint32_t*>(a.scratch) + b * a.vocab_size;
  return r;
}

__device__ bool is_id(const PenalizeArgs& a, int64_t token) { return token >= 0 && token < a.vocab_size; }

// Blocks of a launch: every `parts` of them share an item, a row or a request.
struct Work {
  int64_t items;
  int parts;

  __host__ __device__ int64_t blocks() const { return items * parts; }
};

struct Share {
  int64_t item;
  int part;
  int64_t first, step;  // the elements of a block's thread, where elements are dealt out one by one
};
__device__ Share share_of(int64_t block, const Work& work) {
  const int64_t item = block / work.parts;
  const int part = static_cast<int>(block - item * work.parts);
  return {item, part, int64_t{part} * kThreads + threadIdx.x, int64_t{work.parts} * kThreads};
}

// --- First: copy rows, clear counts ----------------------------------------------------------------------------------

constexpr int kVectors = 4;  // of 16 bytes of output, per thread
template <class T>
constexpr int kPart = kThreads * kVectors * kPerVector<Compute<T>>;

// Everything is loaded before anything is stored: to the compiler a store may change what the next load finds.
template <class T, class C = Compute<T>>
__device__ void copy(const T* logits, C* out, int vocab_size, int part) {
  constexpr int kWidth = kPerVector<C>;
  const int first = part * kPart<T> + static_cast<int>(threadIdx.x) * kWidth;
  C values[kVectors][kWidth];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) read(logits, first + i * kThreads * kWidth, vocab_size, C(0), values[i]);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) write(out, first + i * kThreads * kWidth, vocab_size, values[i]);
}

template <class T, class C = Compute<T>>
__device__ void copy_row(const PenalizeArgs& a, const Share& share) {
  const int64_t b = share.item / a.rows, row = share.item - b * a.rows;
  const Request r = request_of(a, b);
  const int vocab_size = static_cast<int>(a.vocab_size);
  C* out = static_cast<C*>(a.penalized) + share.item * a.vocab_size;
  if (r.good)
    return copy(static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride, out, vocab_size, share.part);
  const C value = r.active ? std::numeric_limits<C>::quiet_NaN() : C(0);
  const int begin = share.part * kPart<T>;
  const int end = vocab_size - begin < kPart<T> ? vocab_size : begin + kPart<T>;
  for (int v = begin + static_cast<int>(threadIdx.x); v < end; v += kThreads) out[v] = value;
}

__device__ void clear_counts(const PenalizeArgs& a, const Share& share) {
  const Request r = request_of(a, share.item);
  if (share.first == 0) a.status[share.item] = r.active && !r.good ? kStatusBadLength : 0;
  if (!r.good || !penalties_of<float>(a, share.item).any()) return;
  for (int64_t t = share.first; t < r.length; t += share.step)
    if (is_id(a, r.tokens[t])) r.counts[r.tokens[t]] = 0;
  for (int64_t i = share.first; r.drafts && i + 1 < a.rows; i += share.step)
    if (is_id(a, r.drafts[i])) r.counts[r.drafts[i]] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads) penalize_copy_kernel(PenalizeArgs a, Work rows, Work texts) {
  for (int64_t block = blockIdx.x; block < rows.blocks() + texts.blocks(); block += gridDim.x) {
    if (block < texts.blocks()) {
      clear_counts(a, share_of(block, texts));
    } else {
      copy_row<T>(a, share_of(block - texts.blocks(), rows));
    }
  }
}

// --- Second: count ---------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) penalize_count_kernel(PenalizeArgs a, Work texts) {
  for (int64_t block = blockIdx.x; block < texts.blocks(); block += gridDim.x) {
    const Share share = share_of(block, texts);
    const Request r = request_of(a, share.item);
    if (!r.good || !penalties_of<float>(a, share.item).any()) continue;
    for (int64_t t = r.prompt_length + share.first; t < r.length; t += share.step)
      if (is_id(a, r.tokens[t])) atomicAdd(&r.counts[r.tokens[t]], 1u);
    for (int64_t i = share.first; r.drafts && i + 1 < a.rows; i += share.step)
      if (is_id(a, r.drafts[i])) atomicOr(&r.counts[r.drafts[i]], kDrafted);
  }
}

// --- Third: penalise -------------------------------------------------------------------------------------------------

template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, 4) penalize_apply_kernel(PenalizeArgs a, Work rows) {
  for (int64_t block = blockIdx.x; block < rows.blocks(); block += gridDim.x) {
    const Share share = share_of(block, rows);
    const int64_t b = share.item / a.rows, row = share.item - b * a.rows;
    const Request r = request_of(a, b);
    const Penalties<C> penalties = penalties_of<C>(a, b);
    if (!r.good || !penalties.any()) continue;
    const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride;
    C* out = static_cast<C*>(a.penalized) + share.item * a.vocab_size;
    const int64_t num_drafts = r.drafts ? row : 0;
    for (int64_t t = share.first; t < r.length + num_drafts; t += share.step) {
      const int64_t token = t < r.length ? r.tokens[t] : r.drafts[t - r.length];
      if (!is_id(a, token)) continue;
      const uint32_t mark = r.counts[token];
      auto count = static_cast<int32_t>(mark & ~kDrafted);
      for (int64_t i = 0; i < num_drafts && (mark & kDrafted) != 0; ++i) count += r.drafts[i] == token;
      out[token] = penalties.apply(load(logits[token]), count);
    }
  }
}

// Blocks to share `items` texts: one token per thread, as far as the device runs so many blocks at once.
Work text_work(const PenalizeArgs& a, int64_t items, const Exec& ex) {
  const int64_t most = (a.max_length + a.rows + kThreads - 1) / kThreads;
  const int64_t fitting = items == 0 ? 1 : int64_t{ex.num_sms} * kBlocksAtOnce / items;
  return {items, static_cast<int>(std::max<int64_t>(1, std::min(most, fitting)))};
}

bool has_penalties(const PenalizeArgs& a) { return a.repetition || a.presence || a.frequency; }

template <class T>
void run(const PenalizeArgs& a, const Exec& ex) {
  const bool penalized = has_penalties(a);
  const Work rows{a.batch * a.rows, static_cast<int>((a.vocab_size + kPart<T> - 1) / kPart<T>)};
  const Work texts = penalized ? text_work(a, a.batch, ex) : Work{a.batch, 1};
  FD_LAUNCH((penalize_copy_kernel<T>), capped_grid(rows.blocks() + texts.blocks()), kThreads, 0, ex.stream, a, rows,
            texts);
  if (!penalized || rows.items == 0) return;
  FD_LAUNCH(penalize_count_kernel, capped_grid(texts.blocks()), kThreads, 0, ex.stream, a, texts);
  const Work row_texts = text_work(a, rows.items, ex);
  FD_LAUNCH((penalize_apply_kernel<T>), capped_grid(row_texts.blocks()), kThreads, 0, ex.stream, a, row_texts);
}

}  // namespace
}  // namespace fastdecode::FD_ISA

int64_t fastdecode::cuda::penalize_scratch_bytes(const PenalizeArgs& a, const Exec&) {
  return FD_ISA::has_penalties(a) ? a.batch * a.vocab_size * static_cast<int64_t>(sizeof(uint32_t)) : 0;
}

void fastdecode::cuda::penalize(const PenalizeArgs& a, const Exec& ex) {
  using namespace fastdecode::FD_ISA;
  if (a.batch == 0) return;
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}
