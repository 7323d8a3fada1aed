// NEON for x86: what the kernels use of <arm_neon.h>, with the documented results (Arm's intrinsics reference; BFDOT after
// the manual's pseudocode: products and sums one after the other, rounded to odd, subnormals flushed).
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define EMULATED static inline __attribute__((always_inline))
#define EMULATED_VECTORS(element, name, lanes)                                      \
  typedef element name##x##lanes##_t __attribute__((vector_size(sizeof(element) * lanes)))

EMULATED_VECTORS(float, float32, 2);
EMULATED_VECTORS(float, float32, 4);
EMULATED_VECTORS(double, float64, 2);
EMULATED_VECTORS(int8_t, int8, 16);
EMULATED_VECTORS(uint8_t, uint8, 8);
EMULATED_VECTORS(uint8_t, uint8, 16);
EMULATED_VECTORS(int16_t, int16, 4);
EMULATED_VECTORS(int16_t, int16, 8);
EMULATED_VECTORS(uint16_t, uint16, 4);
EMULATED_VECTORS(uint16_t, uint16, 8);
EMULATED_VECTORS(int32_t, int32, 4);
EMULATED_VECTORS(uint32_t, uint32, 4);
struct float16x4_t {
  uint16x4_t bits;
};
struct bfloat16x8_t {
  uint16x8_t bits;
};

namespace emulated {

template <class V>
constexpr int lanes_of = sizeof(V) / sizeof(V{}[0]);

template <class To, class From>
EMULATED To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
template <class V>
EMULATED V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
EMULATED void store(void* p, V v) { memcpy(p, &v, sizeof(v)); }
// The half of x that `which` names: 0 the low one.
template <class Half, class Whole>
EMULATED Half half(Whole x, int which) { return load<Half>(reinterpret_cast<const char*>(&x) + which * sizeof(Half)); }
template <class Whole, class Half>
EMULATED Whole join(Half low, Half high) {
  const Half halves[2] = {low, high};
  return load<Whole>(halves);
}
template <class V, class Mask>
EMULATED V select(Mask mask, V a, V b) { return as<V>((mask & as<Mask>(a)) | (~mask & as<Mask>(b))); }
// Lanes i from the low or the high halves of a and b in turns.
template <class V>
EMULATED V zip(V a, V b, int which) {
  V v{};
  const int first = which * lanes_of<V> / 2;
  for (int i = 0; i < lanes_of<V> / 2; ++i) v[2 * i] = a[first + i], v[2 * i + 1] = b[first + i];
  return v;
}
template <class V>
EMULATED V add_neighbours(V a, V b) {
  V v{};
  for (int i = 0; i < lanes_of<V> / 2; ++i) v[i] = a[2 * i] + a[2 * i + 1], v[lanes_of<V> / 2 + i] = b[2 * i] + b[2 * i + 1];
  return v;
}
EMULATED int32x4_t multiply(int16x4_t a, int16x4_t b) {
  return __builtin_convertvector(a, int32x4_t) * __builtin_convertvector(b, int32x4_t);
}
template <class A, class B>
EMULATED int32x4_t dot(int32x4_t sums, A a, B b) {
  for (int i = 0; i < 16; ++i) sums[i / 4] += int32_t(a[i]) * int32_t(b[i]);
  return sums;
}
EMULATED uint8x16_t look_up(uint8x16_t table, uint8x16_t index) {
  uint8x16_t v{};
  for (int i = 0; i < 16; ++i) v[i] = index[i] < 16 ? table[index[i]] : 0;
  return v;
}

EMULATED float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x; }
EMULATED float bfloat(uint16_t bits) { return flushed(as<float>(uint32_t(bits) << 16)); }
// What is lost sets the last bit.
EMULATED float odd(double x) {
  if (!(__builtin_fabs(x) < 3.4e38)) return float(x);
  float y = float(x);
  if (double(y) == x) return flushed(y);
  uint32_t bits = as<uint32_t>(y);
  if (__builtin_fabs(double(y)) > __builtin_fabs(x)) --bits;
  return flushed(as<float>(bits | 1));
}
EMULATED float32x4_t dot_bf16(float32x4_t sums, bfloat16x8_t a, bfloat16x8_t b) {
  for (int i = 0; i < 4; ++i) {
    const float even = odd(double(bfloat(a.bits[2 * i])) * bfloat(b.bits[2 * i]));
    const float other = odd(double(bfloat(a.bits[2 * i + 1])) * bfloat(b.bits[2 * i + 1]));
    sums[i] = odd(double(flushed(sums[i])) + odd(double(even) + other));
  }
  return sums;
}

}  // namespace emulated

