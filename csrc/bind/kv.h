// Adapter pieces shared by the ops on a paged cache (core/kv.h).
#pragma once

#include "bind/device.h"
#include "core/kv.h"

namespace fastdecode::bind {

// A cache as it crosses the boundary: in a schema, as parameters of an adapter, as an argument of check_pages. Ops that
// only read it use FD_PAGES_SCHEMA, those that write it spell out which tensors they change.
#define FD_PAGES_SCHEMA                                                                                                \
  "Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor? k_tail, Tensor? v_tail, int scheme, int " \
  "group"
#define FD_PAGES_WRITTEN_SCHEMA                                                                            \
  "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor(e!)? k_tail, " \
  "Tensor(f!)? v_tail, int scheme, int group"
#define FD_PAGES_PARAMS                                                                                       \
  const Tensor &k_cache, const Tensor &v_cache, const OptionalTensor &k_scale, const OptionalTensor &v_scale, \
      const OptionalTensor &k_tail, const OptionalTensor &v_tail, int64_t scheme, int64_t group
#define FD_PAGES {k_cache, v_cache, k_scale, v_scale, k_tail, v_tail, scheme, group}

struct PageTensors {
  const Tensor &k_cache, &v_cache;
  const OptionalTensor &k_scale, &v_scale, &k_tail, &v_tail;
  int64_t scheme, group;
};

// Everything about the tensors is checked here; their logical shapes, whatever the order in memory:
//   caches  plain [P, page_size, H, D]; fp8, int8 uint8 the same; int4 uint8 [P, page_size, H, D / 2]
//           kivi  keys uint8 [P, H, D, page_size * b / 8], values uint8 [P, page_size, H, D * b / 8]
//   scales  fp8 float32 [P, page_size, H, D / group] or [H]; int8, int4 float16 [P, page_size, H, D / group, 2]
//           kivi keys float16 [P, H, page_size / group, 2, D], values as int4
//   tails   kivi [B, tail_size, H, D], any float dtype
// head_dim is that of the op's own tensors (for plain it is checked against the caches).
KVPages check_pages(const char* op, const PageTensors& t, int64_t head_dim, const Tensor& like);

// float64, float32, float16 or bfloat16.
DType check_float(const char* op, const char* name, const Tensor& t);

// int32 [rows, max_pages], last dim contiguous, on the device of `like`.
const int32_t* check_page_table(const char* op, const Tensor& table, int64_t rows, const Tensor& like);

}  // namespace fastdecode::bind
