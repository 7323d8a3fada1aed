// quantize: rows of a weight in 8 or 4 bits, a scale for each group of columns; the bits of reference/quantize.py.
//
//   8 bits  scale = max|w| / 127, rounded to bfloat16
//   4 bits  scale = w / -8, of the w of largest magnitude, the first of equals, rounded likewise
//   q       w / scale (by 1 where that is 0), rounded to nearest even, limited to -127..127 or -8..7
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

struct QuantizeArgs {
  const void* weight;  // [n, c], rows weight_stride elements apart
  int64_t weight_stride;
  int64_t bits;      // 8 or 4; c is even for 4
  int64_t group;     // a multiple of 64
  uint8_t* values;   // out [n, c * bits / 8], as cpu/quantization.h says
  bf16* scale;       // out [n, ceil(c / group)]
  float* error;      // out [n] or null: Euclidean norm of w - q * scale
  float* norm;       // out [n] or null: Euclidean norm of w
  int64_t* bad_row;  // out [1]: the first row with NaN or infinity in it, which is left undefined; n: there is none
  int64_t n, c;
  DType dtype;  // of weight
  int num_threads;
};

}  // namespace lk
