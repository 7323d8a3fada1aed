// AVX2 + FMA + F16C: eight floats. Included by simd.h only.
#pragma once

#include <immintrin.h>

namespace lk::LK_VARIANT {

constexpr int kWidth = 8;
constexpr int kRegisters = 12;  // vector accumulators a tile may hold, of 16 registers

typedef __m256 vf;

LK_INLINE vf zero() { return _mm256_setzero_ps(); }
LK_INLINE vf set1(float value) { return _mm256_set1_ps(value); }

LK_INLINE vf widen(__m128i raw, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
LK_INLINE vf widen(__m128i raw, f16) { return _mm256_cvtph_ps(raw); }

LK_INLINE __m128i narrow(vf x, bf16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
LK_INLINE __m128i narrow(vf x, f16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

LK_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

LK_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
LK_INLINE vf load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
LK_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
LK_INLINE void store(float* p, vf x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }

template <class T>
LK_INLINE vf load(const T* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T()); }
template <class T>
LK_INLINE vf load(const T* p, int64_t n) {
  alignas(16) uint16_t part[8] = {};
  memcpy(part, p, size_t(n) * 2);
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(part)), T());
}
template <class T>
LK_INLINE void store(T* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T())); }
template <class T>
LK_INLINE void store(T* p, vf x, int64_t n) {
  alignas(16) uint16_t part[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), narrow(x, T()));
  memcpy(p, part, size_t(n) * 2);
}

LK_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
LK_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
LK_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
LK_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
LK_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
LK_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
LK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
LK_INLINE vf permute(vf x, const int32_t* index) {
  return _mm256_permutevar8x32_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}

LK_INLINE float sum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LK_INLINE __m128 quarter_sums(vf x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
LK_INLINE void sum4(vf a, vf b, vf c, vf d, float* sums) {
  const __m128 s[4] = {quarter_sums(a), quarter_sums(b), quarter_sums(c), quarter_sums(d)};
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(s[0], s[1]), _mm_movehl_ps(s[1], s[0]));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(s[2], s[3]), _mm_movehl_ps(s[3], s[2]));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}
LK_INLINE void sum4(const vf* v, float* sums) { sum4(v[0], v[1], v[2], v[3], sums); }
LK_INLINE float max_of(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

LK_INLINE vf round_int(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

LK_INLINE vf exp_fixup(vf x, vf p, vf n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126)), 23);
  vf r = _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), set1(2));
  r = _mm256_andnot_ps(_mm256_cmp_ps(x, set1(-86.9f), _CMP_LT_OQ), r);
  r = _mm256_blendv_ps(r, set1(__builtin_inff()), _mm256_cmp_ps(x, set1(88.72f), _CMP_GT_OQ));
  return _mm256_blendv_ps(r, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

LK_INLINE vf split_exponent(vf x, vf* exponent) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalfBits)), 23);
  *exponent = _mm256_cvtepi32_ps(e);
  return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
}

LK_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache only.
LK_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace lk::LK_VARIANT
