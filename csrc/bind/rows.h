// Adapter pieces shared by the ops on rows of logits: shapes [B, V] or [B, n, V], filters, randomness.
#pragma once

#include "bind/device.h"
#include "core/draw.h"
#include "core/filter.h"

namespace fastdecode::bind {

// Logits [B, V] or [B, n, V] seen as [B, n, V], and the leading shape of the op's outputs.
struct Rows {
  DType dtype;
  int64_t batch, rows, vocab_size, batch_stride, row_stride;
  bool three;  // the caller's logits had three dimensions

  Rows(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high)
      : dtype(check_rows(op, name, t, low, high)),
        batch(t.size(0)),
        rows(t.dim() == 3 ? t.size(1) : 1),
        vocab_size(t.size(t.dim() - 1)),
        batch_stride(stride_of(t, 0)),
        row_stride(t.dim() == 3 ? stride_of(t, 1) : 0),
        three(t.dim() == 3) {}

  // One value per row, shaped like the caller's logits without the vocabulary.
  Tensor per_row(const Tensor& like, ScalarType type) const {
    return three ? output(like, {batch, rows}, type) : output(like, {batch}, type);
  }
  Tensor per_row(const Tensor& like, int64_t last, ScalarType type) const {
    return three ? output(like, {batch, rows, last}, type) : output(like, {batch, last}, type);
  }
};

struct FilterTensors {
  const OptionalTensor &temperature, &top_k, &top_p, &min_p, &bias, &ban_ids, &min_lengths;
};

// `offset` gives the positions that min_lengths compares with; without seeds it has no other use.
FilterArgs check_filters(const char* op, const FilterTensors& f, const OptionalTensor& offset, const Tensor& like,
                         int64_t batch, int64_t vocab_size, bool has_seed);

// Exactly one of uniforms (float64, [batch] or [batch, per_request]) and seed (with offset).
RandomArgs check_random(const char* op, const OptionalTensor& uniforms, const OptionalTensor& seed,
                        const OptionalTensor& offset, const Tensor& like, int64_t batch, int64_t per_request);

}  // namespace fastdecode::bind