#define vld1_u8(p) emulated::load<uint8x8_t>(p)
#define vld1_u16(p) emulated::load<uint16x4_t>(p)
#define vld1q_f32(p) emulated::load<float32x4_t>(p)
#define vld1q_s8(p) emulated::load<int8x16_t>(p)
#define vld1q_u8(p) emulated::load<uint8x16_t>(p)
#define vld1q_u16(p) emulated::load<uint16x8_t>(p)
#define vld1q_s32(p) emulated::load<int32x4_t>(p)
#define vst1_u16(p, x) emulated::store<uint16x4_t>(p, x)
#define vst1q_f32(p, x) emulated::store<float32x4_t>(p, x)
#define vst1q_u16(p, x) emulated::store<uint16x8_t>(p, x)

#define vdupq_n_f32(x) (float32x4_t{} + float(x))
#define vdupq_n_s32(x) (int32x4_t{} + int32_t(x))
#define vdupq_n_u32(x) (uint32x4_t{} + uint32_t(x))
#define vdupq_n_s8(x) (int8x16_t{} + int8_t(x))
#define vdupq_n_u8(x) (uint8x16_t{} + uint8_t(x))
#define vdup_n_u8(x) (uint8x8_t{} + uint8_t(x))
#define vdup_n_u16(x) (uint16x4_t{} + uint16_t(x))
#define vget_low_f32(x) emulated::half<float32x2_t>(x, 0)
#define vget_high_f32(x) emulated::half<float32x2_t>(x, 1)
#define vget_low_s16(x) emulated::half<int16x4_t>(x, 0)
#define vget_lane_f32(x, lane) ((x)[lane])
#define vgetq_lane_f32(x, lane) ((x)[lane])
#define vcombine_u8(a, b) emulated::join<uint8x16_t>(a, b)

#define vreinterpret_f16_u16(x) (float16x4_t{x})
#define vreinterpret_u16_f16(x) ((x).bits)
#define vreinterpretq_bf16_u16(x) (bfloat16x8_t{x})
#define vreinterpretq_f32_f64(x) emulated::as<float32x4_t>(x)
#define vreinterpretq_f32_s32(x) emulated::as<float32x4_t>(x)
#define vreinterpretq_f32_u32(x) emulated::as<float32x4_t>(x)
#define vreinterpretq_f32_u8(x) emulated::as<float32x4_t>(x)
#define vreinterpretq_f64_f32(x) emulated::as<float64x2_t>(x)
#define vreinterpretq_s8_u8(x) emulated::as<int8x16_t>(x)
#define vreinterpretq_s32_f32(x) emulated::as<int32x4_t>(x)
#define vreinterpretq_u8_f32(x) emulated::as<uint8x16_t>(x)
#define vreinterpretq_u8_u32(x) emulated::as<uint8x16_t>(x)
#define vreinterpretq_u32_f32(x) emulated::as<uint32x4_t>(x)
#define vreinterpretq_u32_s32(x) emulated::as<uint32x4_t>(x)
#define vreinterpretq_u32_u16(x) emulated::as<uint32x4_t>(x)

