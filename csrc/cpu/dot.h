// How one chunk of a dot product between a weight row (as stored) and an x row (packed once per call) is formed.
//
// Dot<T>::kChunk  elements per chunk
// Dot<T>::X       element type of packed x; a packed row holds round_up(c, kChunk) of them, 64-byte aligned
// Dot<T>::load    a chunk of T, whole or only its first n elements (the rest zero)
// Dot<T>::pack    writes a loaded chunk as packed x: kParts vectors
// Dot<T>::part    one of these vectors, straight from T; part 1 is given part 0
// Dot<T>::multiply_add  sums + products of one vector of weights and one of packed x
// Dot<T>::add     sums + products of a loaded chunk with packed x: its parts in rising order
#pragma once

#include "cpu/simd.h"

#define LK_MEMBER static inline __attribute__((always_inline))
#define LK_UNROLL _Pragma("GCC unroll 8")

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
LK_INLINE vf load_first(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_raw(p), 16)); }
LK_INLINE vf load_second(const bf16* p, vf) {
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32(0xaaaaaaaa), p));
}
#elif defined(LK_VARIANT_AVX2)
LK_INLINE Pair split(__m256i raw) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000))))};
}
LK_INLINE __m256i load_raw(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
LK_INLINE Pair load_pair(const bf16* p) { return split(load_raw(p)); }
LK_INLINE Pair load_pair(const bf16* p, int64_t n) {
  alignas(32) uint16_t part[16] = {};
  memcpy(part, p, size_t(n) * 2);
  return split(_mm256_load_si256(reinterpret_cast<const __m256i*>(part)));
}
// The low halves of `first` are zero: no register for a mask.
LK_INLINE vf load_second(const bf16* p, vf first) {
  return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_castps_si256(first), load_raw(p), 0xaa));
}
LK_INLINE vf load_first(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_raw(p), 16)); }
#elif defined(LK_VARIANT_NEON)
LK_INLINE vf low_as_float(uint16x8_t raw) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(raw), 16));
}
LK_INLINE vf high_as_float(uint16x8_t raw) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(raw), vdupq_n_u32(0xffff0000)));
}
LK_INLINE uint16x8_t load_raw(const bf16* p) { return vld1q_u16(&p->bits); }
LK_INLINE uint16x8_t load_raw(const bf16* p, int64_t n) {
  uint16_t part[8] = {};
  memcpy(part, p, size_t(n) * 2);
  return vld1q_u16(part);
}
LK_INLINE Pair split(uint16x8_t raw) { return {low_as_float(raw), high_as_float(raw)}; }
LK_INLINE Pair load_pair(const bf16* p) { return split(load_raw(p)); }
LK_INLINE Pair load_pair(const bf16* p, int64_t n) { return split(load_raw(p, n)); }
LK_INLINE vf load_first(const bf16* p) { return low_as_float(load_raw(p)); }
LK_INLINE vf load_second(const bf16* p, vf) { return high_as_float(load_raw(p)); }
#endif
template <class T>
LK_INLINE vf load_first(const T* p) { return load(p); }
template <class T>
LK_INLINE vf load_second(const T* p, vf) { return load(p + kWidth); }

// sums + w * x. To the compiler an FMA may overwrite any of its operands, and in a tile that fills the registers it moves
// sums about for that, one through the stack.
LK_INLINE vf accumulate(vf sums, vf w, vf x) {
#if defined(LK_VARIANT_AVX2)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sums) : "x"(w), "xm"(x));
  return sums;
#else
  return fma(w, x, sums);
#endif
}

template <class T>
struct Dot {
  static constexpr int64_t kChunk = 2 * kWidth;
  static constexpr int kParts = 2;
  using X = float;
  using Chunk = Pair;
  using Vector = vf;
  LK_MEMBER Chunk load(const T* p) { return load_pair(p); }
  LK_MEMBER Chunk load(const T* p, int64_t n) { return load_pair(p, n); }
  LK_MEMBER void pack(X* x, Chunk chunk) {
    store(x, chunk.a);
    store(x + kWidth, chunk.b);
  }
  template <int kPart>
  LK_MEMBER vf part(const T* p, vf first) {
    if constexpr (kPart == 0) return load_first(p);
    return load_second(p, first);
  }
  LK_MEMBER vf load_x(const X* x) { return lk::LK_VARIANT::load(x); }
  LK_MEMBER vf multiply_add(vf sums, vf w, vf x) { return accumulate(sums, w, x); }
  LK_MEMBER vf add(vf sums, Chunk w, const X* x) {
    return multiply_add(multiply_add(sums, w.a, load_x(x)), w.b, load_x(x + kWidth));
  }
};

