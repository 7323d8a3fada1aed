// How one chunk of a dot product between a weight row (as stored) and an x row (packed once per call) is formed.
//
// Dot<T>::kChunk  elements per chunk
// Dot<T>::X       element type of packed x; a packed row holds round_up(c, kChunk) of them, 64-byte aligned
// Dot<T>::load    a chunk of T, whole or only its first n elements (the rest zero)
// Dot<T>::pack    writes a loaded chunk as packed x
// Dot<T>::add     sums + products of a loaded chunk with packed x, in one fixed order
#pragma once

#include "cpu/simd.h"

#define LK_MEMBER static inline __attribute__((always_inline))

namespace lk::LK_VARIANT {

struct Pair {
  vf a, b;
};

// Two vectors in memory order.
template <class T>
LK_INLINE Pair load_pair(const T* p) { return {load(p), load(p + kWidth)}; }
template <class T>
LK_INLINE Pair load_pair(const T* p, int64_t n) {
  if (n > kWidth) return {load(p), load(p + kWidth, n - kWidth)};
  return {load(p, n), zero()};
}

// bfloat16: the even and the odd elements. Widening them takes a shift and a mask, and no permutation.
#if defined(LK_VARIANT_AVX512)
LK_INLINE Pair split(__m512i raw) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000))))};
}
LK_INLINE __m512i load_raw(const bf16* p) { return _mm512_loadu_si512(p); }
LK_INLINE __m512i load_raw(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
}
LK_INLINE Pair load_pair(const bf16* p) { return split(load_raw(p)); }
LK_INLINE Pair load_pair(const bf16* p, int64_t n) { return split(load_raw(p, n)); }
#elif defined(LK_VARIANT_AVX2)
LK_INLINE Pair split(__m256i raw) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000))))};
}
LK_INLINE Pair load_pair(const bf16* p) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
LK_INLINE Pair load_pair(const bf16* p, int64_t n) {
  alignas(32) uint16_t part[16] = {};
  memcpy(part, p, size_t(n) * 2);
  return split(_mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
}
#endif

template <class T>
struct Dot {
  static constexpr int64_t kChunk = 2 * kWidth;
  using X = float;
  using Chunk = Pair;
  LK_MEMBER Chunk load(const T* p) { return load_pair(p); }
  LK_MEMBER Chunk load(const T* p, int64_t n) { return load_pair(p, n); }
  LK_MEMBER void pack(X* x, Chunk chunk) {
    store(x, chunk.a);
    store(x + kWidth, chunk.b);
  }
  LK_MEMBER vf add(vf sums, Chunk w, const X* x) {
    return fma(w.b, lk::LK_VARIANT::load(x + kWidth), fma(w.a, lk::LK_VARIANT::load(x), sums));
  }
};

#if defined(LK_VARIANT_AVX512_BF16)
// vdpbf16ps multiplies pairs of bfloat16 as they lie in memory.
template <>
struct Dot<bf16> {
  static constexpr int64_t kChunk = 2 * kWidth;
  using X = bf16;
  using Chunk = __m512i;
  LK_MEMBER Chunk load(const bf16* p) { return load_raw(p); }
  LK_MEMBER Chunk load(const bf16* p, int64_t n) { return load_raw(p, n); }
  LK_MEMBER void pack(X* x, Chunk chunk) { _mm512_store_si512(x, chunk); }
  LK_MEMBER vf add(vf sums, Chunk w, const X* x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)_mm512_load_si512(x));
  }
};
#endif

// Elements from one packed row to the next. The extra cache line keeps rows of 2^n elements out of each other's cache sets.
template <class T>
LK_INLINE int64_t packed_size(int64_t c) {
  return (c + Dot<T>::kChunk - 1) / Dot<T>::kChunk * Dot<T>::kChunk + 64 / int64_t(sizeof(typename Dot<T>::X));
}

template <class T>
LK_INLINE void pack_row(const T* x, int64_t c, typename Dot<T>::X* packed) {
  int64_t k = 0;
  for (; k + Dot<T>::kChunk <= c; k += Dot<T>::kChunk) Dot<T>::pack(packed + k, Dot<T>::load(x + k));
  if (k < c) Dot<T>::pack(packed + k, Dot<T>::load(x + k, c - k));
}

// totals[j][i] = dot product of weight row j (rows w_stride elements apart) and packed row i (x_stride apart): for every
// tile size one vector accumulator per product, chunks in rising order, and then sum(). So the tile can't change a bit.
template <class T, int kRows, int kCols>
LK_INLINE void dot_tile(const T* w, int64_t w_stride, const typename Dot<T>::X* x, int64_t x_stride, int64_t c,
                        float (*totals)[kCols]) {
  using D = Dot<T>;
  vf sums[kRows][kCols];
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kCols; ++i) sums[j][i] = zero();
  int64_t k = 0;
  for (; k + D::kChunk <= c; k += D::kChunk) {
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      const typename D::Chunk chunk = D::load(w + j * w_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < kCols; ++i) sums[j][i] = D::add(sums[j][i], chunk, x + i * x_stride + k);
    }
  }
  if (k < c)
    for (int j = 0; j < kRows; ++j) {
      const typename D::Chunk chunk = D::load(w + j * w_stride + k, c - k);
      for (int i = 0; i < kCols; ++i) sums[j][i] = D::add(sums[j][i], chunk, x + i * x_stride + k);
    }
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kCols; ++i) totals[j][i] = sum(sums[j][i]);
}

}  // namespace lk::LK_VARIANT
