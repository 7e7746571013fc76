#include <algorithm>

#include "bind/rows.h"
#include "sample/apply_token_bitmask.h"
#include "sample/penalize.h"

namespace fastdecode::bind {
namespace {

// Rows that are written must not share memory.
void check_rows_apart(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t outer = 0, inner = t.dim() - 2;  // the same dimension if there are only two
  if (t.stride(outer) < t.stride(inner)) std::swap(outer, inner);
  int64_t extent = t.size(t.dim() - 1);  // elements from the first to past the last of a row, then of the inner rows
  bool apart = t.size(inner) <= 1 || t.stride(inner) >= extent;
  extent += (t.size(inner) - 1) * t.stride(inner);
  if (outer != inner) apart = apart && (t.size(outer) <= 1 || t.stride(outer) >= extent);
  FD_CHECK_ARG(apart, op, ": ", name, ": expected rows that do not overlap, got strides ", t.stride(0), " and ",
               t.stride(t.dim() - 2), " for ", shape_text(t));
}

void apply_token_bitmask_(const Tensor& logits, const Tensor& bitmask, const OptionalTensor& indices,
                          const OptionalTensor& active) {
  constexpr auto op = "apply_token_bitmask_";
  const Rows r(op, "logits", logits, 2, indices ? 2 : 3);
  check_rows_apart(op, "logits", logits);
  check_dims(op, "bitmask", bitmask, r.three ? 3 : 2, r.three ? 3 : 2);
  const int64_t words = bitmask.size(bitmask.dim() - 1), most = (r.vocab_size + 31) / 32;
  FD_CHECK_ARG(words <= most, op, ": bitmask: expected at most ", most, " words per row, got ", shape_text(bitmask));
  const int64_t num_indices = indices ? bitmask.size(0) : 0;
  if (r.three) {
    check_tensor(op, "bitmask", bitmask, {r.batch, r.rows, words}, ScalarType::Int, logits);
  } else {
    check_tensor(op, "bitmask", bitmask, {indices ? num_indices : r.batch, words}, ScalarType::Int, logits);
  }
  check_optional(op, "indices", indices, {num_indices}, ScalarType::Int, logits);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  Launch launch(logits);
  device::apply_token_bitmask({.logits = logits.mutable_data_ptr(),
                               .bitmask = bitmask.const_data_ptr<int32_t>(),
                               .indices = data_of<int32_t>(indices),
                               .active = data_of<bool>(active),
                               .indexed = indices.has_value(),
                               .batch = r.batch,
                               .rows = r.rows,
                               .vocab_size = r.vocab_size,
                               .words = words,
                               .num_indices = num_indices,
                               .batch_stride = r.batch_stride,
                               .row_stride = r.row_stride,
                               .mask_stride = stride_of(bitmask, 0),
                               .mask_row_stride = r.three ? stride_of(bitmask, 1) : 0,
                               .dtype = r.dtype},
                              launch.exec());
  launch.check(op);
}

std::tuple<Tensor, Tensor> penalize(const Tensor& logits, const Tensor& tokens, const Tensor& lengths,
                                    const OptionalTensor& prompt_lengths, const OptionalTensor& draft_tokens,
                                    const OptionalTensor& repetition, const OptionalTensor& presence,
                                    const OptionalTensor& frequency, const OptionalTensor& active) {
  constexpr auto op = "penalize";
  const Rows r(op, "logits", logits, 2, 3);
  check_dims(op, "tokens", tokens, 2, 2);
  const int64_t max_length = tokens.size(1);
  check_tensor(op, "tokens", tokens, {r.batch, max_length}, ScalarType::Long, logits);
  check_tensor(op, "lengths", lengths, {r.batch}, ScalarType::Int, logits);
  check_optional(op, "prompt_lengths", prompt_lengths, {r.batch}, ScalarType::Int, logits);
  const int64_t num_drafts = std::max<int64_t>(r.rows - 1, 0);
  check_optional(op, "draft_tokens", draft_tokens, {r.batch, num_drafts}, ScalarType::Long, logits);
  check_optional(op, "repetition", repetition, {r.batch}, ScalarType::Float, logits);
  check_optional(op, "presence", presence, {r.batch}, ScalarType::Float, logits);
  check_optional(op, "frequency", frequency, {r.batch}, ScalarType::Float, logits);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  Tensor penalized = r.per_row(logits, r.vocab_size, output_dtype(r.dtype));
  Tensor status = output(logits, {r.batch}, ScalarType::Int);
  Launch launch(logits);
  PenalizeArgs args{.logits = logits.const_data_ptr(),
                    .tokens = tokens.const_data_ptr<int64_t>(),
                    .lengths = lengths.const_data_ptr<int32_t>(),
                    .prompt_lengths = data_of<int32_t>(prompt_lengths),
                    .draft_tokens = data_of<int64_t>(draft_tokens),
                    .repetition = data_of<float>(repetition),
                    .presence = data_of<float>(presence),
                    .frequency = data_of<float>(frequency),
                    .active = data_of<bool>(active),
                    .penalized = penalized.mutable_data_ptr(),
                    .status = status.mutable_data_ptr<int32_t>(),
                    .scratch = nullptr,
                    .batch = r.batch,
                    .rows = r.rows,
                    .vocab_size = r.vocab_size,
                    .max_length = max_length,
                    .batch_stride = r.batch_stride,
                    .row_stride = r.row_stride,
                    .token_stride = stride_of(tokens, 0),
                    .draft_stride = draft_tokens ? stride_of(*draft_tokens, 0) : 0,
                    .dtype = r.dtype};
  args.scratch = launch.scratch(device::penalize_scratch_bytes(args, launch.exec()));
  device::penalize(args, launch.exec());
  launch.check(op);
  return {penalized, status};
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("apply_token_bitmask_(Tensor(a!) logits, Tensor bitmask, Tensor? indices, Tensor? active) -> ()");
  m.def(
      "penalize(Tensor logits, Tensor tokens, Tensor lengths, Tensor? prompt_lengths, Tensor? draft_tokens, "
      "Tensor? repetition, Tensor? presence, Tensor? frequency, Tensor? active) -> (Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("apply_token_bitmask_", TORCH_BOX(&apply_token_bitmask_));
  m.impl("penalize", TORCH_BOX(&penalize));
}
