// Products of quantized weights in bytes, four of them a lane and instruction: see quantized_dot.h, which includes this.
//
// x = 256 * high + low, high signed and low not. Packed, a step of a row is its 64 high bytes and then its 64 low ones, in
// the order of the weights: [16 lanes, 4 columns].
#pragma once

namespace lk::LK_VARIANT {

struct Sums {
  int32x4_t high, low;
};
constexpr int kSumRegisters = 2;
constexpr bool kAddsAtOnce = true;
LK_INLINE Sums start(Ints lanes) { return {vdupq_n_s32(0), int32x4_t(lanes)}; }
LK_INLINE Ints total(Sums sums) { return Ints(vaddq_s32(vshlq_n_s32(sums.high, 8), sums.low)); }

LK_INLINE Sums add_bytes(Sums sums, int8x16_t w, int8x16_t high, uint8x16_t low) {
  return {vdotq_s32(sums.high, w, high), vusdotq_s32(sums.low, low, w)};
}

template <int kRows, int kCols>
LK_INLINE void add_step(Sums (&sums)[kRows][kCols], const int8x16_t (&w)[kRows], const int16_t* x) {
  LK_UNROLL for (int i = 0; i < kCols; ++i, x += kBlock) {
    const int8x16_t high = vld1q_s8(reinterpret_cast<const int8_t*>(x));
    const uint8x16_t low = vld1q_u8(reinterpret_cast<const uint8_t*>(x + kBlock / 2));
    LK_UNROLL for (int j = 0; j < kRows; ++j) sums[j][i] = add_bytes(sums[j][i], w[j], high, low);
  }
}

template <int kBits, int kRows, int kCols>
LK_INLINE void add_steps(Sums (&sums)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x, int64_t x_step) {
  uint8x16_t stored[kRows];
  int8x16_t step[kRows];
  LK_UNROLL for (int j = 0; j < kRows; ++j) stored[j] = vld1q_u8(w + j * w_stride);
  if constexpr (kBits == 8) {
    LK_UNROLL for (int j = 0; j < kRows; ++j) step[j] = vreinterpretq_s8_u8(stored[j]);
    add_step(sums, step, x);
  } else {
    LK_UNROLL for (int j = 0; j < kRows; ++j) step[j] = vreinterpretq_s8_u8(vandq_u8(stored[j], vdupq_n_u8(15)));
    add_step(sums, step, x);
    LK_UNROLL for (int j = 0; j < kRows; ++j) step[j] = vreinterpretq_s8_u8(vshrq_n_u8(stored[j], 4));
    add_step(sums, step, x + x_step);
  }
}

template <int kRows, int kCols>
LK_INLINE void add_nibbles(Sums (&sums)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x) {
  int8x16_t step[kRows];
  LK_UNROLL for (int j = 0; j < kRows; ++j) {
    const uint8x8_t pairs = vld1_u8(w + j * w_stride);
    const uint8x8_t even = vand_u8(pairs, vdup_n_u8(15)), odd = vshr_n_u8(pairs, 4);
    step[j] = vreinterpretq_s8_u8(vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd)));
  }
  add_step(sums, step, x);
}

// `step` is packed x, from the bytes of the half that is summed on.
LK_INLINE Sums add_x(Sums sums, const int16_t* step) {
  return add_bytes(sums, vdupq_n_s8(1), vld1q_s8(reinterpret_cast<const int8_t*>(step)),
                   vld1q_u8(reinterpret_cast<const uint8_t*>(step + kBlock / 2)));
}

LK_INLINE void place(const int32_t* four, int64_t lane, int16_t* step) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(step) + lane * 4;
  for (int i = 0; i < 4; ++i) {
    bytes[i] = uint8_t(uint32_t(four[i]) >> 8);
    bytes[i + kBlock] = uint8_t(four[i]);
  }
}

}  // namespace lk::LK_VARIANT
