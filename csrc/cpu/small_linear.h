// small_linear: x @ W^T for few rows, one or several weights that share x, reading each weight once.
//
//   normed = norm_weight ? rms_norm(x, norm_weight, norm_eps) : x        (bits of the op of that name)
//   y      = round(sum over c of normed * w + bias)                              (normed in 16 bits where w is quantized)
//   out    = residual ? round(residual + y) : y
//
// The sum over c has one order, a function of c, the dtype and the variant, whatever m, the tile or the thread.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/quantization.h"

namespace lk {

struct LinearWeight {
  const void* data;  // [n, c], rows `stride` elements apart; see `quantization`
  int64_t stride;
  int64_t n;
  const void* bias;  // [n] or null
  void* out;         // [m, n], may be the residual; not x
  int64_t out_stride;
  Quantization quantization = {};  // all weights of a call in as many bits
};

struct SmallLinearArgs {
  const void* x;  // [m, c]
  int64_t x_stride;
  int64_t m, c;
  const LinearWeight* weights;
  int64_t num_weights;
  const void* norm_weight;  // [c] or null
  float norm_eps;
  const void* residual;  // [m, n] or null; with a single weight only
  int64_t residual_stride;
  DType dtype;  // of every tensor; quantized weights have their own
  int num_threads;
};

}  // namespace lk
