// verify_attention: softmax(scale * q k^T) v of each sequence's window over its own ragged cache (grouped query heads).
// Row t of sequence b sees storage [0, lengths[b]) and the window rows u <= t at lengths[b] + u, or those with
// tree_mask[t, u]; with a sliding window only positions > lengths[b] + t - sliding_window. Rows at and beyond
// num_queries[b] become zero.
//
// The order of every sum is a function of the row's position alone: keys are taken in chunks of 128 at absolute
// multiples, each gives a maximum, a sum of exponentials and a weighted sum of values, and these are added in rising
// order (Rabe & Staats, arXiv 2112.05682). A short row is the case of one chunk, by the same code.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

struct VerifyAttentionArgs {
  const void* q;  // [b, t, h, d], strides of the first three dimensions, in elements; same below
  int64_t q_stride[3];
  const void* k_cache;  // [slots, g, s, d]
  int64_t k_cache_stride[3];
  const void* v_cache;
  int64_t v_cache_stride[3];
  void* out;  // [b, t, h, d]
  int64_t out_stride[3];
  const int32_t* lengths;      // [b]
  const int32_t* slot_ids;     // [b] or null: row i in slot i
  const int32_t* num_queries;  // [b] or null: t
  const bool* tree_mask;       // [t, t] or null
  int64_t tree_mask_stride;
  int64_t sliding_window;  // 0: none
  float scale;
  int64_t b, t, h, g, d;
  DType dtype;  // of q, the caches and out
  int num_threads;
};

}  // namespace lk
