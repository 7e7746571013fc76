#include "bind/rows.h"

namespace fastdecode::bind {

namespace {

// One mask per request, [B, W], or per row, [B, n, W] or flat [R, W].
void check_bitmask(const char* op, const Tensor& mask, const Tensor& like, const Rows& r, FilterArgs& args) {
  const int64_t words = (r.vocab_size + 31) / 32;
  if (r.row_start) {
    check_tensor(op, "bitmask", mask, {r.rows, words}, ScalarType::Int, like);
    args.bitmask_flat_stride = stride_of(mask, 0);
  } else if (r.three && mask.dim() == 3) {
    check_tensor(op, "bitmask", mask, {r.batch, r.rows, words}, ScalarType::Int, like);
    args.bitmask_stride = stride_of(mask, 0);
    args.bitmask_row_stride = stride_of(mask, 1);
  } else {
    check_tensor(op, "bitmask", mask, {r.batch, words}, ScalarType::Int, like);
    args.bitmask_stride = stride_of(mask, 0);
  }
  args.bitmask = static_cast<const int32_t*>(mask.const_data_ptr());
}

}  // namespace

FilterArgs check_filters(const char* op, const FilterTensors& f, const OptionalTensor& offset, const Tensor& like,
                         const Rows& r, bool has_seed) {
  const int64_t batch = r.batch, vocab_size = r.vocab_size;
  FilterArgs args;
  check_optional(op, "temperature", f.temperature, {batch}, ScalarType::Float, like);
  check_optional(op, "top_k", f.top_k, {batch}, ScalarType::Int, like);
  check_optional(op, "top_p", f.top_p, {batch}, ScalarType::Float, like);
  check_optional(op, "min_p", f.min_p, {batch}, ScalarType::Float, like);
  check_optional(op, "typical_p", f.typical_p, {batch}, ScalarType::Float, like);
  check_optional(op, "bias", f.bias, {batch, vocab_size}, ScalarType::Float, like);
  check_optional(op, "offset", offset, {batch}, ScalarType::Long, like);
  if (f.ban_ids) {
    check_dims(op, "ban_ids", *f.ban_ids, 2, 2);
    args.num_bans = f.ban_ids->size(1);
    check_tensor(op, "ban_ids", *f.ban_ids, {batch, args.num_bans}, ScalarType::Long, like);
    args.ban_stride = stride_of(*f.ban_ids, 0);
  }
  if (f.min_lengths) {
    FD_CHECK_ARG(f.ban_ids.has_value(), op, ": min_lengths: expected ban_ids beside it, got None");
    FD_CHECK_ARG(offset.has_value(), op, ": min_lengths: expected offset beside it, got None");
    check_tensor(op, "min_lengths", *f.min_lengths, {batch, args.num_bans}, ScalarType::Long, like);
    args.min_length_stride = stride_of(*f.min_lengths, 0);
  }
  FD_CHECK_ARG(!offset || has_seed || f.min_lengths, op,
               ": offset: expected seed or min_lengths beside it, got neither");
  FD_CHECK_ARG(f.order == kOrderKThenP || f.order == kOrderJoint, op, ": order: expected ", int64_t{kOrderKThenP},
               " (k_then_p) or ", int64_t{kOrderJoint}, " (joint), got ", f.order);
  if (f.bitmask) check_bitmask(op, *f.bitmask, like, r, args);
  if (f.bias) args.bias_stride = stride_of(*f.bias, 0);
  args.temperature = data_of<float>(f.temperature);
  args.top_k = data_of<int32_t>(f.top_k);
  args.top_p = data_of<float>(f.top_p);
  args.min_p = data_of<float>(f.min_p);
  args.typical_p = data_of<float>(f.typical_p);
  args.order = static_cast<Order>(f.order);
  args.bias = data_of<float>(f.bias);
  args.ban_ids = data_of<int64_t>(f.ban_ids);
  args.min_lengths = data_of<int64_t>(f.min_lengths);
  args.offset = data_of<int64_t>(offset);
  return args;
}

RandomArgs check_random(const char* op, const OptionalTensor& uniforms, const OptionalTensor& seed,
                        const OptionalTensor& offset, const Tensor& like, int64_t batch, int64_t per_request) {
  FD_CHECK_ARG(uniforms.has_value() != seed.has_value(), op, ": uniforms, seed: expected exactly one of them, got ",
               uniforms ? "both" : "neither");
  RandomArgs args;
  if (uniforms) {
    if (per_request == 0) {
      check_tensor(op, "uniforms", *uniforms, {batch}, ScalarType::Double, like);
      args.uniform_stride = 1;
    } else {
      check_tensor(op, "uniforms", *uniforms, {batch, per_request}, ScalarType::Double, like);
      args.uniform_stride = stride_of(*uniforms, 0);
    }
    args.uniforms = data_of<double>(uniforms);
    return args;
  }
  FD_CHECK_ARG(offset.has_value(), op, ": offset: expected it beside seed, got None");
  check_tensor(op, "seed", *seed, {batch}, ScalarType::Long, like);
  check_tensor(op, "offset", *offset, {batch}, ScalarType::Long, like);
  args.seed = data_of<int64_t>(seed);
  args.offset = data_of<int64_t>(offset);
  return args;
}

}  // namespace fastdecode::bind
