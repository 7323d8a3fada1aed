// AVX-512 F, BW, VL, DQ: sixteen floats. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace lk::LK_VARIANT {

constexpr int kWidth = 16;
constexpr int kRegisters = 24;  // vector accumulators a tile may hold, of 32 registers

typedef __m512 vf;

LK_INLINE vf zero() { return _mm512_setzero_ps(); }
LK_INLINE vf set1(float value) { return _mm512_set1_ps(value); }
LK_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }

LK_INLINE vf widen(__m256i raw, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
LK_INLINE vf widen(__m256i raw, f16) { return _mm512_cvtph_ps(raw); }

// Not vcvtneps2bf16: that one flushes subnormals.
LK_INLINE __m256i narrow(vf x, bf16) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
LK_INLINE __m256i narrow(vf x, f16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

LK_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
LK_INLINE vf load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
LK_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
LK_INLINE void store(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

template <class T>
LK_INLINE vf load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T()); }
template <class T>
LK_INLINE vf load(const T* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T()); }
template <class T>
LK_INLINE void store(T* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T())); }
template <class T>
LK_INLINE void store(T* p, vf x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x, T())); }

LK_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
LK_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
LK_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
LK_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
LK_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
LK_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
LK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LK_INLINE vf permute(vf x, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), x);
}

LK_INLINE float sum(vf x) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LK_INLINE void sum4(vf a, vf b, vf c, vf d, float* sums) {
  const vf ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));  // halves: of a, of b
  const vf cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  const vf quarters = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));  // of a, b, c, d
  const vf eighths = add(quarters, _mm512_shuffle_ps(quarters, quarters, 0x4e));
  alignas(64) static constexpr int32_t kFirst[kWidth] = {0, 4, 8, 12};
  const vf all = permute(add(eighths, _mm512_shuffle_ps(eighths, eighths, 0xb1)), kFirst);
  _mm_storeu_ps(sums, _mm512_castps512_ps128(all));
}
// Halves are loaded, instead of shuffled, and then short vectors suffice: half the cycles.
LK_INLINE void sum4(const vf* v, float* sums) {
  const float* p = reinterpret_cast<const float*>(v);
  const auto half = [&](int i) { return _mm256_add_ps(_mm256_loadu_ps(p + i * 16), _mm256_loadu_ps(p + i * 16 + 8)); };
  const __m256 a = half(0), b = half(1), c = half(2), d = half(3);
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
  const __m256 acbd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m256 all = _mm256_add_ps(acbd, _mm256_movehdup_ps(acbd));
  const __m128 ac = _mm256_castps256_ps128(all), bd = _mm256_extractf128_ps(all, 1);
  _mm_storeu_ps(sums, _mm_shuffle_ps(_mm_unpacklo_ps(ac, bd), _mm_unpackhi_ps(ac, bd), 0x44));
}
LK_INLINE float max_of(vf x) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

LK_INLINE vf round_int(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

LK_INLINE vf exp_fixup(vf x, vf p, vf n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(126)), 23);
  vf r = _mm512_mul_ps(_mm512_mul_ps(p, _mm512_castsi512_ps(exponent)), set1(2));
  r = _mm512_mask_mov_ps(r, _mm512_cmp_ps_mask(x, set1(-86.9f), _CMP_LT_OQ), zero());
  r = _mm512_mask_mov_ps(r, _mm512_cmp_ps_mask(x, set1(88.72f), _CMP_GT_OQ), set1(__builtin_inff()));
  return _mm512_mask_mov_ps(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

LK_INLINE vf split_exponent(vf x, vf* exponent) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalfBits)), 23);
  *exponent = _mm512_cvtepi32_ps(e);
  return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
}

LK_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache only.
LK_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace lk::LK_VARIANT
