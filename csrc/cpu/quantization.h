// How a weight in 8 or 4 bits is stored: w[n, c] = scale[n, c / group] * q[n, c] + offset[n, c / group].
//
// 8 bits: q is int8 [n, c]. 4 bits: bytes [n, c / 2], column 2i in the low nibble of byte i, 2i + 1 above; q = nibble - 8.
#pragma once

#include <cstdint>

namespace lk {

// Eight bytes a field: Python passes some as an array of int64.
struct Quantization {
  int64_t bits;       // 0: the weight is stored in the call's dtype, and nothing else here matters
  int64_t group;      // a multiple of 64
  const void* scale;  // [n, ceil(c / group)] of scale_dtype, rows scale_stride elements apart
  int64_t scale_stride;
  int64_t scale_dtype;  // a DType: f32 or bf16
  const float* offset;  // as scale, in float, or null
  int64_t offset_stride;
};

// A weight [n, c], rows `stride` elements apart (bytes, where it is quantized).
struct Matrix {
  const void* data;
  int64_t stride;
  int64_t n;
  const Quantization& quantization;
};

}  // namespace lk
