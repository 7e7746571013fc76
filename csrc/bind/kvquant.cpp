#include "bind/kv.h"
#include "kvquant/kv_append.h"
#include "kvquant/kv_dequant.h"
#include "kvquant/kv_flush.h"
#include "kvquant/kv_keep.h"
#include "kvquant/kv_report.h"

namespace fastdecode::bind {
namespace {

void check_head_dim(const char* op, const char* name, int64_t head_dim) {
  FD_CHECK_ARG(head_dim >= 1 && head_dim <= kMaxHeadDim, op, ": ", name, ": expected a head_dim of 1..",
               int64_t{kMaxHeadDim}, ", got ", head_dim);
}

// Requests, from their lengths; the rings, if used, have a row for each.
int64_t check_requests(const char* op, const char* name, const Tensor& lens, const KVPages& p, bool uses_rings,
                       const Tensor& like) {
  check_dims(op, name, lens, 1, 1);
  check_tensor(op, name, lens, {lens.size(0)}, ScalarType::Int, like);
  FD_CHECK_ARG(!uses_rings || p.tail_batch == lens.size(0), op, ": k_tail: expected a ring for each of ", lens.size(0),
               " requests, got ", p.tail_batch);
  return lens.size(0);
}

// A cache that the op changes.
KVPages check_written_pages(const char* op, const PageTensors& t, int64_t head_dim, const Tensor& like) {
  const KVPages p = check_pages(op, t, head_dim, like);
  check_written(op, "k_cache", t.k_cache);
  check_written(op, "v_cache", t.v_cache);
  if (t.k_scale) check_written(op, "k_scale", *t.k_scale);
  if (t.v_scale) check_written(op, "v_scale", *t.v_scale);
  if (t.k_tail) check_written(op, "k_tail", *t.k_tail);
  if (t.v_tail) check_written(op, "v_tail", *t.v_tail);
  return p;
}

// Rotation is asked for by rope; what belongs to it must come with it.
void check_rope(const char* op, const Tensor& k, const OptionalTensor& q, const OptionalTensor& rope,
                const OptionalTensor& positions, bool interleaved) {
  FD_CHECK_ARG(rope || !q, op, ": q: expected None without rope, got a tensor");
  FD_CHECK_ARG(rope || !positions, op, ": positions: expected None without rope, got a tensor");
  FD_CHECK_ARG(rope || !interleaved, op, ": interleaved: expected False without rope, got True");
  if (!rope) return;
  const int64_t tokens = k.size(0), head_dim = k.size(2);
  FD_CHECK_ARG(head_dim % 2 == 0, op, ": rope: expected an even head_dim, got ", head_dim);
  FD_CHECK_ARG(positions, op, ": positions: expected a tensor with rope, got None");
  check_dims(op, "rope", *rope, 3, 3);
  check_tensor(op, "rope", *rope, {rope->size(0), 2, head_dim / 2}, output_dtype(check_float(op, "k", k)), k);
  FD_CHECK_ARG(rope->is_contiguous(), op, ": rope: expected a contiguous tensor");
  const bool is_32 = positions->scalar_type() == ScalarType::Int;
  check_tensor(op, "positions", *positions, {tokens}, is_32 ? ScalarType::Int : ScalarType::Long, k);
  if (!q) return;
  check_dims(op, "q", *q, 3, 3);
  check_tensor(op, "q", *q, {tokens, q->size(1), head_dim}, k.scalar_type(), k);
  check_written(op, "q", *q);
}

Tensor kv_append(const Tensor& k, const Tensor& v, const Tensor& slots, FD_PAGES_PARAMS, const OptionalTensor& q,
                 const OptionalTensor& rope, const OptionalTensor& positions, bool interleaved) {
  constexpr auto op = "kv_append_";
  check_dims(op, "k", k, 3, 3);
  const DType dtype = check_float(op, "k", k);
  const int64_t tokens = k.size(0), head_dim = k.size(2);
  check_head_dim(op, "k", head_dim);
  const KVPages p = check_written_pages(op, FD_PAGES, head_dim, k);
  check_tensor(op, "k", k, {tokens, p.num_heads, head_dim}, k.scalar_type(), k);
  check_tensor(op, "v", v, {tokens, p.num_heads, head_dim}, k.scalar_type(), k);
  check_tensor(op, "slots", slots, {tokens}, ScalarType::Long, k);
  check_rope(op, k, q, rope, positions, interleaved);
  Tensor status = output(k, {tokens}, ScalarType::Int);
  Launch launch(k);
  device::kv_append({.k = k.const_data_ptr(),
                     .v = v.const_data_ptr(),
                     .slots = slots.const_data_ptr<int64_t>(),
                     .q = q ? const_cast<void*>(q->const_data_ptr()) : nullptr,
                     .rope = data_of<void>(rope),
                     .positions = data_of<void>(positions),
                     .status = status.mutable_data_ptr<int32_t>(),
                     .pages = p,
                     .num_tokens = tokens,
                     .num_q_heads = q ? q->size(1) : 0,
                     .num_positions = rope ? rope->size(0) : 0,
                     .k_token_stride = stride_of(k, 0),
                     .k_head_stride = stride_of(k, 1),
                     .v_token_stride = stride_of(v, 0),
                     .v_head_stride = stride_of(v, 1),
                     .q_token_stride = q ? stride_of(*q, 0) : 0,
                     .q_head_stride = q ? stride_of(*q, 1) : 0,
                     .dtype = dtype,
                     .positions_are_32 = positions && positions->scalar_type() == ScalarType::Int,
                     .interleaved = interleaved},
                    launch.exec());
  launch.check(op);
  return status;
}

Tensor kv_flush(FD_PAGES_PARAMS, const Tensor& page_table, const Tensor& begin, const Tensor& end) {
  constexpr auto op = "kv_flush_";
  FD_CHECK_ARG(scheme == kKVKivi4 || scheme == kKVKivi2, op, ": scheme: expected ", int64_t{kKVKivi4}, " or ",
               int64_t{kKVKivi2}, " (kivi), got ", scheme);
  FD_CHECK_ARG(k_tail, op, ": k_tail: expected a tensor for this scheme, got None");
  check_dims(op, "k_tail", *k_tail, 4, 4);
  check_head_dim(op, "k_tail", k_tail->size(3));
  const KVPages p = check_written_pages(op, FD_PAGES, k_tail->size(3), k_cache);
  const int64_t B = check_requests(op, "begin", begin, p, true, k_cache);
  check_tensor(op, "end", end, {B}, ScalarType::Int, k_cache);
  const int32_t* table = check_page_table(op, page_table, B, k_cache);
  Tensor status = output(k_cache, {B}, ScalarType::Int);
  Launch launch(k_cache);
  device::kv_flush({.pages = p,
                    .page_table = table,
                    .begin = begin.const_data_ptr<int32_t>(),
                    .end = end.const_data_ptr<int32_t>(),
                    .status = status.mutable_data_ptr<int32_t>(),
                    .batch = B,
                    .max_pages = page_table.size(1),
                    .page_table_stride = stride_of(page_table, 0)},
                   launch.exec());
  launch.check(op);
  return status;
}

std::tuple<Tensor, Tensor, Tensor> kv_dequant(FD_PAGES_PARAMS, const Tensor& page_table, const Tensor& kv_lens,
                                              const OptionalTensor& tail_lens, int64_t head_dim, int64_t length,
                                              ScalarType dtype) {
  constexpr auto op = "kv_dequant";
  check_head_dim(op, "head_dim", head_dim);
  const KVPages p = check_pages(op, FD_PAGES, head_dim, k_cache);
  FD_CHECK_ARG(is_kivi(p.scheme) || !tail_lens, op, ": tail_lens: expected None for this scheme, got a tensor");
  FD_CHECK_ARG(length >= 0, op, ": length: expected at least 0, got ", length);
  const int64_t B = check_requests(op, "kv_lens", kv_lens, p, tail_lens.has_value(), k_cache);
  check_optional(op, "tail_lens", tail_lens, {B}, ScalarType::Int, k_cache);
  const int32_t* table = check_page_table(op, page_table, B, k_cache);
  Tensor k = output(k_cache, {B, length, p.num_heads, head_dim}, dtype);
  Tensor v = output(k_cache, {B, length, p.num_heads, head_dim}, dtype);
  const DType type = check_float(op, "dtype", k);
  Tensor status = output(k_cache, {B}, ScalarType::Int);
  Launch launch(k_cache);
  device::kv_dequant({.pages = p,
                      .page_table = table,
                      .kv_lens = kv_lens.const_data_ptr<int32_t>(),
                      .tail_lens = data_of<int32_t>(tail_lens),
                      .k = k.mutable_data_ptr(),
                      .v = v.mutable_data_ptr(),
                      .status = status.mutable_data_ptr<int32_t>(),
                      .batch = B,
                      .length = length,
                      .max_pages = page_table.size(1),
                      .page_table_stride = stride_of(page_table, 0),
                      .dtype = type},
                     launch.exec());
  launch.check(op);
  return {k, v, status};
}

std::tuple<Tensor, Tensor> kv_report(const Tensor& k, const Tensor& v, FD_PAGES_PARAMS, const Tensor& page_table,
                                     const Tensor& kv_lens, const OptionalTensor& tail_lens) {
  constexpr auto op = "kv_report";
  check_dims(op, "k", k, 4, 4);
  const DType dtype = check_float(op, "k", k);
  const int64_t length = k.size(1), head_dim = k.size(3);
  check_head_dim(op, "k", head_dim);
  const KVPages p = check_pages(op, FD_PAGES, head_dim, k);
  FD_CHECK_ARG(is_kivi(p.scheme) || !tail_lens, op, ": tail_lens: expected None for this scheme, got a tensor");
  const int64_t B = check_requests(op, "kv_lens", kv_lens, p, tail_lens.has_value(), k);
  check_tensor(op, "k", k, {B, length, p.num_heads, head_dim}, k.scalar_type(), k);
  check_tensor(op, "v", v, {B, length, p.num_heads, head_dim}, k.scalar_type(), k);
  check_optional(op, "tail_lens", tail_lens, {B}, ScalarType::Int, k);
  const int32_t* table = check_page_table(op, page_table, B, k);
  Tensor errors = output(k, {2, B, p.num_heads, 3}, ScalarType::Double);
  Tensor status = output(k, {B}, ScalarType::Int);
  Launch launch(k);
  device::kv_report({.k = k.const_data_ptr(),
                     .v = v.const_data_ptr(),
                     .pages = p,
                     .page_table = table,
                     .kv_lens = kv_lens.const_data_ptr<int32_t>(),
                     .tail_lens = data_of<int32_t>(tail_lens),
                     .errors = errors.mutable_data_ptr<double>(),
                     .status = status.mutable_data_ptr<int32_t>(),
                     .batch = B,
                     .length = length,
                     .max_pages = page_table.size(1),
                     .page_table_stride = stride_of(page_table, 0),
                     .k_batch_stride = stride_of(k, 0),
                     .k_token_stride = stride_of(k, 1),
                     .k_head_stride = stride_of(k, 2),
                     .v_batch_stride = stride_of(v, 0),
                     .v_token_stride = stride_of(v, 1),
                     .v_head_stride = stride_of(v, 2),
                     .dtype = dtype},
                    launch.exec());
  launch.check(op);
  return {errors, status};
}

Tensor kv_keep(FD_PAGES_PARAMS, int64_t head_dim, const Tensor& path, const Tensor& num_keep,
               const OptionalTensor& page_table, const Tensor& base_lens) {
  constexpr auto op = "kv_keep_";
  check_head_dim(op, "head_dim", head_dim);
  const KVPages p = check_written_pages(op, FD_PAGES, head_dim, k_cache);
  const bool kivi = is_kivi(p.scheme);
  FD_CHECK_ARG(page_table.has_value() != kivi, op, ": page_table: expected ",
               kivi ? "None for this scheme, got a tensor" : "a tensor for this scheme, got None");
  const int64_t B = check_requests(op, "base_lens", base_lens, p, kivi, k_cache);
  check_dims(op, "path", path, 2, 2);
  check_tensor(op, "path", path, {B, path.size(1)}, ScalarType::Int, k_cache);
  check_tensor(op, "num_keep", num_keep, {B}, ScalarType::Int, k_cache);
  const int32_t* table = page_table ? check_page_table(op, *page_table, B, k_cache) : nullptr;
  Tensor status = output(k_cache, {B}, ScalarType::Int);
  Launch launch(k_cache);
  device::kv_keep({.pages = p,
                   .path = path.const_data_ptr<int32_t>(),
                   .num_keep = num_keep.const_data_ptr<int32_t>(),
                   .page_table = table,
                   .base_lens = base_lens.const_data_ptr<int32_t>(),
                   .status = status.mutable_data_ptr<int32_t>(),
                   .batch = B,
                   .max_keep = path.size(1),
                   .max_pages = page_table ? page_table->size(1) : 0,
                   .page_table_stride = page_table ? stride_of(*page_table, 0) : 0,
                   .path_stride = stride_of(path, 0)},
                  launch.exec());
  launch.check(op);
  return status;
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("kv_append_(Tensor k, Tensor v, Tensor slots, " FD_PAGES_WRITTEN_SCHEMA
        ", Tensor(g!)? q, Tensor? rope, Tensor? positions, bool interleaved) -> Tensor");
  m.def("kv_flush_(" FD_PAGES_WRITTEN_SCHEMA ", Tensor page_table, Tensor begin, Tensor end) -> Tensor");
  m.def("kv_dequant(" FD_PAGES_SCHEMA
        ", Tensor page_table, Tensor kv_lens, Tensor? tail_lens, int head_dim, int length, ScalarType dtype) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("kv_report(Tensor k, Tensor v, " FD_PAGES_SCHEMA
        ", Tensor page_table, Tensor kv_lens, Tensor? tail_lens) -> (Tensor, Tensor)");
  m.def("kv_keep_(" FD_PAGES_WRITTEN_SCHEMA
        ", int head_dim, Tensor path, Tensor num_keep, Tensor? page_table, Tensor base_lens) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("kv_append_", TORCH_BOX(&kv_append));
  m.impl("kv_flush_", TORCH_BOX(&kv_flush));
  m.impl("kv_dequant", TORCH_BOX(&kv_dequant));
  m.impl("kv_report", TORCH_BOX(&kv_report));
  m.impl("kv_keep_", TORCH_BOX(&kv_keep));
}
