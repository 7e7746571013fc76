// A request of verify_chain as a block of kThreads sees it: its drafts, its rows of the target and its randomness.
#pragma once

#include "core/cuda/draw.cuh"
#include "core/cuda/rows.cuh"
#include "verify/verify_chain.h"

namespace fastdecode::FD_ISA {

// What was found out about one row before anything was decided; no other row's fate changes it.
struct Verdict {
  Settled settled;    // of logits
  double prob;        // of the draft, by the target
  double draft_prob;  // of the draft, by the drafter
  int64_t token;      // coupled: the row's draw
  int32_t status;
  bool accepted;  // typical, top_beta
};

// A drafter's probabilities over the target's vocabulary: one of two types, or one-hot at `x` where both are nullptr.
template <class T, class C>
struct DraftRow {
  const T* same;
  const C* wide;
  int64_t x;  // -1: nowhere

  template <int kCount>
  __device__ void read_probs(int v, int vocab_size, C (&out)[kCount]) const {
    if (same) return read(same, v, vocab_size, C(0), out);
    if (wide) return read(wide, v, vocab_size, C(0), out);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = C(0);
  }
};

// The target's rows 0 .. len of every request, each with memory and a verdict of its own: job b * (K + 1) + i.
struct ChainRows {
  VerifyChainArgs a;
  int64_t num_rows, vocab_size, row_bytes, mapped_bytes;

  template <class T>
  __device__ RowView<T> view(int64_t job) const {
    const int64_t b = job / (a.K + 1), i = job % (a.K + 1);
    // no pointer is ever null here: nvcc would no longer know that it is global memory's
    RowView<T> row{b, i, target_row<T>(b, i), {}, {}, valid(b) && i <= len(b)};
    place_row(vocab_size, may_edit(a.filters), row_at(job), row.memory);
    if (row.live) row.filter = row_filter(a.filters, b, i, a.row_start ? a.row_start[b] + i : 0);
    return row;
  }

  FD_HD char* row_at(int64_t job) const { return static_cast<char*>(a.scratch) + job * row_bytes; }
  FD_HD Verdict* verdicts() const { return reinterpret_cast<Verdict*>(row_at(num_rows)); }
  // block: what each row leaves, and its status.
  FD_HD double* lefts() const { return reinterpret_cast<double*>(verdicts() + num_rows); }
  FD_HD int32_t* left_status() const { return reinterpret_cast<int32_t*>(lefts() + num_rows); }
  // Working memory of map_draft, `mapped_bytes` per row (block) or request.
  FD_HD char* mapped_at(int64_t index) const {
    return reinterpret_cast<char*>(left_status()) + (num_rows * 4 + 15) / 16 * 16 + index * mapped_bytes;
  }

  // Behind all of it: the parts of races, over rows (coupled) or for the last tokens of requests.
  FD_HD RacePart* race_parts() const { return reinterpret_cast<RacePart*>(mapped_at(num_rows)); }

  __device__ int64_t len(int64_t b) const { return a.draft_lens ? a.draft_lens[b] : a.K; }
  __device__ bool active(int64_t b) const { return !a.active || a.active[b]; }
  __device__ bool good(int64_t b) const {
    if (len(b) < 0 || len(b) > a.K) return false;
    if (!a.row_start) return true;
    const int64_t first = a.row_start[b], end = a.row_start[b + 1];
    return first >= 0 && end <= a.num_rows && end - first > len(b);
  }
  __device__ bool valid(int64_t b) const { return active(b) && good(b); }

  template <class T>
  __device__ const T* target_row(int64_t b, int64_t i) const {
    const int64_t row = a.row_start ? a.row_start[b] + i : i;
    return static_cast<const T*>(a.target) + b * a.target_stride + row * a.target_row_stride;
  }

  // The draft's id in the target's vocabulary, -1 if there is none.
  __device__ int64_t image(int64_t b, int64_t i) const {
    const int64_t id = a.draft_tokens[b * a.draft_stride + i];
    if (id < 0 || id >= a.draft_vocab_size) return -1;
    const int64_t x = a.draft_to_target ? a.draft_to_target[id] : id;
    return x >= 0 && x < vocab_size ? x : -1;
  }

  __device__ double uniform(int64_t b, int64_t i) const {
    return a.random.uniforms ? a.random.uniforms[b * a.random.uniform_stride + i] : 0.0;
  }
  __device__ Noise noise(int64_t b, int64_t stream, int64_t node, int64_t ahead) const {
    if (!a.random.seed) return Noise(0, 0, stream, node);  // uniforms are used instead, or nothing is drawn
    return Noise(a.random.seed[b], a.random.offset[b] + ahead, stream, node);
  }
  __device__ Draw draw_at(int64_t b, int64_t uniform_index, const Noise& row_noise) const {
    return {a.random.uniforms != nullptr, uniform(b, uniform_index), row_noise};
  }
  __device__ double acceptance(int64_t b, int64_t i) const {
    if (a.random.uniforms) return uniform(b, i);
    return acceptance_uniform(noise(b, kStreamAccept, 0, 0).word(i + 1));  // draft i stands in slot i + 1
  }

  template <class T, class C>
  __device__ DraftRow<T, C> draft_row(int64_t b, int64_t i) const {
    if (!a.draft_probs) return {nullptr, nullptr, image(b, i)};
    const int64_t at = b * a.draft_prob_stride + i * a.draft_prob_row_stride;
    if (a.draft_dtype == a.dtype) return {static_cast<const T*>(a.draft_probs) + at, nullptr, -1};
    return {nullptr, static_cast<const C*>(a.draft_probs) + at, -1};
  }

