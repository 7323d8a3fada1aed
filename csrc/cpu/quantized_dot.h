// How weights in 8 and 4 bits come apart, and are multiplied with packed x. Most variants do it in words of 16 bits, one
// has instructions for bytes; what both are given and return is the same. They define, for a vector of kWidth lanes:
//
// Sums           what the products of a weight row and a packed row are summed in, exactly: x is at most 2^15 and a weight
//                2^7 in magnitude, and a lane sums at most 64 products, so 2^28
// kSumRegisters  registers of one
// kAddsAtOnce    products are added by one instruction, without a register in between
// start, total   Sums from int32 lanes, and back
// add_steps      sums[j][i] + products of one vector of each weight row, w_stride apart, and as many steps of packed row i,
//                x_step apart. A 32-bit lane holds four columns of each step: see cpu/quantization.h
// add_nibbles    the same for a block in order with 4 bits: half a vector of each weight row
// add_x          sums of packed x itself
// place          four columns of packed x to lane `lane` of their step
#pragma once

#include "cpu/dot.h"
#include "cpu/quantized_unit.h"

namespace lk::LK_VARIANT {

constexpr int kWords = 2 * kWidth;        // 16-bit lanes of a vector
constexpr int kHalves = kLanes / kWidth;  // vectors of a step; each is gone through by itself

typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));

template <class V>
LK_INLINE V load_vector(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

// A vector of weights holds kSteps steps.
template <int kBits>
struct Stored {
  static constexpr int64_t kBytes = 8 * kBits;  // of a block
  static constexpr int kSteps = 8 / kBits;
};

}  // namespace lk::LK_VARIANT

#if defined(LK_VARIANT_NEON_BF16)
#include "cpu/quantized_bytes.h"
#else
#include "cpu/quantized_words.h"
#endif
