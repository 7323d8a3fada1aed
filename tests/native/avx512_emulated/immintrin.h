// AVX-512 for machines without it: found before the compiler's own <immintrin.h>, this replaces the AVX-512 intrinsics
// the kernels use by AVX2 and plain C++ with the documented results (Intel's intrinsics guide; VDPBF16PS after the
// manual's pseudocode: two products added one after the other, subnormals flushed). One that is missing here does not
// compile: its own version needs -mavx512f.
#pragma once

#include_next <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {

typedef int32_t I32 __attribute__((vector_size(64), may_alias));
typedef uint32_t U32 __attribute__((vector_size(64), may_alias));

#define EMULATED static inline __attribute__((always_inline))

// The halves of a vector, and a vector out of halves.
template <class Half, class Whole>
EMULATED Half half(Whole x, int which) {
  Half h;
  memcpy(&h, reinterpret_cast<const char*>(&x) + which * sizeof(Half), sizeof(Half));
  return h;
}
template <class Whole, class Half>
EMULATED Whole join(Half low, Half high) {
  Whole x;
  memcpy(&x, &low, sizeof(Half));
  memcpy(reinterpret_cast<char*>(&x) + sizeof(Half), &high, sizeof(Half));
  return x;
}
// Memory: masked accesses touch the chosen elements only, aligned ones insist on it.
template <class Whole, class Element>
EMULATED Whole load(uint64_t mask, const void* p) {
  Element lanes[sizeof(Whole) / sizeof(Element)] = {};
  for (size_t i = 0; i < sizeof(Whole) / sizeof(Element); ++i)
    if (mask >> i & 1) memcpy(&lanes[i], static_cast<const char*>(p) + i * sizeof(Element), sizeof(Element));
  Whole x;
  memcpy(&x, lanes, sizeof(x));
  return x;
}
template <class Element, class Whole>
EMULATED void store(void* p, uint64_t mask, Whole x) {
  Element lanes[sizeof(Whole) / sizeof(Element)];
  memcpy(lanes, &x, sizeof(x));
  for (size_t i = 0; i < sizeof(Whole) / sizeof(Element); ++i)
    if (mask >> i & 1) memcpy(static_cast<char*>(p) + i * sizeof(Element), &lanes[i], sizeof(Element));
}
EMULATED void* aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) abort();
  return const_cast<void*>(p);
}