#if defined(LK_VARIANT_AVX512_BF16) || defined(LK_VARIANT_NEON_BF16)
#if defined(LK_VARIANT_AVX512_BF16)
typedef __m512i Raw;
LK_INLINE Raw load_packed(const bf16* x) { return _mm512_load_si512(x); }
LK_INLINE void store_packed(bf16* x, Raw raw) { _mm512_store_si512(x, raw); }
LK_INLINE vf add_products(vf sums, Raw w, Raw x) { return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x); }
#else
typedef uint16x8_t Raw;
LK_INLINE Raw load_packed(const bf16* x) { return load_raw(x); }
LK_INLINE void store_packed(bf16* x, Raw raw) { vst1q_u16(&x->bits, raw); }
LK_INLINE vf add_products(vf sums, Raw w, Raw x) {
  return vbfdotq_f32(sums, vreinterpretq_bf16_u16(w), vreinterpretq_bf16_u16(x));
}
#endif

// vdpbf16ps and BFDOT multiply pairs of bfloat16 as they lie in memory.
template <>
struct Dot<bf16> {
  static constexpr int64_t kChunk = 2 * kWidth;
  static constexpr int kParts = 1;
  using X = bf16;
  using Chunk = Raw;
  using Vector = Raw;
  LK_MEMBER Raw load(const bf16* p) { return load_raw(p); }
  LK_MEMBER Raw load(const bf16* p, int64_t n) { return load_raw(p, n); }
  LK_MEMBER void pack(X* x, Raw chunk) { store_packed(x, chunk); }
  template <int>
  LK_MEMBER Raw part(const bf16* p, Raw) { return load_raw(p); }
  LK_MEMBER Raw load_x(const X* x) { return load_packed(x); }
  LK_MEMBER vf multiply_add(vf sums, Raw w, Raw x) { return add_products(sums, w, x); }
  LK_MEMBER vf add(vf sums, Raw w, const X* x) { return multiply_add(sums, w, load_x(x)); }
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

// sums[j][i] += products of one part of a chunk. Besides the sums, one more register than the smaller of both sides has:
// that side is loaded first and stays. `first` is part 0 of some weight row.
template <class T, int kPart, int kRows, int kCols>
LK_INLINE typename Dot<T>::Vector add_part(vf (&sums)[kRows][kCols], typename Dot<T>::Vector first, const T* p,
                                           int64_t w_stride, const typename Dot<T>::X* x, int64_t x_stride) {
  using D = Dot<T>;
  typename D::Vector w[kRows], v[kCols];
  if constexpr (kRows < kCols) {
    LK_UNROLL for (int j = 0; j < kRows; ++j) w[j] = first = D::template part<kPart>(p + j * w_stride, first);
    LK_UNROLL for (int i = 0; i < kCols; ++i) {
      v[i] = D::load_x(x + i * x_stride);
      if constexpr (kCols > 6) asm("" ::: "memory");  // or else the compiler loads it again for each weight row
      LK_UNROLL for (int j = 0; j < kRows; ++j) sums[j][i] = D::multiply_add(sums[j][i], w[j], v[i]);
    }
  } else {
    LK_UNROLL for (int i = 0; i < kCols; ++i) v[i] = D::load_x(x + i * x_stride);
    LK_UNROLL for (int j = 0; j < kRows; ++j) {
      first = D::template part<kPart>(p + j * w_stride, first);
      LK_UNROLL for (int i = 0; i < kCols; ++i) sums[j][i] = D::multiply_add(sums[j][i], first, v[i]);
    }
  }
  return first;
}

// The same for a whole chunk.
template <class T, int kRows, int kCols>
LK_INLINE void add_chunk(vf (&sums)[kRows][kCols], const T* p, int64_t w_stride, const typename Dot<T>::X* x,
                         int64_t x_stride) {
  using D = Dot<T>;
  if constexpr (kCols > 1) {
    typename D::Vector first{};
    first = add_part<T, 0>(sums, first, p, w_stride, x, x_stride);
    if constexpr (D::kParts > 1) {
      asm("" : "+r"(p));  // or else the compiler keeps what it has read in registers that it hasn't got
      add_part<T, 1>(sums, first, p, w_stride, x + kWidth, x_stride);
    }
  } else {
    LK_UNROLL for (int j = 0; j < kRows; ++j) {
      const typename D::Chunk chunk = D::load(p + j * w_stride);
      LK_UNROLL for (int i = 0; i < kCols; ++i) sums[j][i] = D::add(sums[j][i], chunk, x + i * x_stride);
    }
  }
}

// Writes kCount sums, kCount floats at `out`: sum() of each.
template <int kCount>
LK_INLINE void sum_all(const vf (&v)[kCount], float* out) {
  int i = 0;
  LK_UNROLL for (; i + 4 <= kCount; i += 4) sum4(v[i], v[i + 1], v[i + 2], v[i + 3], out + i);
  if constexpr (kCount % 4 == 1) out[i] = sum(v[i]);
  if constexpr (kCount % 4 > 1) {
    float rest[4];
    sum4(v[i], v[i + 1], v[kCount - 1], v[kCount - 1], rest);
    memcpy(out + i, rest, kCount % 4 * sizeof(float));
  }
}

// How a tile asks for the memory that it fetches ahead. The core drops such a request when it has too many under way, and
// tells nobody; asked for again a while later, it comes. Flags, beside the request itself:
constexpr int kEarly = 1;       // one before it, when the memory is twice as far ahead
constexpr int kAgain = 2;       // one 16 steps after it, or 8 if that is the third
constexpr int kEveryOther = 4;  // for half of the rows at each step, by turns

// Asks for one line of each row, those of the step at `ahead`; `lead` is how far ahead that is.
template <int kFetch, int kRows, class T>
LK_INLINE void fetch_ahead(const T* w, int64_t w_stride, int64_t ahead, int64_t lead, int64_t step, bool odd) {
  constexpr int kEvery = kFetch & kEveryOther && kRows > 1 ? 2 : 1;
  if constexpr (kEvery > 1) ahead += odd ? w_stride : 0;
  // Distances from the rows' own addresses: these are in registers already.
  const auto ask = [&](int64_t distance) __attribute__((always_inline)) {
    LK_UNROLL for (int j = 0; j < kRows; j += kEvery) prefetch_l2(w + j * w_stride + distance);
  };
  if constexpr (kFetch & kEarly) ask(ahead + lead);
  ask(ahead);
  if constexpr (kFetch & kAgain) ask(ahead - (kFetch & kEarly ? 8 : 16) * step);
}

// totals[i][j] = dot product of weight row j (rows w_stride elements apart) and packed row i (x_stride apart): for every
// tile size one vector accumulator per product, chunks in rising order, and then sum(). So the tile can't change a bit.
// Meanwhile memory from `ahead` on is fetched into the second-level cache: after every kStep chunks `step` elements more,
// of each row. A function by itself: in line, the compiler had too few registers left for the addresses its loop needs.
template <class T, int kRows, int kCols, int kStep, int kFetch>
__attribute__((noinline)) static void dot_tile(const T* w, int64_t w_stride, const typename Dot<T>::X* x,
                                               int64_t x_stride, int64_t c, int64_t ahead, int64_t step,
                                               float* totals, int64_t totals_stride) {
  using D = Dot<T>;
  vf sums[kRows][kCols];
  LK_UNROLL for (int j = 0; j < kRows; ++j)
    LK_UNROLL for (int i = 0; i < kCols; ++i) sums[j][i] = zero();
  int64_t k = 0;
  const int64_t lead = ahead;
#pragma GCC unroll 1
  for (; k + kStep * D::kChunk <= c; ahead += step) {
    fetch_ahead<kFetch, kRows>(w, w_stride, ahead, lead, step, k / (kStep * D::kChunk) % 2);
    LK_UNROLL for (int i = 0; i < kStep; ++i, k += D::kChunk) add_chunk(sums, w + k, w_stride, x + k, x_stride);
  }
  if constexpr (kStep > 1)
    for (; k + D::kChunk <= c; k += D::kChunk) add_chunk(sums, w + k, w_stride, x + k, x_stride);
  if (k < c) {
    alignas(64) T last[kRows][D::kChunk] = {};
    for (int j = 0; j < kRows; ++j) memcpy(last[j], w + j * w_stride + k, size_t(c - k) * sizeof(T));
    add_chunk(sums, last[0], D::kChunk, x + k, x_stride);
  }
  LK_UNROLL for (int i = 0; i < kCols; ++i) {
    vf column[kRows];
    LK_UNROLL for (int j = 0; j < kRows; ++j) column[j] = sums[j][i];
    sum_all(column, totals + i * totals_stride);
  }
}

}  // namespace lk::LK_VARIANT
