#include "attention/merge_states.h"
#include "attention/paged_attention.h"
#include "attention/prefix_attention.h"
#include "bind/kv.h"

namespace fastdecode::bind {
namespace {

constexpr int64_t kMaxAttentionHeadDim = 256;

// What both ops ask of queries [..., num_q_heads, head_dim].
DType check_queries(const char* op, const Tensor& q, int64_t dims) {
  check_dims(op, "q", q, dims, dims);
  const DType dtype = check_float(op, "q", q);
  check_last_contiguous(op, "q", q);
  const int64_t head_dim = q.size(dims - 1);
  FD_CHECK_ARG(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kMaxAttentionHeadDim, op,
               ": q: expected a head_dim that is a multiple of 16 up to ", kMaxAttentionHeadDim, ", got ",
               shape_text(q));
  return dtype;
}

void check_heads(const char* op, const KVPages& pages, int64_t num_q_heads) {
  FD_CHECK_ARG(pages.num_heads > 0 && num_q_heads % pages.num_heads == 0, op,
               ": q: expected a multiple of the cache's ", pages.num_heads, " heads, got ", num_q_heads);
}

void check_softcap(const char* op, double softcap, double scale) {
  FD_CHECK_ARG(softcap == 0 || (softcap > 1e-30 && softcap < 1e30), op,
               ": softcap: expected 0 (off), or more than 1e-30 and less than 1e30, got ", softcap);
  FD_CHECK_ARG(scale > -1e30 && scale < 1e30, op, ": scale: expected a finite number, got ", scale);
}

std::tuple<Tensor, Tensor, Tensor> paged_attention(const Tensor& q, FD_PAGES_PARAMS, const Tensor& page_table,
                                                   const Tensor& kv_lens, const OptionalTensor& num_queries,
                                                   const OptionalTensor& tail_lens, const OptionalTensor& coded_lens,
                                                   const OptionalTensor& tree_mask, bool causal, int64_t window,
                                                   double softcap, double scale) {
  constexpr auto op = "paged_attention";
  const DType dtype = check_queries(op, q, 4);
  const int64_t batch = q.size(0), slots = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const KVPages pages = check_pages(op, FD_PAGES, head_dim, q);
  check_heads(op, pages, heads);
  const int32_t* table = check_page_table(op, page_table, batch, q);
  check_tensor(op, "kv_lens", kv_lens, {batch}, ScalarType::Int, q);
  check_optional(op, "num_queries", num_queries, {batch}, ScalarType::Int, q);
  const bool kivi = is_kivi(pages.scheme);
  FD_CHECK_ARG(kivi || !tail_lens, op, ": tail_lens: expected None for a scheme without a ring, got ",
               shape_text(*tail_lens));
  FD_CHECK_ARG(kivi || !coded_lens, op, ": coded_lens: expected None for a scheme without a ring, got ",
               shape_text(*coded_lens));
  FD_CHECK_ARG(!kivi || tail_lens, op, ": tail_lens: expected a tensor for a scheme with a ring, got None");
  FD_CHECK_ARG(!kivi || pages.tail_batch == batch, op, ": k_tail: expected rings for ", batch, " requests, got ",
               shape_text(*k_tail));
  check_optional(op, "tail_lens", tail_lens, {batch}, ScalarType::Int, q);
  check_optional(op, "coded_lens", coded_lens, {batch, slots}, ScalarType::Int, q);
  FD_CHECK_ARG(!coded_lens || coded_lens->is_contiguous(), op,
               ": coded_lens: expected a contiguous tensor, got a strided one");
  check_optional(op, "tree_mask", tree_mask, {batch, slots, (slots + 31) / 32}, ScalarType::Int, q);
  FD_CHECK_ARG(!tree_mask || tree_mask->is_contiguous(), op,
               ": tree_mask: expected a contiguous tensor, got a strided one");
  FD_CHECK_ARG(causal || !tree_mask, op, ": causal: expected True beside a tree_mask, got False");
  FD_CHECK_ARG(window >= 0 && window < int64_t{1} << 31, op, ": window: expected 0 (off) to 2^31 - 1, got ", window);
  check_softcap(op, softcap, scale);

  Tensor out = output(q, {batch, slots, heads, head_dim}, q.scalar_type());
  Tensor lse = output(q, {batch, slots, heads}, output_dtype(dtype));
  Tensor status = output(q, {batch}, ScalarType::Int);
  Launch launch(q);
  PagedAttentionArgs args{.q = q.const_data_ptr(),
                          .pages = pages,
                          .page_table = table,
                          .kv_lens = kv_lens.const_data_ptr<int32_t>(),
                          .num_queries = data_of<int32_t>(num_queries),
                          .tail_lens = data_of<int32_t>(tail_lens),
                          .coded_lens = data_of<int32_t>(coded_lens),
                          .tree_mask = data_of<int32_t>(tree_mask),
                          .out = out.mutable_data_ptr(),
                          .lse = lse.mutable_data_ptr(),
                          .status = status.mutable_data_ptr<int32_t>(),
                          .scratch = nullptr,
                          .batch = batch,
                          .num_slots = slots,
                          .num_q_heads = heads,
                          .max_pages = page_table.size(1),
                          .page_table_stride = stride_of(page_table, 0),
                          .q_batch_stride = stride_of(q, 0),
                          .q_slot_stride = stride_of(q, 1),
                          .q_head_stride = stride_of(q, 2),
                          .window = window,
                          .scale = scale,
                          .softcap = softcap,
                          .causal = causal,
                          .dtype = dtype};
  args.scratch = launch.scratch(device::paged_attention_scratch_bytes(args, launch.exec()));
  device::paged_attention(args, launch.exec());
  launch.check(op);
  return {out, lse, status};
}

std::tuple<Tensor, Tensor, Tensor> prefix_attention(const Tensor& q, FD_PAGES_PARAMS, const Tensor& group_start,
                                                    const Tensor& page_table, const Tensor& prefix_lens, double softcap,
                                                    double scale) {
  constexpr auto op = "prefix_attention";
  const DType dtype = check_queries(op, q, 3);
  const int64_t rows = q.size(0), heads = q.size(1), head_dim = q.size(2);
  const KVPages pages = check_pages(op, FD_PAGES, head_dim, q);
  check_heads(op, pages, heads);
  check_dims(op, "group_start", group_start, 1, 1);
  FD_CHECK_ARG(group_start.size(0) > 0, op, ": group_start: expected [groups + 1], got [0]");
  const int64_t groups = group_start.size(0) - 1;
  check_tensor(op, "group_start", group_start, {groups + 1}, ScalarType::Int, q);
  const int32_t* table = check_page_table(op, page_table, groups, q);
  check_tensor(op, "prefix_lens", prefix_lens, {groups}, ScalarType::Int, q);
  check_softcap(op, softcap, scale);

  Tensor out = output(q, {rows, heads, head_dim}, q.scalar_type());
  Tensor lse = output(q, {rows, heads}, output_dtype(dtype));
  Tensor status = output(q, {groups}, ScalarType::Int);
  Launch launch(q);
  PrefixAttentionArgs args{.q = q.const_data_ptr(),
                           .pages = pages,
                           .group_start = group_start.const_data_ptr<int32_t>(),
                           .page_table = table,
                           .prefix_lens = prefix_lens.const_data_ptr<int32_t>(),
                           .out = out.mutable_data_ptr(),
                           .lse = lse.mutable_data_ptr(),
                           .status = status.mutable_data_ptr<int32_t>(),
                           .scratch = nullptr,
                           .num_rows = rows,
                           .num_groups = groups,
                           .num_q_heads = heads,
                           .max_pages = page_table.size(1),
                           .page_table_stride = stride_of(page_table, 0),
                           .q_row_stride = stride_of(q, 0),
                           .q_head_stride = stride_of(q, 1),
                           .scale = scale,
                           .softcap = softcap,
                           .dtype = dtype};
  args.scratch = launch.scratch(device::prefix_attention_scratch_bytes(args, launch.exec()));
  device::prefix_attention(args, launch.exec());
  launch.check(op);
  return {out, lse, status};
}

std::tuple<Tensor, Tensor> merge_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  constexpr auto op = "merge_states";
  const auto states = static_cast<int64_t>(outs.size());
  FD_CHECK_ARG(states >= 1 && states <= kMaxStates, op, ": outs: expected 1 to ", kMaxStates, " states, got ", states);
  FD_CHECK_ARG(lses.size() == outs.size(), op, ": lses: expected ", states, " states, got ", lses.size());
  const Tensor& first = outs[0];
  check_dims(op, "outs", first, 3, 3);
  const int64_t rows = first.size(0), heads = first.size(1), head_dim = first.size(2);
  MergeStatesArgs args{};
  args.dtype = check_float(op, "outs", first);
  const ScalarType lse_type = output_dtype(args.dtype);
  for (int64_t i = 0; i < states; ++i) {
    check_tensor(op, "outs", outs[i], {rows, heads, head_dim}, first.scalar_type(), first);
    check_tensor(op, "lses", lses[i], {rows, heads}, lse_type, first);
    FD_CHECK_ARG(outs[i].is_contiguous(), op, ": outs: expected contiguous tensors, got a strided one");
    FD_CHECK_ARG(lses[i].is_contiguous(), op, ": lses: expected contiguous tensors, got a strided one");
    args.outs[i] = outs[i].const_data_ptr();
    args.lses[i] = lses[i].const_data_ptr();
  }
  Tensor out = output(first, {rows, heads, head_dim}, first.scalar_type());
  Tensor lse = output(first, {rows, heads}, lse_type);
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.num_states = states;
  args.num_rows = rows;
  args.num_heads = heads;
  args.head_dim = head_dim;
  Launch launch(first);
  device::merge_states(args, launch.exec());
  launch.check(op);
  return {out, lse};
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("paged_attention(Tensor q, " FD_PAGES_SCHEMA
        ", Tensor page_table, Tensor kv_lens, Tensor? num_queries, Tensor? tail_lens, Tensor? coded_lens, Tensor? "
        "tree_mask, bool causal, int window, float softcap, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("prefix_attention(Tensor q, " FD_PAGES_SCHEMA
        ", Tensor group_start, Tensor page_table, Tensor prefix_lens, float softcap, float scale) -> (Tensor, Tensor, "
        "Tensor)");
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("prefix_attention", TORCH_BOX(&prefix_attention));
  m.impl("merge_states", TORCH_BOX(&merge_states));
}
