// Codes tokens begin[b] .. end[b] - 1 of the rings of a kivi cache into pages (KIVI, Liu et al. 2024). The rings keep
// them: a query before a boundary may still need what a later one sees coded. Codes are a function of the tokens alone.
// Keys: a step and an offset per channel over `group` tokens; values: per token over `group` channels; as kv_append
// codes int4, with 4 or 2 bits.
#pragma once

#include <cstdint>

#include "core/exec.h"
#include "core/kv.h"

namespace fastdecode {

struct KVFlushArgs {
  KVPages pages;              // rings read, pages written
  const int32_t* page_table;  // [batch, max_pages]
  const int32_t* begin;       // [batch], multiples of group
  const int32_t* end;         // [batch], multiples of group, end - begin <= tail_size; <= begin: nothing to do
  int32_t* status;  // [batch], written: 32 bad begin or end, 64 page outside the cache: nothing stored for the
                    // request; 1 NaN or inf, 128 saturated
  int64_t batch, max_pages, page_table_stride;
};

namespace cpu {
void kv_flush(const KVFlushArgs&, const Exec&);
}
namespace cuda {
void kv_flush(const KVFlushArgs&, const Exec&);
}

}  // namespace fastdecode
