#include "host/ngram_index.h"

#include <algorithm>

#include "core/check.h"

namespace fastdecode {

size_t NgramIndex::EdgeHash::operator()(const Edge& edge) const noexcept {
  uint64_t z = static_cast<uint64_t>(edge.node) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(edge.token);
  z = (z ^ (z >> 30)) *
      0xBF58476D1CE4E5B9u;  // the finaliser of SplitMix64: tokens and nodes are small consecutive numbers
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<size_t>(z ^ (z >> 31));
}

NgramIndex::NgramIndex(int64_t max_ngram, int64_t min_ngram)
    : max_ngram_(max_ngram), min_ngram_(min_ngram), next_{-1}, suffix_{0} {
  FD_CHECK_ARG(1 <= max_ngram && max_ngram <= kMaxNgram, "NgramIndex: max_ngram: expected 1..", kMaxNgram, ", got ",
               max_ngram);
  FD_CHECK_ARG(1 <= min_ngram && min_ngram <= max_ngram, "NgramIndex: min_ngram: expected 1..", max_ngram, ", got ",
               min_ngram);
}

void NgramIndex::extend(std::span<const int64_t> tokens) {
  for (const int64_t token : tokens) {
    const int64_t position = size();
    // only now has the suffix an occurrence that something follows
    for (size_t n = 1; n < suffix_.size(); ++n) next_[static_cast<size_t>(suffix_[n])] = position;
    if (static_cast<int64_t>(suffix_.size()) <= max_ngram_) suffix_.push_back(0);
    // longest first: suffix_[n] grows out of the old suffix_[n - 1]
    for (size_t n = suffix_.size() - 1; n >= 1; --n) {
      const auto [edge, is_new] = children_.try_emplace({suffix_[n - 1], token}, static_cast<int64_t>(next_.size()));
      if (is_new) next_.push_back(-1);
      suffix_[n] = edge->second;
    }
    text_.push_back(token);
  }
}

std::vector<int64_t> NgramIndex::propose(int64_t k) const {
  FD_CHECK_ARG(k >= 0, "NgramIndex.propose: k: expected >= 0, got ", k);
  std::vector<int64_t> copy;
  for (int64_t n = static_cast<int64_t>(suffix_.size()) - 1; n >= min_ngram_; --n) {
    const int64_t next = next_[static_cast<size_t>(suffix_[static_cast<size_t>(n)])];
    if (next < 0) continue;
    const size_t from = static_cast<size_t>(next), available = text_.size() - from;
    copy.reserve(static_cast<size_t>(k));
    for (size_t i = 0; i < static_cast<size_t>(k); ++i)
      copy.push_back(i < available ? text_[from + i] : copy[i - available]);
    break;
  }
  return copy;
}

}  // namespace fastdecode
