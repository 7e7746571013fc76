#include "bind/kv.h"

namespace fastdecode::bind {
namespace {

// Exactly this shape and dtype; the last `packed` dims contiguous.
void check_store(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                 ScalarType type, int64_t packed, const Tensor& like) {
  check_tensor(op, name, t, shape, type, like);
  int64_t stride = 1;
  for (int64_t dim = t.dim() - 1; dim >= t.dim() - packed; --dim) {
    FD_CHECK_ARG(t.numel() == 0 || t.size(dim) <= 1 || t.stride(dim) == stride, op, ": ", name, ": expected its last ",
                 packed, " dimensions contiguous, got stride ", t.stride(dim), " in dimension ", dim);
    stride *= t.size(dim);
  }
}

void need(const char* op, const char* name, const OptionalTensor& t, bool wanted) {
  FD_CHECK_ARG(!wanted || t, op, ": ", name, ": expected a tensor for this scheme, got None");
  FD_CHECK_ARG(wanted || !t, op, ": ", name, ": expected None for this scheme, got ", shape_text(*t));
}

ScalarType plain_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return ScalarType::Double;
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat16: return ScalarType::Half;
    default: return ScalarType::BFloat16;
  }
}

// Pages of per-token storage, [P, page_size, H, width].
void check_token_store(const char* op, const char* name, const Tensor& t, const KVPages& p, int64_t width,
                       ScalarType type, const Tensor& like, KVStore& store) {
  check_store(op, name, t, {p.num_pages, p.page_size, p.num_heads, width}, type, 1, like);
  store.data = const_cast<void*>(t.const_data_ptr());
  store.page_stride = stride_of(t, 0);
  store.token_stride = stride_of(t, 1);
  store.head_stride = stride_of(t, 2);
}

void check_token_scale(const char* op, const char* name, const Tensor& t, const KVPages& p, const Tensor& like,
                       KVStore& store) {
  check_store(op, name, t, {p.num_pages, p.page_size, p.num_heads, p.head_dim / p.group, 2}, ScalarType::Half, 2, like);
  store.scale = const_cast<void*>(t.const_data_ptr());
  store.scale_page_stride = stride_of(t, 0);
  store.scale_token_stride = stride_of(t, 1);
  store.scale_head_stride = stride_of(t, 2);
}

void check_fp8_scale(const char* op, const char* name, const Tensor& t, const KVPages& p, const Tensor& like,
                     KVStore& store) {
  store.scale = const_cast<void*>(t.const_data_ptr());
  if (p.static_scale) {
    check_tensor(op, name, t, {p.num_heads}, ScalarType::Float, like);
    store.scale_head_stride = 1;
    return;
  }
  check_store(op, name, t, {p.num_pages, p.page_size, p.num_heads, p.head_dim / p.group}, ScalarType::Float, 1, like);
  store.scale_page_stride = stride_of(t, 0);
  store.scale_token_stride = stride_of(t, 1);
  store.scale_head_stride = stride_of(t, 2);
}

void check_tail(const char* op, const char* name, const Tensor& t, const KVPages& p, const Tensor& like,
                KVStore& store) {
  check_store(op, name, t, {p.tail_batch, p.tail_size, p.num_heads, p.head_dim}, plain_type(p.tail_dtype), 1, like);
  store.tail = const_cast<void*>(t.const_data_ptr());
  store.tail_batch_stride = stride_of(t, 0);
  store.tail_token_stride = stride_of(t, 1);
  store.tail_head_stride = stride_of(t, 2);
}

}  // namespace

DType check_float(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: check_dtype(op, name, t, ScalarType::Float);
  }
  return DType::kFloat32;  // not reached
}

const int32_t* check_page_table(const char* op, const Tensor& table, int64_t rows, const Tensor& like) {
  check_dims(op, "page_table", table, 2, 2);
  check_tensor(op, "page_table", table, {rows, table.size(1)}, ScalarType::Int, like);
  return static_cast<const int32_t*>(table.const_data_ptr());
}

