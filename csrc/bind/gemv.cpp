#include "bind/device.h"
#include "gemv/linear.h"

namespace fastdecode::bind {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
              const OptionalTensor& residual) {
  constexpr auto op = "linear";
  check_dims(op, "x", x, 2, 2);
  check_last_contiguous(op, "x", x);
  const int64_t M = x.size(0), K = x.size(1), N = out_features;
  const ScalarType type = x.scalar_type();
  FD_CHECK_ARG(type == ScalarType::Float || type == ScalarType::Double, op, ": x: expected float32 or float64");
  FD_CHECK_ARG(N >= 0, op, ": out_features: expected at least 0, got ", N);
  check_tensor(op, "weight", weight, {(N + kPanel - 1) / kPanel, K, kPanel}, type, x);
  FD_CHECK_ARG(weight.is_contiguous(), op, ": weight: expected a contiguous tensor, as pack_weight makes it");
  check_optional(op, "bias", bias, {N}, type, x);
  check_optional(op, "residual", residual, {M, N}, type, x);
  Tensor y = output(x, {M, N}, type);
  Launch launch(x);
  device::linear({.x = x.const_data_ptr(),
                  .weight = weight.const_data_ptr(),
                  .bias = data_of<void>(bias),
                  .residual = data_of<void>(residual),
                  .y = y.mutable_data_ptr(),
                  .M = M,
                  .N = N,
                  .K = K,
                  .x_stride = stride_of(x, 0),
                  .residual_stride = residual ? stride_of(*residual, 0) : 0,
                  .dtype = type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32},
                 launch.exec());
  launch.check(op);
  return y;
}

}  // namespace
}  // namespace fastdecode::bind

#ifndef FD_CUDA  // _C_cpu, which is always loaded first, has them
STABLE_TORCH_LIBRARY_FRAGMENT(FD_NAMESPACE, m) {
  m.def("linear(Tensor x, Tensor weight, int out_features, Tensor? bias, Tensor? residual) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FD_NAMESPACE, FD_DISPATCH_KEY, m) {
  using namespace fastdecode::bind;
  m.impl("linear", TORCH_BOX(&linear));
}
