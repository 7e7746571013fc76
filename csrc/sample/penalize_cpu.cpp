#include <limits>

#include "core/dtype.h"
#include "core/rows.h"
#include "sample/penalties.h"

namespace fastdecode::FD_ISA {
namespace {

// The ids of one request's text and how often its output holds each. `mark` has a slot per id of the vocabulary, and
// only the slots of ids that begin() was shown hold anything: 0 = not in the text, n + 1 = n times in the output.
class Counts {
 public:
  Counts(void* buffer, int64_t vocab_size)
      : vocab_size_(vocab_size), mark_(static_cast<int32_t*>(buffer)), seen_(mark_ + vocab_size) {}

  void begin(const int64_t* tokens, int64_t length, int64_t prompt_length, const int64_t* drafts, int64_t num_drafts) {
    num_seen_ = 0;
    for (int64_t t = 0; t < length; ++t)
      if (is_id(tokens[t])) mark_[tokens[t]] = 0;
    for (int64_t i = 0; i < num_drafts; ++i)
      if (is_id(drafts[i])) mark_[drafts[i]] = 0;
    for (int64_t t = 0; t < length; ++t) add(tokens[t], t >= prompt_length);
  }

  void add(int64_t token, bool is_output) {
    if (!is_id(token)) return;
    int32_t& mark = mark_[token];
    if (mark == 0) seen_[num_seen_++] = static_cast<int32_t>(token), mark = 1;
    mark += is_output;
  }

  template <class Body>
  void for_each_seen(const Body& body) const {
    for (int64_t k = 0; k < num_seen_; ++k) body(seen_[k], mark_[seen_[k]] - 1);
  }

 private:
  bool is_id(int64_t token) const { return token >= 0 && token < vocab_size_; }

  int64_t vocab_size_, num_seen_ = 0;
  int32_t* mark_;
  int32_t* seen_;  // ids with mark > 0, in order of appearance
};

int64_t counts_bytes(const PenalizeArgs& a) {
  const int64_t most_seen = std::min(a.vocab_size, a.max_length + a.rows);
  return (a.vocab_size + most_seen) * static_cast<int64_t>(sizeof(int32_t));
}

template <class T, class C = Compute<T>>
void run(const PenalizeArgs& a, const Exec& ex) {
  const int64_t num_rows = a.batch * a.rows;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.lengths[b], prompt = a.prompt_lengths ? a.prompt_lengths[b] : 0;
    const bool good = length >= 0 && length <= a.max_length && prompt >= 0 && prompt <= length;
    a.status[b] = good || (a.active && !a.active[b]) ? 0 : kStatusBadLength;
  }
  // Neighbouring rows to one thread: a request's text is then counted once for all its rows on that thread.
  const int64_t slots = num_slots(num_rows, a.vocab_size, ex);
  auto run_slot = [&](int64_t slot) {
    Counts counts(static_cast<char*>(a.scratch) + slot * counts_bytes(a), a.vocab_size);
    int64_t counted = -1;  // the request that counts holds
    for (int64_t r = num_rows * slot / slots; r < num_rows * (slot + 1) / slots; ++r) {
      const int64_t b = r / a.rows, row = r % a.rows;
      C* out = static_cast<C*>(a.penalized) + r * a.vocab_size;
      const bool active = !a.active || a.active[b];
      if (!active || a.status[b]) {
        std::fill_n(out, a.vocab_size, active ? std::numeric_limits<C>::quiet_NaN() : C(0));
        continue;
      }
      const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride + row * a.row_stride;
      for (int64_t v = 0; v < a.vocab_size; ++v) out[v] = load(logits[v]);
      const Penalties<C> penalties = penalties_of<C>(a, b);
      if (!penalties.any()) continue;
      const int64_t* drafts = a.draft_tokens ? a.draft_tokens + b * a.draft_stride : nullptr;
      if (counted != b) {
        counts.begin(a.tokens + b * a.token_stride, a.lengths[b], a.prompt_lengths ? a.prompt_lengths[b] : 0, drafts,
                     drafts ? a.rows - 1 : 0);
        for (int64_t i = 0; drafts && i + 1 < row; ++i) counts.add(drafts[i], true);
        counted = b;
      }
      if (drafts && row > 0) counts.add(drafts[row - 1], true);
      counts.for_each_seen([&](int64_t id, int32_t count) { out[id] = penalties.apply(load(logits[id]), count); });
    }
  };
  if (slots == 1) return run_slot(0);
  auto call = [](void* context, int64_t slot) { (*static_cast<decltype(run_slot)*>(context))(slot); };
  ex.parallel_for(slots, call, &run_slot);
}

}  // namespace

void penalize(const PenalizeArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::penalize_scratch_bytes(const PenalizeArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(a.batch * a.rows, a.vocab_size, ex) * FD_ISA::counts_bytes(a);
}
#endif
FD_CPU_OP(penalize, PenalizeArgs)
