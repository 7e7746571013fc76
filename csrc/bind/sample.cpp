#include "sample/sample.h"

#include "bind/rows.h"
#include "sample/row_stats.h"
#include "sample/target_probs.h"
#include "sample/token_logprobs.h"
#include "sample/topk_logits.h"

namespace fastdecode::bind {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits,
                                                                     const OptionalTensor& active) {
  constexpr auto op = "row_stats";
  const Rows r(op, "logits", logits, 2, 3);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  const ScalarType type = output_dtype(r.dtype);
  auto outputs = std::make_tuple(r.per_row(logits, type), r.per_row(logits, ScalarType::Long), r.per_row(logits, type),
                                 r.per_row(logits, type), r.per_row(logits, type), r.per_row(logits, ScalarType::Int));
  auto& [max, argmax, second, logsumexp, entropy, status] = outputs;
  Launch launch(logits);
  RowStatsArgs args{.logits = logits.const_data_ptr(),
                    .active = data_of<bool>(active),
                    .max = max.mutable_data_ptr(),
                    .argmax = argmax.mutable_data_ptr<int64_t>(),
                    .second = second.mutable_data_ptr(),
                    .logsumexp = logsumexp.mutable_data_ptr(),
                    .entropy = entropy.mutable_data_ptr(),
                    .status = status.mutable_data_ptr<int32_t>(),
                    .scratch = nullptr,
                    .batch = r.batch,
                    .rows = r.rows,
                    .vocab_size = r.vocab_size,
                    .batch_stride = r.batch_stride,
                    .row_stride = r.row_stride,
                    .dtype = r.dtype};
  args.scratch = launch.scratch(device::row_stats_scratch_bytes(args, launch.exec()));
  device::row_stats(args, launch.exec());
  launch.check(op);
  return outputs;
}

std::tuple<Tensor, Tensor> target_probs(const Tensor& logits, const OptionalTensor& row_start, FD_FILTER_PARAMS,
                                        const OptionalTensor& offset, const OptionalTensor& active) {
  constexpr auto op = "target_probs";
  const Rows r(op, "logits", logits, 2, 3, row_start);
  const FilterArgs filters = check_filters(op, FilterTensors FD_FILTERS, offset, logits, r, /*has_seed=*/false);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  Tensor probs = r.per_row(logits, r.vocab_size, output_dtype(r.dtype));
  Tensor status = r.per_row(logits, ScalarType::Int);
  Launch launch(logits);
  TargetProbsArgs args{.logits = logits.const_data_ptr(),
                       .row_start = r.row_start,
                       .filters = filters,
                       .active = data_of<bool>(active),
                       .probs = probs.mutable_data_ptr(),
                       .status = status.mutable_data_ptr<int32_t>(),
                       .scratch = nullptr,
                       .batch = r.batch,
                       .rows = r.rows,
                       .vocab_size = r.vocab_size,
                       .batch_stride = r.batch_stride,
                       .row_stride = r.row_stride,
                       .dtype = r.dtype};
  args.scratch = launch.scratch(device::target_probs_scratch_bytes(args, launch.exec()));
  device::target_probs(args, launch.exec());
  launch.check(op);
  return {probs, status};
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, FD_FILTER_PARAMS, const OptionalTensor& uniforms,
                                  const OptionalTensor& seed, const OptionalTensor& offset, int64_t stream,
                                  int64_t node, const OptionalTensor& active) {
  constexpr auto op = "sample";
  const Rows r(op, "logits", logits, 2, 2);
  const FilterArgs filters = check_filters(op, FilterTensors FD_FILTERS, offset, logits, r, seed.has_value());
  const RandomArgs random = check_random(op, uniforms, seed, offset, logits, r.batch, /*per_request=*/0);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  FD_CHECK_ARG(stream >= 0 && stream < 256, op, ": stream: expected 0..255, got ", stream);
  FD_CHECK_ARG(node >= 0 && node < 1 << 24, op, ": node: expected 0..", (1 << 24) - 1, ", got ", node);
  FD_CHECK_ARG(seed || (stream == 0 && node == 0), op, ": stream, node: expected 0 beside uniforms, got ", stream,
               " and ", node);
  Tensor tokens = r.per_row(logits, ScalarType::Long);
  Tensor status = r.per_row(logits, ScalarType::Int);
  Launch launch(logits);
  SampleArgs args{.logits = logits.const_data_ptr(),
                  .filters = filters,
                  .random = random,
                  .active = data_of<bool>(active),
                  .tokens = tokens.mutable_data_ptr<int64_t>(),
                  .status = status.mutable_data_ptr<int32_t>(),
                  .scratch = nullptr,
                  .batch = r.batch,
                  .vocab_size = r.vocab_size,
                  .batch_stride = r.batch_stride,
                  .stream = stream,
                  .node = node,
                  .dtype = r.dtype};
  args.scratch = launch.scratch(device::sample_scratch_bytes(args, launch.exec()));
  device::sample(args, launch.exec());
  launch.check(op);
  return {tokens, status};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& tokens, int64_t top,
                                                          const OptionalTensor& row_start, FD_FILTER_PARAMS,
                                                          const OptionalTensor& offset, const OptionalTensor& active) {
  constexpr auto op = "token_logprobs";
  const Rows r(op, "logits", logits, 2, 3, row_start);
  if (r.three) {
    check_tensor(op, "tokens", tokens, {r.batch, r.rows}, ScalarType::Long, logits);
  } else {
    check_tensor(op, "tokens", tokens, {logits.size(0)}, ScalarType::Long, logits);
  }
  FD_CHECK_ARG(top >= 0 && top <= r.vocab_size, op, ": top: expected 0..", r.vocab_size, ", got ", top);
  const FilterArgs filters = check_filters(op, FilterTensors FD_FILTERS, offset, logits, r, /*has_seed=*/false);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  const ScalarType type = output_dtype(r.dtype);
  Tensor logprobs = r.per_row(logits, type);
  Tensor top_ids = r.per_row(logits, top, ScalarType::Long);
  Tensor top_logprobs = r.per_row(logits, top, type);
  Tensor status = r.per_row(logits, ScalarType::Int);
  Launch launch(logits);
  TokenLogprobsArgs args{.logits = logits.const_data_ptr(),
                         .tokens = tokens.const_data_ptr<int64_t>(),
                         .row_start = r.row_start,
                         .filters = filters,
                         .active = data_of<bool>(active),
                         .logprobs = logprobs.mutable_data_ptr(),
                         .top_ids = top_ids.mutable_data_ptr<int64_t>(),
                         .top_logprobs = top_logprobs.mutable_data_ptr(),
                         .status = status.mutable_data_ptr<int32_t>(),
                         .scratch = nullptr,
                         .batch = r.batch,
                         .rows = r.rows,
                         .vocab_size = r.vocab_size,
                         .top = top,
                         .batch_stride = r.batch_stride,
                         .row_stride = r.row_stride,
                         .token_stride = r.three ? stride_of(tokens, 0) : 1,
                         .dtype = r.dtype};
  args.scratch = launch.scratch(device::token_logprobs_scratch_bytes(args, launch.exec()));
  device::token_logprobs(args, launch.exec());
  launch.check(op);
  return {logprobs, top_ids, top_logprobs, status};
}

