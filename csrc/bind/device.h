// Adapters are compiled once per backend: into _C_cpu, with FD_CUDA into _C_cuda, with FD_SIMT into _C_simt.
// What every adapter needs of torch: argument checks, output allocation, and the Exec of the tensors' device.
// Stable ABI only, at target 2.10: one binary for every torch from there on.
#pragma once

#if defined(FD_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/enums.h"
#include "core/exec.h"

// Version bytes are hexadecimal; a slip here would silently target a torch from the future.
static_assert(TORCH_TARGET_VERSION == 0x020a000000000000, "the stable ABI target is torch 2.10");

namespace fastdecode {

namespace cpu {}
namespace cuda {}
#if defined(FD_CUDA) || defined(FD_SIMT)
namespace device = cuda;
#else
namespace device = cpu;
#endif

namespace bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string shape_text(const Tensor& t);
std::string shape_text(std::initializer_list<int64_t> shape);

// `dims` dimensions (two allowed numbers), this dtype, last dimension contiguous.
void check_dims(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high);
void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype);
void check_last_contiguous(const char* op, const char* name, const Tensor& t);
void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like);

// Exactly this shape and dtype, on the device of `like`, last dimension contiguous.
void check_tensor(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                  ScalarType dtype, const Tensor& like);
void check_optional(const char* op, const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape,
                    ScalarType dtype, const Tensor& like);

// A tensor that is written: no two elements in one place (an expanded tensor).
void check_written(const char* op, const char* name, const Tensor& t);

// Rows of logits or probabilities: `dims` in low..high, a listed dtype, last dimension contiguous and not empty.
DType check_rows(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high);

// dtype of an op's float outputs.
ScalarType output_dtype(DType dtype);

// Elements between neighbours of `dim`; 0 for dimensions of size 1 or less, whose stride means nothing.
int64_t stride_of(const Tensor& t, int64_t dim);

template <class T>
const T* data_of(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Output buffer on the device of `like`.
Tensor output(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype);

// Where an op runs, as Exec: torch's threads; or the device of `like`, made the current one, and its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& like);
  const Exec& exec() const { return exec_; }

  // After the op: throws if a kernel could not be launched.
  void check(const char* op) const;

  // Uninitialised bytes that live as long as this launch.
  void* scratch(int64_t bytes);

 private:
  Tensor like_;
#if defined(FD_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Exec exec_;
  OptionalTensor scratch_;
};

}  // namespace bind
}  // namespace fastdecode
