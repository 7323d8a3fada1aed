// Element types of activations and weights, and their exact conversions to and from float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Internal linkage and always inlined: a copy compiled with AVX flags must never serve another variant.
#define LK_INLINE static inline __attribute__((always_inline))

namespace lk {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

LK_INLINE size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

LK_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

LK_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

LK_INLINE float to_float(float value) { return value; }

LK_INLINE float to_float(bf16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

LK_INLINE float to_float(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * float_from_bits(103u << 23);  // magnitude * 2^-24, exact
  return float_from_bits(sign | float_bits(subnormal));
}

// Rounding is to nearest, ties to even.
template <class T>
LK_INLINE T from_float(float value);

template <>
inline __attribute__((always_inline)) float from_float<float>(float value) {
  return value;
}

template <>
inline __attribute__((always_inline)) bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline __attribute__((always_inline)) f16 from_float<f16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 65536 and more
  if (magnitude < 0x38800000) {                                   // below 2^-14: the adder rounds to multiples of 2^-24
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {uint16_t(sign | (float_bits(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | (rounded - (112u << 23)) >> 13)};
}

}  // namespace lk
