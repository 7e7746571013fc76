// How ops on rows of logits are launched: which row a block works on, what it reads, and the scan that comes first.
#pragma once

#include "core/cuda/law.cuh"
#include "core/rows.h"

namespace fastdecode::FD_ISA {

// One row as a block sees it.
template <class T, class C = Compute<T>>
struct RowView {
  int64_t b, row;  // b = -1: the row belongs to no request
  const T* logits;
  RowFilter filter;
  RowMemory<C> memory;
  bool live;  // belongs to an active request
};

// The rows of an op's arguments. Blocks are numbered along x alone, whose limit is 2^31 - 1.
struct LogitRows {
  const void* logits;
  const int32_t* row_start;
  const bool* active;
  FilterArgs filters;
  char* scratch;  // row_bytes of each row, one after the other
  int64_t num_rows, batch, rows_per_request, vocab_size, batch_stride, row_stride, row_bytes;
  bool edits;
  DType dtype;

  FD_HD int64_t bytes() const { return num_rows * row_bytes; }
  // What an op keeps behind the rows' memory.
  template <class Kept>
  FD_HD Kept* behind() const {
    return reinterpret_cast<Kept*>(scratch + bytes());
  }

  template <class T>
  __device__ RowView<T> view(int64_t r) const {
    const RowOwner owner = owner_of(r, rows_per_request, row_start, batch);
    RowView<T> row{owner.b, owner.row, static_cast<const T*>(logits), {}, {}, false};
    row.logits += row_start ? r * row_stride : owner.b * batch_stride + owner.row * row_stride;
    place_row(vocab_size, edits, scratch + r * row_bytes, row.memory);
    row.live = owner.b >= 0 && (!active || active[owner.b]);
    if (row.live) row.filter = row_filter(filters, owner.b, owner.row, r);
    return row;
  }
};

// What the filters may do to any row, as far as the host knows. A temperature, which may be greedy, is not counted: one
// block of a row finds its argmax as fast as several.
FD_HD inline bool may_edit(const FilterArgs& f) { return f.bias || f.num_bans > 0 || f.bitmask; }
inline bool may_cut(const FilterArgs& f) { return f.top_k || f.top_p || f.min_p || f.typical_p; }

// Of an op's arguments that has these fields; `row_start` may be nullptr.
template <class Args>
LogitRows logit_rows(const Args& a, const FilterArgs& filters, const int32_t* row_start, int64_t num_rows,
                     int64_t rows_per_request, int64_t row_stride) {
  const bool edited = may_edit(filters);
  return {a.logits,
          row_start,
          a.active,
          filters,
          static_cast<char*>(a.scratch),
          num_rows,
          a.batch,
          rows_per_request,
          a.vocab_size,
          a.batch_stride,
          row_stride,
          row_memory_bytes(a.vocab_size, edited, a.dtype),
          edited,
          a.dtype};
}

// As kBlocksPerSm, for the scan, which needs fewer registers.
inline constexpr int kScansPerSm = 4;

// The kernels below are for any Rows that counts num_rows of vocab_size logits and gives view<T>(r).
template <class T, class Rows>
__global__ void __launch_bounds__(kThreads, kScansPerSm) scan_kernel(Rows rows, int parts) {
  const RowView<T> view = rows.template view<T>(blockIdx.x / parts);
  if (view.live)
    scan_row(view.logits, static_cast<int>(rows.vocab_size), view.filter, view.memory,
             static_cast<int>(blockIdx.x % parts), parts);
}

// Launches the scan where rows are cut into parts; kernels over whole rows begin with scan_if_alone.
template <class T, class Rows>
void launch_scan(const Rows& rows, int parts, const Exec& ex) {
  if (parts > 1) FD_LAUNCH((scan_kernel<T, Rows>), grid_of(rows.num_rows * parts), kThreads, 0, ex.stream, rows, parts);
}

template <class T, class C>
__device__ inline void scan_if_alone(const RowView<T, C>& view, int vocab_size, int parts) {
  if (parts > 1) return;
  scan_row(view.logits, vocab_size, view.filter, view.memory, 0, 1);
  __syncthreads();  // block_max and values are written
}

// The tiles' sums of laws that nothing cuts, a row's parts to as many blocks. After the scan.
template <class T, class Rows, class C = Compute<T>>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<C>) weigh_kernel(Rows rows, int parts) {
  FD_SHARED(LawShared<C>, s);
  const RowView<T> view = rows.template view<T>(blockIdx.x / parts);
  if (!view.live) return;
  with_law(view.logits, static_cast<int>(rows.vocab_size), view.filter, view.memory, s,
           [&](auto& law) { law.weigh(static_cast<int>(blockIdx.x % parts), parts); });
}

template <class T, class Rows>
void launch_weigh(const Rows& rows, int parts, const Exec& ex) {
  FD_LAUNCH((weigh_kernel<T, Rows>), grid_of(rows.num_rows * parts), kThreads, 0, ex.stream, rows, parts);
}

}  // namespace fastdecode::FD_ISA
