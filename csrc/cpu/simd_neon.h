// NEON of 64-bit Arm: four floats. Included by simd.h only.
#pragma once

#include <arm_neon.h>

namespace lk::LK_VARIANT {

constexpr int kWidth = 4;
constexpr int kRegisters = 24;  // vector accumulators a tile may hold, of 32 registers

typedef float32x4_t vf;

LK_INLINE vf zero() { return vdupq_n_f32(0); }
LK_INLINE vf set1(float value) { return vdupq_n_f32(value); }

LK_INLINE vf widen(uint16x4_t raw, bf16) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(raw), 16)); }
LK_INLINE vf widen(uint16x4_t raw, f16) { return vcvt_f32_f16(vreinterpret_f16_u16(raw)); }

// In integers, as every variant does it: BFCVT keeps what a NaN carries.
LK_INLINE uint16x4_t narrow(vf x, bf16) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbsl_u16(vmovn_u32(vceqq_f32(x, x)), vshrn_n_u32(up, 16), vdup_n_u16(0x7fc0));
}
LK_INLINE uint16x4_t narrow(vf x, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

LK_INLINE vf load(const float* p) { return vld1q_f32(p); }
LK_INLINE vf load(const float* p, int64_t n) {
  float part[4] = {};
  memcpy(part, p, size_t(n) * 4);
  return vld1q_f32(part);
}
LK_INLINE void store(float* p, vf x) { vst1q_f32(p, x); }
LK_INLINE void store(float* p, vf x, int64_t n) {
  float part[4];
  vst1q_f32(part, x);
  memcpy(p, part, size_t(n) * 4);
}

template <class T>
LK_INLINE vf load(const T* p) { return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p)), T()); }
template <class T>
LK_INLINE vf load(const T* p, int64_t n) {
  uint16_t part[4] = {};
  memcpy(part, p, size_t(n) * 2);
  return widen(vld1_u16(part), T());
}
template <class T>
LK_INLINE void store(T* p, vf x) { vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(x, T())); }
template <class T>
LK_INLINE void store(T* p, vf x, int64_t n) {
  uint16_t part[4];
  vst1_u16(part, narrow(x, T()));
  memcpy(p, part, size_t(n) * 2);
}

LK_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
LK_INLINE vf sub(vf a, vf b) { return vsubq_f32(a, b); }
LK_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
LK_INLINE vf div(vf a, vf b) { return vdivq_f32(a, b); }
// The second operand where one is NaN, as in the other variants; FMAX and FMAXNM answer otherwise.
LK_INLINE vf max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LK_INLINE vf min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
LK_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
LK_INLINE vf permute(vf x, const int32_t* index) {
  const uint32x4_t lanes = vreinterpretq_u32_s32(vld1q_s32(index));
  const uint32x4_t bytes = vaddq_u32(vmulq_u32(lanes, vdupq_n_u32(0x04040404)), vdupq_n_u32(0x03020100));
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(x), vreinterpretq_u8_u32(bytes)));
}

LK_INLINE float sum(vf x) {
  const float32x2_t s = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}
// Halves of two vectors onto each other: of a, then of b.
LK_INLINE vf half_sums(vf a, vf b) {
  const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
  return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(x, y)), vreinterpretq_f32_f64(vzip2q_f64(x, y)));
}
LK_INLINE void sum4(vf a, vf b, vf c, vf d, float* sums) {
  vst1q_f32(sums, vpaddq_f32(half_sums(a, b), half_sums(c, d)));
}
LK_INLINE void sum4(const vf* v, float* sums) { sum4(v[0], v[1], v[2], v[3], sums); }
LK_INLINE float max_of(vf x) {
  const vf halves = max(x, vextq_f32(x, x, 2));
  return vgetq_lane_f32(max(halves, vextq_f32(halves, halves, 1)), 0);
}

LK_INLINE vf round_int(vf x) { return vrndnq_f32(x); }

LK_INLINE vf exp_fixup(vf x, vf p, vf n) {
  const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(126)), 23);
  vf r = mul(mul(p, vreinterpretq_f32_s32(exponent)), set1(2));
  r = vbslq_f32(vcltq_f32(x, set1(-86.9f)), zero(), r);
  r = vbslq_f32(vcgtq_f32(x, set1(88.72f)), set1(__builtin_inff()), r);
  return vbslq_f32(vceqq_f32(x, x), r, x);
}

LK_INLINE vf split_exponent(vf x, vf* exponent) {
  const int32x4_t bits = vreinterpretq_s32_f32(x);
  const int32x4_t e = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(kSqrtHalfBits)), 23);
  *exponent = vcvtq_f32_s32(e);
  return vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(e, 23)));
}

LK_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
// Into the second-level cache only.
LK_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace lk::LK_VARIANT
