#include "bind/device.h"
#include "tree/tree_check.h"
#include "tree/tree_mask.h"

namespace fastdecode::bind {
namespace {

void check_tree(const char* op, const Tensor& parents, const OptionalTensor& num_nodes) {
  check_dims(op, "parents", parents, 2, 2);
  check_dtype(op, "parents", parents, ScalarType::Int);
  check_last_contiguous(op, "parents", parents);
  FD_CHECK_ARG(parents.size(1) <= kMaxTreeSlots, op, ": parents: expected at most ", kMaxTreeSlots, " slots, got ",
               shape_text(parents));
  check_optional(op, "num_nodes", num_nodes, {parents.size(0)}, ScalarType::Int, parents);
}

Tensor tree_check(const Tensor& parents, const OptionalTensor& num_nodes) {
  constexpr auto op = "tree_check";
  check_tree(op, parents, num_nodes);
  Tensor code = output(parents, {parents.size(0)}, ScalarType::Int);
  Launch launch(parents);
  device::tree_check({.parents = parents.const_data_ptr<int32_t>(),
                      .num_nodes = data_of<int32_t>(num_nodes),
                      .code = code.mutable_data_ptr<int32_t>(),
                      .batch = parents.size(0),
                      .num_slots = parents.size(1),
                      .parent_stride = stride_of(parents, 0)},
                     launch.exec());
  launch.check(op);
  return code;
}

std::tuple<Tensor, Tensor> tree_mask(const Tensor& parents, const OptionalTensor& num_nodes) {
  constexpr auto op = "tree_mask";
  check_tree(op, parents, num_nodes);
  const int64_t B = parents.size(0), N = parents.size(1);
  Tensor mask = output(parents, {B, N, (N + 31) / 32}, ScalarType::Int);
  Tensor depths = output(parents, {B, N}, ScalarType::Int);
  Launch launch(parents);
  device::tree_mask({.parents = parents.const_data_ptr<int32_t>(),
                     .num_nodes = data_of<int32_t>(num_nodes),
                     .mask = mask.mutable_data_ptr<int32_t>(),
                     .depths = depths.mutable_data_ptr<int32_t>(),
                     .batch = B,
                     .num_slots = N,
                     .parent_stride = stride_of(parents, 0)},
                    launch.exec());
  launch.check(op);
  return {mask, depths};
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("tree_check(Tensor parents, Tensor? num_nodes) -> Tensor");
  m.def("tree_mask(Tensor parents, Tensor? num_nodes) -> (Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("tree_check", TORCH_BOX(&tree_check));
  m.impl("tree_mask", TORCH_BOX(&tree_mask));
}
