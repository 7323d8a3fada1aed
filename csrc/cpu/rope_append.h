// rope_append: rotates q in place and appends the window's rotated k, and v, to the cache (RoPE: Su et al., arXiv
// 2104.09864). Element i is paired with i + d/2; row t of sequence b turns by float(position) * inv_freq, a float32
// product, and goes to storage index lengths[b] + t. Rows at and beyond num_queries are left alone.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/variant.h"

namespace lk {

struct RopeAppendArgs {
  void* q;  // [b, t, h, d], strides of the first three dimensions, in elements; same below
  int64_t q_stride[3];
  const void* k;  // [b, t, g, d]
  int64_t k_stride[3];
  const void* v;  // [b, t, g, d]
  int64_t v_stride[3];
  void* k_cache;  // [slots, g, s, d]
  int64_t k_cache_stride[3];
  void* v_cache;
  int64_t v_cache_stride[3];
  const int32_t* lengths;    // [b]
  const int32_t* positions;  // [b, t]
  int64_t positions_stride;
  const float* inv_freq;  // [b, t, d/2]; strides 0 for one vector
  int64_t inv_freq_stride[2];
  float attention_factor;
  const int32_t* slot_ids;     // [b] or null: row i in slot i
  const int32_t* num_queries;  // [b] or null: t
  const float* table;          // what rope_table() wrote for these positions, or null
  int64_t b, t, h, g, d;
  DType dtype;  // of q, k, v and the caches
  int num_threads;
};

namespace LK_VARIANT {

// table [b, t, d]: d/2 cosines, then d/2 sines of each row, times attention_factor. Layers of one window share it.
void rope_table(const RopeAppendArgs& args, float* table);

}  // namespace LK_VARIANT
}  // namespace lk