EMULATED __m512 set1(float x) { return __m512{} + x; }
EMULATED I32 set1(int x) { return I32{} + x; }
EMULATED __m512 fma(__m512 a, __m512 b, __m512 c) {
  return join<__m512>(_mm256_fmadd_ps(half<__m256>(a, 0), half<__m256>(b, 0), half<__m256>(c, 0)),
                      _mm256_fmadd_ps(half<__m256>(a, 1), half<__m256>(b, 1), half<__m256>(c, 1)));
}
// The second operand where one is NaN, as vmaxps and vminps.
EMULATED __m512 max(__m512 a, __m512 b) { return a > b ? a : b; }
EMULATED __m512 min(__m512 a, __m512 b) { return a < b ? a : b; }
template <int kPredicate>
EMULATED __mmask16 compare(__m512 a, __m512 b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(half<__m256>(a, 0), half<__m256>(b, 0), kPredicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(half<__m256>(a, 1), half<__m256>(b, 1), kPredicate));
  return __mmask16(low | high << 8);
}
template <class Whole>
EMULATED Whole blend(Whole a, __mmask16 mask, Whole b) {
  uint32_t x[16], y[16];
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) x[i] = y[i];
  memcpy(&a, x, 64);
  return a;
}
EMULATED __mmask16 differ(__m512i a, __m512i b) {
  uint32_t x[16], y[16], mask = 0;
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  for (int i = 0; i < 16; ++i) mask |= uint32_t(x[i] != y[i]) << i;
  return __mmask16(mask);
}
// The low bits of 32-bit lanes.
template <class Narrow, class Element>
EMULATED Narrow narrowed(__m512i x) {
  uint32_t lanes[16];
  Element narrow[16];
  memcpy(lanes, &x, 64);
  for (int i = 0; i < 16; ++i) narrow[i] = Element(lanes[i]);
  Narrow y;
  memcpy(&y, narrow, sizeof(y));
  return y;
}
EMULATED __m512i widen_u16(__m256i x) {
  return join<__m512i>(_mm256_cvtepu16_epi32(half<__m128i>(x, 0)), _mm256_cvtepu16_epi32(half<__m128i>(x, 1)));
}
EMULATED __m512i widen_u8(__m256i x) {
  return join<__m512i>(_mm256_cvtepu8_epi16(half<__m128i>(x, 0)), _mm256_cvtepu8_epi16(half<__m128i>(x, 1)));
}
// Of each kWide lanes four elements, the first two from a and the others from b; two bits of kWhich for each say which.
template <int kWide, int kWhich>
EMULATED __m512 shuffle(__m512 a, __m512 b) {
  float from[2][16], to[16];
  memcpy(from[0], &a, sizeof(a));
  memcpy(from[1], &b, sizeof(b));
  constexpr int kElement = kWide / 4;  // lanes that move together
  for (int i = 0; i < 16; ++i) {
    const int element = i % kWide / kElement, first = i / kWide * kWide;
    to[i] = from[element / 2][first + (kWhich >> 2 * element & 3) * kElement + i % kElement];
  }
  memcpy(&a, to, sizeof(a));
  return a;
}
EMULATED __m512 permute(__m512i index, __m512 x) {
  float from[16], to[16];
  int32_t lanes[16];
  memcpy(from, &x, sizeof(x));
  memcpy(lanes, &index, sizeof(index));
  for (int i = 0; i < 16; ++i) to[i] = from[lanes[i] & 15];
  memcpy(&x, to, sizeof(x));
  return x;
}
EMULATED __m512 permute_two(__m512 a, __m512i index, __m512 b) {
  float from[32], to[16];
  int32_t lanes[16];
  memcpy(from, &a, sizeof(a));
  memcpy(from + 16, &b, sizeof(b));
  memcpy(lanes, &index, sizeof(index));
  for (int i = 0; i < 16; ++i) to[i] = from[lanes[i] & 31];
  memcpy(&a, to, sizeof(a));
  return a;
}
EMULATED __m512i permute_words(uint32_t mask, __m512i index, __m512i x) {
  uint16_t from[32], lanes[32], to[32];
  memcpy(from, &x, sizeof(x));
  memcpy(lanes, &index, sizeof(index));
  for (int i = 0; i < 32; ++i) to[i] = mask >> i & 1 ? from[lanes[i] & 31] : 0;
  memcpy(&x, to, sizeof(x));
  return x;
}
template <int kRounding>
EMULATED __m512 round(__m512 x) {
  return join<__m512>(_mm256_round_ps(half<__m256>(x, 0), kRounding), _mm256_round_ps(half<__m256>(x, 1), kRounding));
}
EMULATED __m512i multiply_pairs(__m512i a, __m512i b) {
  return join<__m512i>(_mm256_madd_epi16(half<__m256i>(a, 0), half<__m256i>(b, 0)),
                       _mm256_madd_epi16(half<__m256i>(a, 1), half<__m256i>(b, 1)));
}
EMULATED __m512i to_int(__m512 x) {
  return join<__m512i>(_mm256_cvtps_epi32(half<__m256>(x, 0)), _mm256_cvtps_epi32(half<__m256>(x, 1)));
}
EMULATED __m512 from_int(__m512i x) {
  return join<__m512>(_mm256_cvtepi32_ps(half<__m256i>(x, 0)), _mm256_cvtepi32_ps(half<__m256i>(x, 1)));
}
EMULATED __m512 from_half(__m256i x) {
  return join<__m512>(_mm256_cvtph_ps(half<__m128i>(x, 0)), _mm256_cvtph_ps(half<__m128i>(x, 1)));
}
template <int kRounding>
EMULATED __m256i to_half(__m512 x) {
  return join<__m256i>(_mm256_cvtps_ph(half<__m256>(x, 0), kRounding & 7), _mm256_cvtps_ph(half<__m256>(x, 1), kRounding & 7));
}

EMULATED float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x; }
EMULATED float bfloat(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return flushed(x);
}
EMULATED __m512 dot_bf16(__m512 sums, __m512i a, __m512i b) {
  uint16_t x[32], y[32];
  float s[16];
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  memcpy(s, &sums, 64);
  for (int i = 0; i < 16; ++i) {
    s[i] = flushed(__builtin_fmaf(bfloat(x[2 * i + 1]), bfloat(y[2 * i + 1]), flushed(s[i])));
    s[i] = flushed(__builtin_fmaf(bfloat(x[2 * i]), bfloat(y[2 * i]), s[i]));
  }
  memcpy(&sums, s, 64);
  return sums;
}

}  // namespace emulated