std::tuple<Tensor, Tensor, Tensor> topk_logits(const Tensor& logits, int64_t k, const OptionalTensor& active) {
  constexpr auto op = "topk_logits";
  const Rows r(op, "logits", logits, 2, 3);
  FD_CHECK_ARG(k >= 1 && k <= r.vocab_size, op, ": k: expected 1..", r.vocab_size, ", got ", k);
  check_optional(op, "active", active, {r.batch}, ScalarType::Bool, logits);
  Tensor values = r.per_row(logits, k, output_dtype(r.dtype));
  Tensor ids = r.per_row(logits, k, ScalarType::Long);
  Tensor status = r.per_row(logits, ScalarType::Int);
  Launch launch(logits);
  TopkLogitsArgs args{.logits = logits.const_data_ptr(),
                      .active = data_of<bool>(active),
                      .values = values.mutable_data_ptr(),
                      .ids = ids.mutable_data_ptr<int64_t>(),
                      .status = status.mutable_data_ptr<int32_t>(),
                      .scratch = nullptr,
                      .batch = r.batch,
                      .rows = r.rows,
                      .vocab_size = r.vocab_size,
                      .k = k,
                      .batch_stride = r.batch_stride,
                      .row_stride = r.row_stride,
                      .dtype = r.dtype};
  args.scratch = launch.scratch(device::topk_logits_scratch_bytes(args, launch.exec()));
  device::topk_logits(args, launch.exec());
  launch.check(op);
  return {values, ids, status};
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("row_stats(Tensor logits, Tensor? active) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("target_probs(Tensor logits, Tensor? row_start, " FD_FILTER_SCHEMA
        ", Tensor? offset, Tensor? active) -> (Tensor, Tensor)");
  m.def("sample(Tensor logits, " FD_FILTER_SCHEMA
        ", Tensor? uniforms, Tensor? seed, Tensor? offset, int stream, int node, Tensor? active) -> (Tensor, Tensor)");
  m.def("topk_logits(Tensor logits, int k, Tensor? active) -> (Tensor, Tensor, Tensor)");
  m.def("token_logprobs(Tensor logits, Tensor tokens, int top, Tensor? row_start, " FD_FILTER_SCHEMA
        ", Tensor? offset, Tensor? active) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("row_stats", TORCH_BOX(&row_stats));
  m.impl("target_probs", TORCH_BOX(&target_probs));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("topk_logits", TORCH_BOX(&topk_logits));
}
