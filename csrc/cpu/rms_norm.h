// rms_norm: out = round(x * rsqrt(mean(x^2) + eps) * weight) per row (Zhang & Sennrich, arXiv 1910.07467).
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

struct RmsNormArgs {
  const void* x;  // [m, c]
  int64_t x_stride;
  const void* weight;  // [c]
  void* residual;      // [m, c] or null: residual = round(residual + x) first, and that is what is normed
  int64_t residual_stride;
  void* out;  // [m, c], may be x
  int64_t out_stride;
  int64_t m, c;
  float eps;
  DType dtype;  // of all four tensors; strides are in elements between rows
  int num_threads;
};

}  // namespace lk
