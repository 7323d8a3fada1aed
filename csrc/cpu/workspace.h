// Scratch memory of the calling thread, kept between calls: no allocation after the first call of a size.
#pragma once

#include <cstddef>

namespace lk {

// Uses that may be alive at the same time in one thread.
enum class Workspace : int {
  attention_blocks,
  attention_partials,
  decoder_stack,
  head_logits,
  head_partials,
  head_x,
  head_x_norms,
  kv_rollback,
  linear_norm,
  linear_x,
  rope_table,
  count
};

// At least `bytes` of 64-byte aligned memory, contents undefined, valid until the next call with the same `use`.
// Throws std::bad_alloc.
void* workspace(Workspace use, size_t bytes);

// Bytes this thread's scratch memory holds.
size_t workspace_bytes();

}  // namespace lk
