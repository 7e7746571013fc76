// Argument checks of the adapters: a failed one throws std::invalid_argument, which torch hands on as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastdecode {

template <class... Parts>
[[noreturn]] void fail_arg(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

}  // namespace fastdecode

// FD_CHECK_ARG(lens.size(0) == B, op, ": draft_lens: expected [", B, "], got [", lens.size(0), "]");
#define FD_CHECK_ARG(condition, ...)                       \
  do {                                                     \
    if (!(condition)) ::fastdecode::fail_arg(__VA_ARGS__); \
  } while (false)