  // Draft probability of draft id d in row i; by any thread.
  template <class T, class C>
  __device__ double draft_prob_at(int64_t b, int64_t i, int64_t d) const {
    if (!a.draft_probs) return 1;
    const DraftRow<T, C> row = draft_row<T, C>(b, i);
    return static_cast<double>(row.same ? load(row.same[d]) : row.wide[d]);
  }

  // Draft probability of target id x >= 0 in row i.
  template <class T, class C>
  __device__ double draft_prob(BlockSlots& slots, int64_t b, int64_t i, int64_t x) const {
    if (!a.draft_probs || !a.draft_to_target) return draft_prob_at<T, C>(b, i, x);
    double prob = 0;  // several draft ids may mean one id of the target: added in order
    const auto ids = static_cast<int>(a.draft_vocab_size);
    int mine = static_cast<int>(threadIdx.x), next;
    auto find = [&] {
      while (mine < ids && a.draft_to_target[mine] != x) mine += kThreads;
      return mine < ids ? mine : ids;
    };
    while ((next = block_reduce(slots, find(), Smaller{})) < ids) {
      prob += draft_prob_at<T, C>(b, i, next);
      if (mine == next) mine += kThreads;
    }
    return prob;
  }

  // The drafter's row i over the target's vocabulary, written to `buffer`: ids that mean the same are added in order.
  template <class T, class C>
  __device__ DraftRow<T, C> map_draft(int64_t b, int64_t i, char* buffer) const {
    C* const mapped = reinterpret_cast<C*>(buffer);
    int32_t* const last = reinterpret_cast<int32_t*>(mapped + vocab_size);  // draft id that an id was given last
    int32_t* const next = last + vocab_size;                                // and the one it is given now
    const auto ids = static_cast<int>(a.draft_vocab_size);
    for (int64_t v = threadIdx.x; v < vocab_size; v += kThreads) {
      mapped[v] = C(0);
      last[v] = -1;
      next[v] = ids;
    }
    __syncthreads();  // the row is empty
    const DraftRow<T, C> row = draft_row<T, C>(b, i);
    auto for_mapped = [&](const auto& body) {
      for (int d = static_cast<int>(threadIdx.x); d < ids; d += kThreads) {
        const int64_t x = a.draft_to_target[d];
        if (x >= 0 && x < vocab_size) body(d, x);
      }
    };
    // One round per draft id that means the same: one, for most drafters.
    while (true) {
      bool any = false;
      for_mapped([&](int d, int64_t x) {
        if (d <= last[x]) return;
        atomicMin(&next[x], d);
        any = true;
      });
      if (!__syncthreads_or(any)) break;  // and the next of every id is known
      for_mapped([&](int d, int64_t x) {
        if (next[x] != d) return;  // others may read it late: it is never their number
        mapped[x] += static_cast<C>(row.same ? load(row.same[d]) : row.wide[d]);
        last[x] = d;
        next[x] = ids;
      });
      __syncthreads();  // next is free, last and the row are written
    }
    return {nullptr, mapped, -1};
  }

  // The drafter's row i as `residual` wants it; `buffer` for mapped rows.
  template <class T, class C>
  __device__ DraftRow<T, C> draft_of(int64_t b, int64_t i, char* buffer) const {
    return a.draft_probs && a.draft_to_target ? map_draft<T, C>(b, i, buffer) : draft_row<T, C>(b, i);
  }
};

// Smallest target probability that the typical rule accepts.
__device__ inline double typical_threshold(const VerifyChainArgs& a, int64_t b, double entropy) {
  const double eps = a.eps ? a.eps[b] : 0.09f, delta = a.delta ? a.delta[b] : 0.3f;
  const double scaled = delta * exp_minus(entropy > 0 ? entropy : 0.0);
  return scaled < eps ? scaled : eps;
}

// out[j] = (factor * target - draft)+ for the ids whose bit is set, else 0; out comes in with the target's
// probabilities. `bad` is set where a number of these ids is none.
template <int kCount, class T, class C>
__device__ inline void take_away(int v, uint32_t bits, int vocab_size, C factor, const DraftRow<T, C>& draft, bool& bad,
                                 C (&out)[kCount]) {
  C draft_probs[kCount] = {};
  if (bits) draft.read_probs(v, vocab_size, draft_probs);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!(bits >> j & 1)) {
      out[j] = C(0);
      continue;
    }
    bad |= !(out[j] < kInf<C>) || !(draft_probs[j] < kInf<C>);
    const C left = out[j] * factor - draft_probs[j];
    out[j] = left > C(0) && draft.x != v + j ? left : C(0);
  }
}

// The residual as weights, for sums, races and walks: value(v, out).
template <class L, class T, class C>
__device__ inline auto residual_of_law(const L& law, C factor, const DraftRow<T, C>& draft, bool& bad) {
  return [&law, factor, draft, &bad](int v, auto& out) {
    law.weights(v, out);
    for (C& weight : out) weight *= law.inverse_sum();
    constexpr int kCount = sizeof(out) / sizeof(C);
    take_away(v, law.template bits<kCount>(v), law.V, factor, draft, bad, out);
  };
}
template <class T, class C>
__device__ inline auto residual_of_probs(const T* row, int vocab_size, C factor, const DraftRow<T, C>& draft,
                                         bool& bad) {
  return [=, &bad](int v, auto& out) {
    read(row, v, vocab_size, C(0), out);
    constexpr int kCount = sizeof(out) / sizeof(C);
    take_away(v, bits_inside<kCount>(v, vocab_size), vocab_size, factor, draft, bad, out);
  };
}

}  // namespace fastdecode::FD_ISA
