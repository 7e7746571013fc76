// Compacts the accepted rows of a draft tree: token base_lens[b] + path[b, i] moves to base_lens[b] + i, scales with
// it. In pages of any size; in the ring for kivi. In place: a path rises, so no row is overwritten before it was read.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

struct KVKeepArgs {
  KVPages pages;              // changed
  const int32_t* path;        // [batch, max_keep]: rising slots of the step, slot 0 first; past num_keep not read
  const int32_t* num_keep;    // [batch], 0..max_keep
  const int32_t* page_table;  // [batch, max_pages]; nullptr for kivi, whose pages hold no pending tokens
  const int32_t* base_lens;   // [batch]: tokens before slot 0
  int32_t* status;            // [batch], written: 32 bad path or length, 64 page outside the cache: nothing moved
  int64_t batch, max_keep, max_pages, page_table_stride, path_stride;
};

namespace cpu {
void kv_keep(const KVKeepArgs&, const Exec&);
}
namespace cuda {
void kv_keep(const KVKeepArgs&, const Exec&);
}

}  // namespace fastdecode