KVPages check_pages(const char* op, const PageTensors& t, int64_t head_dim, const Tensor& like) {
  KVPages p;
  FD_CHECK_ARG(t.scheme >= kKVPlain && t.scheme <= kKVKivi2, op, ": scheme: expected 0..", int64_t{kKVKivi2}, ", got ",
               t.scheme);
  p.scheme = static_cast<KVScheme>(t.scheme);
  p.head_dim = head_dim;
  p.group = t.group;
  const bool kivi = is_kivi(p.scheme), plain = p.scheme == kKVPlain;
  const int64_t bits = code_bits(p.scheme);
  need(op, "k_scale", t.k_scale, !plain);
  need(op, "v_scale", t.v_scale, !plain);
  need(op, "k_tail", t.k_tail, kivi);
  need(op, "v_tail", t.v_tail, kivi);
  check_dims(op, "k_cache", t.k_cache, 4, 4);
  check_dims(op, "v_cache", t.v_cache, 4, 4);
  p.num_pages = t.v_cache.size(0);
  p.page_size = t.v_cache.size(1);
  p.num_heads = t.v_cache.size(2);
  FD_CHECK_ARG(p.page_size > 0, op, ": v_cache: expected pages of at least one token, got ", shape_text(t.v_cache));
  if (plain) {
    p.dtype = check_float(op, "k_cache", t.k_cache);
    p.group = head_dim;
    check_token_store(op, "k_cache", t.k_cache, p, head_dim, plain_type(p.dtype), like, p.k);
    check_token_store(op, "v_cache", t.v_cache, p, head_dim, plain_type(p.dtype), like, p.v);
    return p;
  }
  FD_CHECK_ARG(p.group > 0 && head_dim % p.group == 0, op, ": group: expected a divisor of head_dim ", head_dim,
               ", got ", p.group);
  FD_CHECK_ARG(head_dim * bits % 8 == 0, op, ": head_dim: expected a multiple of ", 8 / bits, " for this scheme, got ",
               head_dim);
  check_token_store(op, "v_cache", t.v_cache, p, head_dim * bits / 8, ScalarType::Byte, like, p.v);
  if (kivi) {
    FD_CHECK_ARG(p.page_size % p.group == 0, op,
                 ": k_cache: expected a page size that is a multiple of the token group ", p.group, ", got ",
                 p.page_size);
    FD_CHECK_ARG(p.group * bits % 8 == 0, op, ": group: expected a multiple of ", 8 / bits, " for this scheme, got ",
                 p.group);
    check_store(op, "k_cache", t.k_cache, {p.num_pages, p.num_heads, head_dim, p.page_size * bits / 8},
                ScalarType::Byte, 2, like);
    p.k.data = const_cast<void*>(t.k_cache.const_data_ptr());
    p.k.page_stride = stride_of(t.k_cache, 0);
    p.k.head_stride = stride_of(t.k_cache, 1);
    check_store(op, "k_scale", *t.k_scale, {p.num_pages, p.num_heads, p.page_size / p.group, 2, head_dim},
                ScalarType::Half, 3, like);
    p.k.scale = const_cast<void*>(t.k_scale->const_data_ptr());
    p.k.scale_page_stride = stride_of(*t.k_scale, 0);
    p.k.scale_head_stride = stride_of(*t.k_scale, 1);
    check_token_scale(op, "v_scale", *t.v_scale, p, like, p.v);
    check_dims(op, "k_tail", *t.k_tail, 4, 4);
    p.tail_dtype = check_float(op, "k_tail", *t.k_tail);
    p.tail_batch = t.k_tail->size(0);
    p.tail_size = t.k_tail->size(1);
    check_tail(op, "k_tail", *t.k_tail, p, like, p.k);
    check_tail(op, "v_tail", *t.v_tail, p, like, p.v);
    return p;
  }
  check_token_store(op, "k_cache", t.k_cache, p, head_dim * bits / 8, ScalarType::Byte, like, p.k);
  if (p.scheme == kKVFp8E4M3 || p.scheme == kKVFp8E5M2) {
    p.static_scale = t.k_scale->dim() == 1;
    check_fp8_scale(op, "k_scale", *t.k_scale, p, like, p.k);
    check_fp8_scale(op, "v_scale", *t.v_scale, p, like, p.v);
  } else {
    check_token_scale(op, "k_scale", *t.k_scale, p, like, p.k);
    check_token_scale(op, "v_scale", *t.v_scale, p, like, p.v);
  }
  return p;
}

}  // namespace fastdecode::bind