#undef _mm512_cmp_ps_mask
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_srai_epi32
#undef _mm512_extractf32x8_ps
#undef _mm512_roundscale_ps
#undef _mm512_cvtps_ph
#define _mm512_setzero_ps() (__m512{})
#define _mm512_set1_ps(x) emulated::set1(float(x))
#define _mm512_set1_epi32(x) ((__m512i)emulated::set1(int(x)))
#define _mm512_castps_si512(x) ((__m512i)(x))
#define _mm512_castsi512_ps(x) ((__m512)(x))
#define _mm512_castps512_ps256(x) emulated::half<__m256>(x, 0)
#define _mm512_extractf32x8_ps(x, which) emulated::half<__m256>(x, which)
#define _mm512_add_ps(a, b) ((__m512)((a) + (b)))
#define _mm512_sub_ps(a, b) ((__m512)((a) - (b)))
#define _mm512_mul_ps(a, b) ((__m512)((a) * (b)))
#define _mm512_div_ps(a, b) ((__m512)((a) / (b)))
#define _mm512_max_ps(a, b) emulated::max(a, b)
#define _mm512_min_ps(a, b) emulated::min(a, b)
#define _mm512_fmadd_ps(a, b, c) emulated::fma(a, b, c)
#define _mm512_roundscale_ps(x, how) emulated::round<how>(x)
#define _mm512_shuffle_f32x4(a, b, which) emulated::shuffle<16, which>(a, b)
#define _mm512_shuffle_ps(a, b, which) emulated::shuffle<4, which>(a, b)
#define _mm512_castps512_ps128(x) emulated::half<__m128>(x, 0)
#define _mm512_castsi256_si512(x) emulated::join<__m512i>(x, _mm256_set1_epi32(0x5a5a5a5a))  // undefined there
#define _mm512_permutexvar_ps(index, x) emulated::permute(index, x)
#define _mm512_permutex2var_ps(a, index, b) emulated::permute_two(a, index, b)
#define _mm512_maskz_permutexvar_epi16(mask, index, x) emulated::permute_words(mask, index, x)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::compare<predicate>(a, b)
#undef _mm512_cmpneq_epi32_mask
#define _mm512_cmpneq_epi32_mask(a, b) emulated::differ(a, b)
#define _mm512_mask_mov_ps(a, mask, b) emulated::blend<__m512>(a, mask, b)
#define _mm512_mask_mov_epi32(a, mask, b) emulated::blend<__m512i>(a, mask, b)
#define _mm512_madd_epi16(a, b) emulated::multiply_pairs(a, b)
#define _mm512_dpwssd_epi32(sums, a, b) _mm512_add_epi32(sums, emulated::multiply_pairs(a, b))
#define _mm512_and_si512(a, b) ((__m512i)((a) & (b)))
#define _mm512_andnot_si512(a, b) ((__m512i)(~(a) & (b)))
#define _mm512_or_si512(a, b) ((__m512i)((a) | (b)))
#define _mm512_add_epi32(a, b) ((__m512i)((emulated::U32)(a) + (emulated::U32)(b)))
#define _mm512_sub_epi32(a, b) ((__m512i)((emulated::U32)(a) - (emulated::U32)(b)))
#define _mm512_slli_epi32(a, n) ((__m512i)((emulated::U32)(a) << (n)))
#define _mm512_srli_epi32(a, n) ((__m512i)((emulated::U32)(a) >> (n)))
#define _mm512_srai_epi32(a, n) ((__m512i)((emulated::I32)(a) >> (n)))
#define _mm512_cvtps_epi32(x) emulated::to_int(x)
#define _mm512_cvtepi32_ps(x) emulated::from_int(x)
#define _mm512_cvtepu16_epi32(x) emulated::widen_u16(x)
#define _mm512_cvtepu8_epi16(x) emulated::widen_u8(x)
#define _mm512_cvtepi32_epi16(x) (emulated::narrowed<__m256i, uint16_t>(x))
#define _mm512_cvtepi32_epi8(x) (emulated::narrowed<__m128i, uint8_t>(x))
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_cvtph_ps(x) emulated::from_half(x)
#define _mm512_cvtps_ph(x, how) emulated::to_half<how>(x)
#define _mm512_dpbf16_ps(sums, a, b) emulated::dot_bf16(sums, (__m512i)(a), (__m512i)(b))
#define _mm512_loadu_ps(p) emulated::load<__m512, float>(~0ull, p)
#define _mm512_maskz_loadu_ps(mask, p) emulated::load<__m512, float>(mask, p)
#define _mm512_loadu_si512(p) emulated::load<__m512i, uint32_t>(~0ull, p)
#define _mm512_load_si512(p) emulated::load<__m512i, uint32_t>(~0ull, emulated::aligned(p))
#define _mm512_maskz_loadu_epi16(mask, p) emulated::load<__m512i, uint16_t>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) emulated::load<__m256i, uint16_t>(mask, p)
#define _mm512_storeu_ps(p, x) emulated::store<float>(p, ~0ull, x)
#define _mm512_mask_storeu_ps(p, mask, x) emulated::store<float>(p, mask, x)
#define _mm512_store_si512(p, x) emulated::store<uint32_t>(emulated::aligned(p), ~0ull, x)
#define _mm256_mask_storeu_epi16(p, mask, x) emulated::store<uint16_t>(p, mask, x)

#include "tiles.h"
