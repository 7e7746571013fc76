#include "bind/rows.h"
#include "verify/commit.h"
#include "verify/verify_chain.h"
#include "verify/verify_chain_greedy.h"

namespace fastdecode::bind {
namespace {

using Verified = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // tokens, num_accepted, num_emitted, status

Verified new_verified(const Tensor& like, int64_t batch, int64_t width) {
  return {output(like, {batch, width}, ScalarType::Long), output(like, {batch}, ScalarType::Int),
          output(like, {batch}, ScalarType::Int), output(like, {batch}, ScalarType::Int)};
}

// Draft tokens [B, K]; K may be 0.
std::tuple<int64_t, int64_t> check_drafts(const char* op, const Tensor& draft_tokens, const OptionalTensor& draft_lens,
                                          const OptionalTensor& active) {
  check_dims(op, "draft_tokens", draft_tokens, 2, 2);
  const int64_t B = draft_tokens.size(0), K = draft_tokens.size(1);
  check_tensor(op, "draft_tokens", draft_tokens, {B, K}, ScalarType::Long, draft_tokens);
  check_optional(op, "draft_lens", draft_lens, {B}, ScalarType::Int, draft_tokens);
  check_optional(op, "active", active, {B}, ScalarType::Bool, draft_tokens);
  return {B, K};
}

Verified verify_chain_greedy(const Tensor& draft_tokens, const Tensor& target_ids, const OptionalTensor& draft_lens,
                             const OptionalTensor& active) {
  constexpr auto op = "verify_chain_greedy";
  const auto [B, K] = check_drafts(op, draft_tokens, draft_lens, active);
  check_tensor(op, "target_ids", target_ids, {B, K + 1}, ScalarType::Long, draft_tokens);
  Verified outputs = new_verified(draft_tokens, B, K + 1);
  auto& [tokens, num_accepted, num_emitted, status] = outputs;
  Launch launch(draft_tokens);
  device::verify_chain_greedy({.draft_tokens = draft_tokens.const_data_ptr<int64_t>(),
                               .target_ids = target_ids.const_data_ptr<int64_t>(),
                               .draft_lens = data_of<int32_t>(draft_lens),
                               .active = data_of<bool>(active),
                               .tokens = tokens.mutable_data_ptr<int64_t>(),
                               .num_accepted = num_accepted.mutable_data_ptr<int32_t>(),
                               .num_emitted = num_emitted.mutable_data_ptr<int32_t>(),
                               .status = status.mutable_data_ptr<int32_t>(),
                               .batch = B,
                               .K = K,
                               .draft_stride = stride_of(draft_tokens, 0),
                               .target_stride = stride_of(target_ids, 0)},
                              launch.exec());
  launch.check(op);
  return outputs;
}

// What each rule of verify_chain takes: an argument it does not use is an error, not ignored.
void check_rule(const char* op, int64_t rule, bool logits, bool draft_probs, const FilterTensors& f, bool uniforms,
                bool seed, bool eps, bool delta, int64_t bonus, bool beta, bool tau) {
  FD_CHECK_ARG(rule >= kRuleRatio && rule <= kRuleTopBeta, op, ": rule: expected 0..", int64_t{kRuleTopBeta},
               " (ratio, coupled, block, typical, top_beta), got ", rule);
  constexpr const char* kNames[] = {"ratio", "coupled", "block", "typical", "top_beta"};
  const char* name = kNames[rule];
  const bool typical = rule == kRuleTypical, top_beta = rule == kRuleTopBeta;
  auto unused = [&](const char* argument, bool given) {
    FD_CHECK_ARG(!given, op, ": ", argument, ": expected None, which rule ", name, " does not use, got a value");
  };
  FD_CHECK_ARG(logits || (rule != kRuleCoupled && !top_beta), op, ": target_probs: expected target_logits with rule ",
               name, ", got probabilities");
  FD_CHECK_ARG(logits || !f.any(), op,
               ": target_probs: expected no filters beside it (they belong to its making), got some");
  unused("draft_probs", draft_probs && rule != kRuleRatio && rule != kRuleBlock);
  unused("eps", eps && !typical);
  unused("delta", delta && !typical);
  unused("beta", beta && !top_beta);
  unused("tau", tau && !top_beta);
  FD_CHECK_ARG(bonus == kBonusGreedy || (bonus == kBonusSample && typical), op, ": bonus: expected ",
               int64_t{kBonusGreedy}, " (greedy)", typical ? " or 1 (sample)" : ", another is for rule typical",
               ", got ", bonus);
  FD_CHECK_ARG(!top_beta || !f.any_cut(), op,
               ": temperature, top_k, top_p, min_p, typical_p, order: expected None with rule top_beta, got a value");
  const bool draws = !top_beta && !(typical && bonus == kBonusGreedy);
  unused("uniforms", uniforms && !draws);
  unused("seed", seed && !draws);
  FD_CHECK_ARG(!draws || uniforms != seed, op, ": uniforms, seed: expected exactly one of them, got ",
               uniforms ? "both" : "neither");
}

Verified verify_chain(const Tensor& draft_tokens, const OptionalTensor& draft_probs, const OptionalTensor& draft_lens,
                      const OptionalTensor& target_logits, const OptionalTensor& target_probs,
                      const OptionalTensor& row_start, int64_t rule, FD_FILTER_PARAMS,
                      const OptionalTensor& draft_to_target, const OptionalTensor& eps, const OptionalTensor& delta,
                      int64_t bonus, const OptionalTensor& beta, const OptionalTensor& tau,
                      const OptionalTensor& uniforms, const OptionalTensor& seed, const OptionalTensor& offset,
                      const OptionalTensor& active, bool emit_bonus) {
  constexpr auto op = "verify_chain";
  const auto [B, K] = check_drafts(op, draft_tokens, draft_lens, active);
  FD_CHECK_ARG(target_logits.has_value() != target_probs.has_value(), op,
               ": target_logits, target_probs: expected exactly one of them, got ", target_logits ? "both" : "neither");
  const FilterTensors f FD_FILTERS;
  check_rule(op, rule, target_logits.has_value(), draft_probs.has_value(), f, uniforms.has_value(), seed.has_value(),
             eps.has_value(), delta.has_value(), bonus, beta.has_value(), tau.has_value());
  const char* name = target_probs ? "target_probs" : "target_logits";
  const Tensor& target = target_probs ? *target_probs : *target_logits;
  const Rows r(op, name, target, 3, 3, row_start);
  const int64_t V = r.vocab_size;
  if (row_start) {
    check_tensor(op, "row_start", *row_start, {B + 1}, ScalarType::Int, draft_tokens);
    check_device(op, name, target, draft_tokens);
  } else {
    check_tensor(op, name, target, {B, K + 1, V}, target.scalar_type(), draft_tokens);
  }
  int64_t draft_V = V;
  if (draft_to_target) {
    check_dims(op, "draft_to_target", *draft_to_target, 1, 1);
    draft_V = draft_to_target->size(0);
    check_tensor(op, "draft_to_target", *draft_to_target, {draft_V}, ScalarType::Long, draft_tokens);
  }
  const ScalarType computed = output_dtype(r.dtype);
  const bool draft_is_computed = draft_probs && draft_probs->scalar_type() == computed;
  check_optional(op, "draft_probs", draft_probs, {B, K, draft_V}, draft_is_computed ? computed : target.scalar_type(),
                 draft_tokens);
  check_optional(op, "eps", eps, {B}, ScalarType::Float, draft_tokens);
  check_optional(op, "delta", delta, {B}, ScalarType::Float, draft_tokens);
  check_optional(op, "beta", beta, {B}, ScalarType::Int, draft_tokens);
  check_optional(op, "tau", tau, {B}, ScalarType::Float, draft_tokens);
  const FilterArgs filters = check_filters(op, f, offset, draft_tokens, r, seed.has_value());
  RandomArgs random;
  if (uniforms || seed) random = check_random(op, uniforms, seed, offset, draft_tokens, B, K + 1);
  Verified outputs = new_verified(draft_tokens, B, K + 1);
  auto& [tokens, num_accepted, num_emitted, status] = outputs;
  Launch launch(draft_tokens);
  VerifyChainArgs args{.draft_tokens = draft_tokens.const_data_ptr<int64_t>(),
                       .draft_probs = data_of<void>(draft_probs),
                       .draft_lens = data_of<int32_t>(draft_lens),
                       .draft_to_target = data_of<int64_t>(draft_to_target),
                       .target = target.const_data_ptr(),
                       .row_start = r.row_start,
                       .target_is_probs = target_probs.has_value(),
                       .rule = static_cast<Rule>(rule),
                       .filters = filters,
                       .eps = data_of<float>(eps),
                       .delta = data_of<float>(delta),
                       .bonus = static_cast<Bonus>(bonus),
                       .beta = data_of<int32_t>(beta),
                       .tau = data_of<float>(tau),
                       .random = random,
                       .active = data_of<bool>(active),
                       .emit_bonus = emit_bonus,
                       .tokens = tokens.mutable_data_ptr<int64_t>(),
                       .num_accepted = num_accepted.mutable_data_ptr<int32_t>(),
                       .num_emitted = num_emitted.mutable_data_ptr<int32_t>(),
                       .status = status.mutable_data_ptr<int32_t>(),
                       .scratch = nullptr,
                       .batch = B,
                       .K = K,
                       .vocab_size = V,
                       .draft_vocab_size = draft_V,
                       .num_rows = r.rows,
                       .draft_stride = stride_of(draft_tokens, 0),
                       .draft_prob_stride = draft_probs ? stride_of(*draft_probs, 0) : 0,
                       .draft_prob_row_stride = draft_probs ? stride_of(*draft_probs, 1) : 0,
                       .target_stride = r.batch_stride,
                       .target_row_stride = r.row_stride,
                       .dtype = r.dtype,
                       .draft_dtype = draft_is_computed && r.dtype != DType::kFloat64 ? DType::kFloat32 : r.dtype};
  args.scratch = launch.scratch(device::verify_chain_scratch_bytes(args, launch.exec()));
  device::verify_chain(args, launch.exec());
  launch.check(op);
  return outputs;
}

std::tuple<Tensor, Tensor> commit(const Tensor& tokens, const Tensor& num_emitted, Tensor lengths, Tensor finished,
                                  const OptionalTensor& max_lengths, const OptionalTensor& stop_ids) {
  constexpr auto op = "commit";
  check_dims(op, "tokens", tokens, 2, 2);
  const int64_t B = tokens.size(0), K1 = tokens.size(1);
  check_tensor(op, "tokens", tokens, {B, K1}, ScalarType::Long, tokens);
  check_tensor(op, "num_emitted", num_emitted, {B}, ScalarType::Int, tokens);
  check_tensor(op, "lengths", lengths, {B}, ScalarType::Int, tokens);
  check_tensor(op, "finished", finished, {B}, ScalarType::Bool, tokens);
  check_optional(op, "max_lengths", max_lengths, {B}, ScalarType::Int, tokens);
  if (stop_ids) {
    check_dims(op, "stop_ids", *stop_ids, 2, 2);
    check_tensor(op, "stop_ids", *stop_ids, {B, stop_ids->size(1)}, ScalarType::Long, tokens);
  }
  Tensor num_committed = output(tokens, {B}, ScalarType::Int);
  Tensor reason = output(tokens, {B}, ScalarType::Int);
  Launch launch(tokens);
  device::commit({.tokens = tokens.const_data_ptr<int64_t>(),
                  .num_emitted = num_emitted.const_data_ptr<int32_t>(),
                  .lengths = lengths.mutable_data_ptr<int32_t>(),
                  .finished = finished.mutable_data_ptr<bool>(),
                  .max_lengths = data_of<int32_t>(max_lengths),
                  .stop_ids = data_of<int64_t>(stop_ids),
                  .num_committed = num_committed.mutable_data_ptr<int32_t>(),
                  .reason = reason.mutable_data_ptr<int32_t>(),
                  .batch = B,
                  .K1 = K1,
                  .num_stops = stop_ids ? stop_ids->size(1) : 0,
                  .token_stride = stride_of(tokens, 0),
                  .stop_stride = stop_ids ? stride_of(*stop_ids, 0) : 0},
                 launch.exec());
  launch.check(op);
  return {num_committed, reason};
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def(
      "verify_chain_greedy(Tensor draft_tokens, Tensor target_ids, Tensor? draft_lens, Tensor? active) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "verify_chain(Tensor draft_tokens, Tensor? draft_probs, Tensor? draft_lens, Tensor? target_logits, "
      "Tensor? target_probs, Tensor? row_start, int rule, " FD_FILTER_SCHEMA
      ", Tensor? draft_to_target, Tensor? eps, Tensor? delta, int bonus, Tensor? beta, Tensor? tau, "
      "Tensor? uniforms, Tensor? seed, Tensor? offset, Tensor? active, bool emit_bonus) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "commit(Tensor tokens, Tensor num_emitted, Tensor(a!) lengths, Tensor(b!) finished, Tensor? max_lengths, "
      "Tensor? stop_ids) -> (Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("verify_chain_greedy", TORCH_BOX(&verify_chain_greedy));
  m.impl("verify_chain", TORCH_BOX(&verify_chain));
  m.impl("commit", TORCH_BOX(&commit));
}
