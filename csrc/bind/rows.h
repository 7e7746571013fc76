// Adapter pieces shared by the ops on rows of logits: shapes [B, V] or [B, n, V], filters, randomness.
#pragma once

#include "bind/device.h"
#include "core/draw.h"
#include "core/filter.h"

namespace fastdecode::bind {

// Rows of logits or probabilities: [B, V], [B, n, V], or flat [R, V] with row_start [B + 1], and the leading shape of
// the op's outputs.
struct Rows {
  DType dtype;
  int64_t batch, rows, vocab_size, batch_stride, row_stride;
  const int32_t* row_start = nullptr;  // flat: request b has rows row_start[b] .. row_start[b + 1] - 1 of `rows`
  bool three;                          // the caller's tensor had three dimensions

  Rows(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high,
       const OptionalTensor& starts = std::nullopt)
      : dtype(check_rows(op, name, t, starts ? 2 : low, starts ? 2 : high)),
        batch(t.size(0)),
        rows(t.dim() == 3 ? t.size(1) : 1),
        vocab_size(t.size(t.dim() - 1)),
        batch_stride(stride_of(t, 0)),
        row_stride(t.dim() == 3 ? stride_of(t, 1) : 0),
        three(t.dim() == 3) {
    if (!starts) return;
    check_dims(op, "row_start", *starts, 1, 1);
    FD_CHECK_ARG(starts->size(0) > 0, op, ": row_start: expected [B + 1], got [0]");
    check_tensor(op, "row_start", *starts, {starts->size(0)}, ScalarType::Int, t);
    row_start = static_cast<const int32_t*>(starts->const_data_ptr());
    rows = batch;
    batch = starts->size(0) - 1;
    row_stride = batch_stride;
    batch_stride = 0;
  }

  // One value per row, shaped like the caller's logits without the vocabulary.
  Tensor per_row(const Tensor& like, ScalarType type) const {
    return three ? output(like, {batch, rows}, type) : output(like, {like.size(0)}, type);
  }
  Tensor per_row(const Tensor& like, int64_t last, ScalarType type) const {
    return three ? output(like, {batch, rows, last}, type) : output(like, {like.size(0), last}, type);
  }
};

// The filters of core/filter.h as they cross the boundary: in a schema, as parameters of an adapter, as its arguments.
#define FD_FILTER_SCHEMA                                                                                        \
  "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? typical_p, Tensor? bias, Tensor? " \
  "ban_ids, Tensor? min_lengths, Tensor? bitmask, int order"
#define FD_FILTER_PARAMS                                                                        \
  const OptionalTensor &temperature, const OptionalTensor &top_k, const OptionalTensor &top_p,  \
      const OptionalTensor &min_p, const OptionalTensor &typical_p, const OptionalTensor &bias, \
      const OptionalTensor &ban_ids, const OptionalTensor &min_lengths, const OptionalTensor &bitmask, int64_t order
#define FD_FILTERS {temperature, top_k, top_p, min_p, typical_p, bias, ban_ids, min_lengths, bitmask, order}

struct FilterTensors {
  const OptionalTensor &temperature, &top_k, &top_p, &min_p, &typical_p, &bias, &ban_ids, &min_lengths, &bitmask;
  int64_t order;

  bool any() const {
    return temperature || top_k || top_p || min_p || typical_p || bias || ban_ids || min_lengths || bitmask || order;
  }
  bool any_cut() const { return temperature || top_k || top_p || min_p || typical_p || order; }
};

// `offset` gives the positions that min_lengths compares with; without seeds it has no other use.
FilterArgs check_filters(const char* op, const FilterTensors& f, const OptionalTensor& offset, const Tensor& like,
                         const Rows& r, bool has_seed);

// Exactly one of uniforms (float64, [batch] or [batch, per_request]) and seed (with offset).
RandomArgs check_random(const char* op, const OptionalTensor& uniforms, const OptionalTensor& seed,
                        const OptionalTensor& offset, const Tensor& like, int64_t batch, int64_t per_request);

}  // namespace fastdecode::bind
