// Running an op's rows on the caller's threads, each thread with a scratch buffer of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu_level.h"
#include "core/exec.h"

namespace fastdecode::FD_ISA {

// Fewer elements than this are not worth waking a thread for: it costs some microseconds, and milliseconds where
// threads that spin share a core.
inline constexpr int64_t kElementsPerThread = 16384;

// Threads that can be at work on `rows` rows of `elements` each, and so the buffers they need.
inline int64_t num_slots(int64_t rows, int64_t elements, const Exec& ex) {
  const int64_t worth = rows * elements / kElementsPerThread;
  return std::max<int64_t>(1, std::min({rows, worth, int64_t{ex.num_threads}}));
}

// Parts into which to cut each row, so that few rows still occupy all threads.
inline int64_t num_parts(int64_t rows, int64_t elements, const Exec& ex) {
  if (rows == 0 || rows >= ex.num_threads) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(ex.num_threads / rows, elements / kElementsPerThread));
}

// body(row, buffer) for every row; `buffer` is the slot's `bytes` of `scratch`. Results must not depend on the slot.
template <class Body>
void for_each_row(const Exec& ex, int64_t rows, int64_t elements, void* scratch, int64_t bytes, const Body& body) {
  const int64_t slots = num_slots(rows, elements, ex);
  auto run_slot = [&](int64_t slot) {
    void* buffer = static_cast<char*>(scratch) + slot * bytes;
    for (int64_t row = slot; row < rows; row += slots) body(row, buffer);
  };
  if (slots == 1) return run_slot(0);
  auto call = [](void* context, int64_t slot) { (*static_cast<decltype(run_slot)*>(context))(slot); };
  ex.parallel_for(slots, call, &run_slot);
}

// Which request a row belongs to, and which of its rows it is. b = -1: nobody's.
struct RowOwner {
  int64_t b, row;
};

// Row r of [batch, rows], or with row_start (rising, [batch + 1]) of flat rows.
FD_HD inline RowOwner owner_of(int64_t r, int64_t rows, const int32_t* row_start, int64_t batch) {
  if (!row_start) return {r / rows, r % rows};
  int64_t low = 0, high = batch + 1;  // row_start[low - 1] <= r < row_start[high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    (row_start[middle] <= r ? low : high) = row_start[middle] <= r ? middle + 1 : middle;
  }
  if (low == 0 || low > batch) return {-1, 0};
  return {low - 1, r - row_start[low - 1]};
}

}  // namespace fastdecode::FD_ISA
