// How a weight in 8 or 4 bits is stored: w[n, c] = scale[n, c / group] * q[n, c] + offset[n, c / group].
//
// A row's q lie in the order in which products take them, so that a lane of a vector sums columns of one group alone, and
// many of them before their scale is due. Blocks of 64 columns come in units: of 16 blocks as long as there are so many,
// then of 8, 4, 2 and 1. A unit of b blocks is 16 lanes times 4 b consecutive columns, stored with lanes and columns
// exchanged, four columns at a time: [b steps, 16 lanes, 4 columns]. What is left, less than a block, is in order.
//
// 8 bits: q is int8 [n, c]. 4 bits: bytes [n, c / 2] of q + 8, of an even step in the low nibble and of the next step in
// the high one; in a unit of one block and in what is left, of column 2i in the low nibble of byte i and 2i + 1 above.
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
