// Where each n-gram of a growing text occurred last, so that what followed it can be proposed again
// (prompt lookup decoding, Saxena 2023).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace fastdecode {

// One text. N-grams are nodes of a trie whose edges lie in one hash table: the node of the n-gram that ends at a token
// is the child, by that token, of the node of the (n-1)-gram that ended before it. So n-grams are compared exactly, and
// a token costs max_ngram table operations however long the text is.
class NgramIndex {
 public:
  // 1 <= min_ngram <= max_ngram <= kMaxNgram, else std::invalid_argument.
  NgramIndex(int64_t max_ngram, int64_t min_ngram);

  static constexpr int64_t kMaxNgram = 64;

  void extend(std::span<const int64_t> tokens);

  // What followed the most recent earlier occurrence of the longest suffix of min_ngram..max_ngram tokens that occurred
  // before: exactly k tokens, or none if no such suffix did. A copy that reaches the end of the text goes on through
  // the tokens it has just produced, as in LZ77. k < 0 is std::invalid_argument.
  std::vector<int64_t> propose(int64_t k) const;

  int64_t size() const { return static_cast<int64_t>(text_.size()); }

 private:
  struct Edge {
    int64_t node, token;
    bool operator==(const Edge&) const = default;
  };
  struct EdgeHash {
    size_t operator()(const Edge& edge) const noexcept;
  };

  int64_t max_ngram_, min_ngram_;
  std::vector<int64_t> text_;
  std::unordered_map<Edge, int64_t, EdgeHash> children_;
  std::vector<int64_t> next_;  // per node: index of the token after the n-gram's last occurrence that has one, or -1
  std::vector<int64_t>
      suffix_;  // suffix_[n]: node of the text's last n tokens, 0 (the root) for n = 0; as many as there are
};

}  // namespace fastdecode
