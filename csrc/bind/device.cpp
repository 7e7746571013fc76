#include "bind/device.h"

#if defined(FD_CUDA)
#include <cuda_runtime.h>

#include <atomic>
#elif !defined(FD_SIMT)
#include "bind/runtime.h"
#endif

namespace fastdecode::bind {
namespace {

const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

std::string device_text(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device()) : "another device";
}

template <class Sizes>
std::string join(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

}  // namespace

std::string shape_text(const Tensor& t) { return join(t.sizes()); }
std::string shape_text(std::initializer_list<int64_t> shape) { return join(shape); }

void check_dims(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high) {
  if (low == high) {
    FD_CHECK_ARG(t.dim() == low, op, ": ", name, ": expected ", low, " dimensions, got ", shape_text(t));
  } else {
    FD_CHECK_ARG(t.dim() >= low && t.dim() <= high, op, ": ", name, ": expected ", low, " to ", high,
                 " dimensions, got ", shape_text(t));
  }
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  FD_CHECK_ARG(t.scalar_type() == dtype, op, ": ", name, ": expected ", dtype_text(dtype), ", got ",
               dtype_text(t.scalar_type()));
}

void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  FD_CHECK_ARG(last < 0 || t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, op, ": ", name,
               ": expected a contiguous last dimension, got stride ", t.stride(last));
}

void check_written(const char* op, const char* name, const Tensor& t) {
  for (int64_t dim = 0; dim < t.dim(); ++dim)
    FD_CHECK_ARG(t.size(dim) <= 1 || t.stride(dim) != 0 || t.numel() == 0, op, ": ", name,
                 ": expected a place for every element, because it is changed, got stride 0 in dimension ", dim);
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  FD_CHECK_ARG(t.is_cpu() == like.is_cpu() && t.get_device() == like.get_device(), op, ": ", name, ": expected ",
               device_text(like), ", got ", device_text(t));
}

void check_tensor(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                  ScalarType dtype, const Tensor& like) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) same = same && t.size(dim++) == size;
  FD_CHECK_ARG(same, op, ": ", name, ": expected ", shape_text(shape), ", got ", shape_text(t));
  check_dtype(op, name, t, dtype);
  check_device(op, name, t, like);
  check_last_contiguous(op, name, t);
}

void check_optional(const char* op, const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape,
                    ScalarType dtype, const Tensor& like) {
  if (t) check_tensor(op, name, *t, shape, dtype, like);
}

DType check_rows(const char* op, const char* name, const Tensor& t, int64_t low, int64_t high) {
  check_dims(op, name, t, low, high);
  check_last_contiguous(op, name, t);
  FD_CHECK_ARG(t.size(t.dim() - 1) > 0, op, ": ", name, ": expected a vocabulary of at least 1, got ", shape_text(t));
  FD_CHECK_ARG(t.size(t.dim() - 1) <= kMaxVocabSize, op, ": ", name, ": expected a vocabulary of at most ",
               kMaxVocabSize, ", got ", shape_text(t));
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      fail_arg(op, ": ", name, ": expected float64, float32, float16 or bfloat16, got ", dtype_text(t.scalar_type()));
  }
}

ScalarType output_dtype(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; }

Tensor output(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

#if defined(FD_CUDA)

namespace {

int32_t count_sms(int32_t device) {
  static std::atomic<int32_t> known[64];
  int32_t count = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  if (device < 64) known[device].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace

Launch::Launch(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &exec_.stream));
  exec_.num_sms = count_sms(like.get_device_index());
}

void Launch::check(const char* op) const {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

#elif defined(FD_SIMT)

// Enough multiprocessors that rows are cut into parts, few enough that some rows are not.
Launch::Launch(const Tensor& like) : like_(like) { exec_.num_sms = 4; }

void Launch::check(const char*) const {}

#else

namespace {

void torch_parallel_for(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

}  // namespace

Launch::Launch(const Tensor& like) : like_(like) {
  exec_.parallel_for = torch_parallel_for;
  exec_.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
  exec_.cpu_level = current_cpu_level();
}

void Launch::check(const char*) const {}

#endif

void* Launch::scratch(int64_t bytes) {
  scratch_ = output(like_, {bytes}, ScalarType::Byte);
  return scratch_->mutable_data_ptr();
}

}  // namespace fastdecode::bind
