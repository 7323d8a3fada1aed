// kv_rollback: keeps the first keep[b] of the window's positions, or those that path[b] names, and drops the rest:
// lengths += keep. With a path, position path[b, i] moves to i for i < keep, every read before any write. With scrub the
// dropped positions [lengths + keep, lengths + window) become zero.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

struct KvRollbackArgs {
  void* k_cache;  // [layers, slots, g, s, d], strides of the first four dimensions, in elements
  int64_t k_cache_stride[4];
  void* v_cache;
  int64_t v_cache_stride[4];
  int32_t* lengths;         // [b]
  const int32_t* keep;      // [b]
  const int32_t* slot_ids;  // [b] or null: row i in slot i
  const int32_t* path;      // [b, window] or null: the identity
  int64_t path_stride;
  int64_t window;
  bool scrub;
  int64_t layers, b, g, d;
  DType dtype;
  int num_threads;
};

}  // namespace lk
