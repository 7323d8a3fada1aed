// decoder_stack: a range of Llama-style decoder layers over each sequence's window, out of the other ops' kernels, in one
// call. Per layer:
//
//   q, k, v = small_linear(hidden, [q, k, v], norm = attn_norm);  q, k = rms_norm per head, where there are such weights
//   rope_append;  hidden += small_linear(verify_attention, o)
//   gate, up = small_linear(hidden, [gate, up], norm = mlp_norm);  hidden += small_linear(swiglu(gate, up), down)
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/quantization.h"

namespace lk {

struct StackLinear {
  const void* data;  // [n, inputs], rows `stride` elements apart; see `quantization`
  int64_t stride;
  int64_t n;
  const void* bias;  // [n] or null
  Quantization quantization = {};
};

// Eight bytes a field: Python passes layers as an array of int64, in this order.
struct StackLayer {
  const void* attn_norm;  // [c]
  StackLinear q, k, v, o;
  const void* mlp_norm;  // [c]
  StackLinear gate, up, down;
  const void* q_norm;  // [d] or null, both or neither
  const void* k_norm;
  int64_t sliding_window;  // 0: none
  int64_t use_rope;
};

struct DecoderStackArgs {
  void* hidden;  // [b, t, c], in place
  int64_t hidden_stride[2];
  const StackLayer* layers;
  int64_t num_layers;
  void* k_cache;  // [num_layers, slots, g, s, d], strides of the first four dimensions, in elements
  int64_t k_cache_stride[4];
  void* v_cache;
  int64_t v_cache_stride[4];
  float eps, scale;
  const int32_t* lengths;    // [b]
  const int32_t* positions;  // [b, t]
  int64_t positions_stride;
  const float* inv_freq;  // [b, t, d/2]; strides 0 for one vector
  int64_t inv_freq_stride[2];
  float attention_factor;
  const int32_t* slot_ids;     // [b] or null: row i in slot i
  const int32_t* num_queries;  // [b] or null: t
  int64_t b, t, c, g, d;
  DType dtype;  // of hidden, weights and caches
  int num_threads;
};

}  // namespace lk
