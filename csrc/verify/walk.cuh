// The walk over a request's verdicts: how many drafts are kept, and what is left to be drawn. By a block; the same for
// all threads.
#pragma once

#include "verify/verify_chain.cuh"

namespace fastdecode::FD_ISA {

// min(1, w target / draft), 0 for a draft that the target cannot mean or the drafter cannot draw.
__device__ inline double next_weight(double weight, const Verdict& verdict, int64_t x) {
  if (x < 0 || !(verdict.draft_prob > 0)) return 0;
  const double next = weight * verdict.prob / verdict.draft_prob;
  return next < 1.0 ? next : 1.0;
}

// What the walk leaves to be drawn.
enum class Last { kNothing, kToken, kResidual, kBonus, kLossy };

struct Walk {
  int64_t num_accepted = 0;  // drafts emitted
  int64_t row = 0;           // that the last token is drawn from
  int64_t token = -1;        // kToken
  double scale = 1;          // kResidual
  Last last = Last::kNothing;
  int32_t status = 0;
};

__device__ inline Last bonus_of(const VerifyChainArgs& a) {
  if (!a.emit_bonus) return Last::kNothing;
  if (a.rule == kRuleCoupled) return Last::kToken;
  return a.rule == kRuleTypical || a.rule == kRuleTopBeta ? Last::kLossy : Last::kBonus;
}

// Whether a verdict takes so few reads that the walk makes it itself.
FD_HD inline bool judges_in_walk(const VerifyChainArgs& a) {
  return a.target_is_probs && a.rule == kRuleRatio && !a.draft_to_target;
}

// All that decides one draft.
struct Judged {
  Verdict verdict;
  double acceptance;  // its uniform
  double left;        // block
  int64_t x;          // the draft in the target's vocabulary
  int32_t left_status;
};

// Drafts are read this many at once, a thread to each, before the walk comes to them.
inline constexpr int kDraftsAtOnce = 64;

template <class C>
struct ChainShared {
  LawShared<C> law;
  Judged drafts[kDraftsAtOnce];
};

// Hands a request's drafts to the walk, in order, each once.
template <class T, class C = Compute<T>>
class Drafts {
 public:
  __device__ Drafts(const ChainRows& rows, int64_t b, Judged* shared) : rows_(rows), b_(b), shared_(shared) {}

  __device__ const Judged& at(int64_t i) const {
    if (i % kDraftsAtOnce == 0) {
      if (i > 0) __syncthreads();  // the drafts before have been read
      const int64_t mine = i + threadIdx.x;
      if (threadIdx.x < kDraftsAtOnce && mine < rows_.len(b_)) shared_[threadIdx.x] = judged(mine);
      __syncthreads();  // the drafts are there
    }
    return shared_[i % kDraftsAtOnce];
  }

  // On the row after the last draft.
  __device__ Verdict last() const { return rows_.verdicts()[b_ * (rows_.a.K + 1) + rows_.len(b_)]; }

 private:
  __device__ Judged judged(int64_t i) const {
    const VerifyChainArgs& a = rows_.a;
    const int64_t job = b_ * (a.K + 1) + i;
    Judged out{};
    out.x = rows_.image(b_, i);
    if (a.rule == kRuleRatio || a.rule == kRuleBlock) out.acceptance = rows_.acceptance(b_, i);
    if (a.rule == kRuleBlock) {
      out.left = rows_.lefts()[job];
      out.left_status = rows_.left_status()[job];
    }
    if (!judges_in_walk(a)) {
      out.verdict = rows_.verdicts()[job];
    } else if (out.x >= 0) {
      out.verdict.prob = static_cast<double>(load(rows_.template target_row<T>(b_, i)[out.x]));
      if (!(out.verdict.prob < kInf<double>)) out.verdict.status = kStatusNaN;
      out.verdict.draft_prob = rows_.template draft_prob_at<T, C>(b_, i, out.x);
    }
    return out;
  }

  const ChainRows& rows_;
  const int64_t b_;
  Judged* const shared_;
};

// Every rule but block: accept drafts one by one, then one token more.
template <class D>
__device__ inline Walk walk_chain(const ChainRows& rows, int64_t b, const D& drafts) {
  const VerifyChainArgs& a = rows.a;
  const int64_t len = rows.len(b);
  Walk walk;
  for (int64_t i = 0; i < len; ++i) {
    const Judged& draft = drafts.at(i);
    const Verdict& verdict = draft.verdict;
    walk.row = i;
    if (verdict.status) return walk.status |= verdict.status, walk;
    if (draft.x < 0) walk.status |= kStatusUnmappedDraft;
    bool accepted = verdict.accepted;
    if (a.rule == kRuleCoupled) accepted = draft.x >= 0 && draft.x == verdict.token;
    if (a.rule == kRuleRatio) {
      accepted = false;
      if (draft.x >= 0) {
        if (!(verdict.draft_prob < kInf<double>)) return walk.status |= kStatusNaN, walk;
        if (!(verdict.draft_prob > 0)) walk.status |= kStatusZeroDraftProb;
        accepted = verdict.draft_prob > 0 && draft.acceptance * verdict.draft_prob < verdict.prob;
      }
    }
    if (!accepted) {
      walk.token = verdict.token;
      walk.last = a.rule == kRuleCoupled ? Last::kToken : a.rule == kRuleRatio ? Last::kResidual : Last::kLossy;
      return walk;
    }
    ++walk.num_accepted;
  }
  walk.row = len;
  walk.last = bonus_of(a);
  if (walk.last == Last::kNothing || a.target_is_probs) return walk;
  const Verdict verdict = drafts.last();
  walk.status |= verdict.status;
  walk.token = verdict.token;
  return walk;
}

template <class D>
__device__ inline Walk walk_block(const ChainRows& rows, int64_t b, const D& drafts) {
  const int64_t len = rows.len(b);
  Walk walk;
  double weight = 1, before = 0;  // before: the uniform of the draft before
  for (int64_t i = 0; i < len && weight > 0; ++i) {
    const Judged& draft = drafts.at(i);
    const Verdict& verdict = draft.verdict;
    walk.status |= verdict.status ? verdict.status : draft.left_status;
    if (walk.status & kStatusErrors) return walk;
    // the prefix of i drafts, judged by what its next row leaves: u < left / (left + 1 - w), 1 for 0 / 0
    const double whole = draft.left + (1 - weight);
    if (i > 0 && (!(whole > 0) || before * whole < draft.left)) walk.num_accepted = i, walk.scale = weight;
    if (draft.x < 0) {
      walk.status |= kStatusUnmappedDraft;
    } else {
      if (!(verdict.draft_prob < kInf<double>)) return walk.status |= kStatusNaN, walk;
      if (!(verdict.draft_prob > 0)) walk.status |= kStatusZeroDraftProb;
    }
    weight = next_weight(weight, verdict, draft.x);
    if (i + 1 == len && draft.acceptance < weight) walk.num_accepted = len;
    before = draft.acceptance;
  }
  walk.row = walk.num_accepted;
  walk.last = walk.row < len ? Last::kResidual : bonus_of(rows.a);
  if (walk.last == Last::kBonus && !rows.a.target_is_probs) walk.status |= drafts.last().status;
  return walk;
}

template <class T, class C = Compute<T>>
__device__ inline Walk walk_of(const ChainRows& rows, int64_t b, ChainShared<C>& s) {
  const Drafts<T> drafts(rows, b, s.drafts);
  return rows.a.rule == kRuleBlock ? walk_block(rows, b, drafts) : walk_chain(rows, b, drafts);
}

}  // namespace fastdecode::FD_ISA