#define vadd_f32(a, b) ((a) + (b))
#define vaddq_f32(a, b) ((a) + (b))
#define vsubq_f32(a, b) ((a) - (b))
#define vmulq_f32(a, b) ((a) * (b))
#define vdivq_f32(a, b) ((a) / (b))
#define vfmaq_f32(c, a, b) emulated::as<float32x4_t>(_mm_fmadd_ps((__m128)(a), (__m128)(b), (__m128)(c)))
#define vpaddq_f32(a, b) emulated::add_neighbours(a, b)
#define vceqq_f32(a, b) emulated::as<uint32x4_t>((a) == (b))
#define vcgtq_f32(a, b) emulated::as<uint32x4_t>((a) > (b))
#define vcltq_f32(a, b) emulated::as<uint32x4_t>((a) < (b))
#define vbslq_f32(mask, a, b) emulated::select(mask, a, b)
#define vbsl_u16(mask, a, b) emulated::select(mask, a, b)
#define vrndnq_f32(x) emulated::as<float32x4_t>(_mm_round_ps((__m128)(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#define vcvtnq_s32_f32(x) emulated::as<int32x4_t>(_mm_cvtps_epi32((__m128)(x)))  // beyond int32 they differ, and nothing asks
#define vcvtq_f32_s32(x) __builtin_convertvector(x, float32x4_t)
#define vcvt_f32_f16(x) emulated::as<float32x4_t>(_mm_cvtph_ps(_mm_set_epi64x(0, emulated::as<int64_t>((x).bits))))
#define vcvt_f16_f32(x) (float16x4_t{emulated::half<uint16x4_t>(_mm_cvtps_ph((__m128)(x), 0), 0)})
#define vbfdotq_f32(sums, a, b) emulated::dot_bf16(sums, a, b)

#define vaddq_s32(a, b) emulated::as<int32x4_t>(emulated::as<uint32x4_t>(a) + emulated::as<uint32x4_t>(b))
#define vsubq_s32(a, b) emulated::as<int32x4_t>(emulated::as<uint32x4_t>(a) - emulated::as<uint32x4_t>(b))
#define vaddq_u32(a, b) ((a) + (b))
#define vmulq_u32(a, b) ((a) * (b))
#define vandq_u32(a, b) ((a) & (b))
#define vandq_u8(a, b) ((a) & (b))
#define vand_u8(a, b) ((a) & (b))
#define vshlq_n_s32(x, n) emulated::as<int32x4_t>(emulated::as<uint32x4_t>(x) << (n))
#define vshrq_n_s32(x, n) ((x) >> (n))
#define vshlq_n_u32(x, n) ((x) << (n))
#define vshrq_n_u32(x, n) ((x) >> (n))
#define vshrq_n_u8(x, n) ((x) >> (n))
#define vshr_n_u8(x, n) ((x) >> (n))
#define vshrn_n_u32(x, n) __builtin_convertvector((x) >> (n), uint16x4_t)
#define vmovl_u16(x) __builtin_convertvector(x, uint32x4_t)
#define vmovn_u32(x) __builtin_convertvector(x, uint16x4_t)
#define vpaddq_s32(a, b) emulated::add_neighbours(a, b)
#define vmull_s16(a, b) emulated::multiply(a, b)
#define vmull_high_s16(a, b) emulated::multiply(emulated::half<int16x4_t>(a, 1), emulated::half<int16x4_t>(b, 1))
#define vdotq_s32(sums, a, b) emulated::dot(sums, a, b)
#define vusdotq_s32(sums, a, b) emulated::dot(sums, a, b)

#define vextq_f32(a, b, n) emulated::as<float32x4_t>(_mm_alignr_epi8((__m128i)(b), (__m128i)(a), 4 * (n)))
#define vzip1_u8(a, b) emulated::zip(a, b, 0)
#define vzip2_u8(a, b) emulated::zip(a, b, 1)
#define vzip1q_f64(a, b) emulated::zip(a, b, 0)
#define vzip2q_f64(a, b) emulated::zip(a, b, 1)
#define vqtbl1q_u8(table, index) emulated::look_up(table, index)
