// How one block of 64 columns of a quantized weight row is multiplied with packed x rows.
//
// Both are 16-bit integers there; their products are summed exactly, in int32: x is at most 2^15 and a weight 2^7 in
// magnitude, a vector lane sums at most 8 products, so 2^25. x lies in the order in which the weights come apart: 8 bits
// widen while they are loaded, 4 bits take shifts and masks besides, and no permutation.
#pragma once

#include "cpu/dot.h"

namespace lk::LK_VARIANT {

constexpr int64_t kBlock = 64;
constexpr int kWords = 2 * kWidth;            // 16-bit lanes of a vector
constexpr int kVectors = int(kBlock) / kWords;  // of a block

typedef int16_t Words __attribute__((vector_size(kWords * sizeof(int16_t))));
typedef uint16_t Unsigned __attribute__((vector_size(kWords * sizeof(int16_t))));
typedef int8_t Bytes __attribute__((vector_size(kWords)));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));

template <class V>
LK_INLINE V load_vector(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

// kWords bytes as signed numbers. GCC 12 widens them in halves if left to itself.
LK_INLINE Words widened(const uint8_t* p) {
#if defined(LK_VARIANT_AVX512)
  return Words(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(LK_VARIANT_AVX2)
  return Words(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_vector<Bytes>(p), Words);
#endif
}

// Bytes of a block, and unpack() into 16-bit lanes. These come in runs of kRun columns kStep apart: the first run from
// column 0 on, the next from 1 on, and after kStep of them from column kRun * kStep on.
template <int kBits>
struct Stored;

template <>
struct Stored<8> {
  static constexpr int64_t kBytes = 64;
  LK_MEMBER void unpack(const uint8_t* p, Words (&w)[kVectors]) {
    LK_UNROLL for (int i = 0; i < kVectors; ++i)
      w[i] = widened(p + i * kWords);
  }
  static constexpr int64_t kRun = kBlock, kStep = 1;
};

template <>
struct Stored<4> {
  static constexpr int64_t kBytes = 32;
  // q + 8.
  LK_MEMBER void unpack(const uint8_t* p, Words (&w)[kVectors]) {
#if defined(LK_VARIANT_AVX512)
    const Unsigned v = Unsigned(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    w[0] = Words(v & 15);
    w[1] = Words(v >> 4);
  }
  static constexpr int64_t kRun = 32, kStep = 2;
#else
    const Unsigned v = load_vector<Unsigned>(p);
    w[0] = Words(v & 15);
    w[1] = Words(v >> 4 & 15);
    w[2] = Words(v >> 8 & 15);
    w[3] = Words(v >> 12);
  }
  static constexpr int64_t kRun = 16, kStep = 4;
#endif
};

// Products of 16-bit lanes, those of a pair added.
LK_INLINE Ints multiply_pairs(Words a, Words b) {
#if defined(LK_VARIANT_AVX512)
  return Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(LK_VARIANT_AVX2)
  return Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
  const Ints x = Ints(a), y = Ints(b);
  const auto low = [](Ints v) { return Ints(v << 16) >> 16; };
  return low(x) * low(y) + (x >> 16) * (y >> 16);
#endif
}

// sums + multiply_pairs(a, b), in one instruction where there is one for it.
LK_INLINE Ints add_pairs(Ints sums, Words a, Words b) {
#if defined(LK_VARIANT_AVX512_BF16)
  return Ints(_mm512_dpwssd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#else
  return sums + multiply_pairs(a, b);
#endif
}

// Sums of products of a block's weights and x's, kVectors vectors each.
LK_INLINE vf block_dots(const Words (&weights)[kVectors], const Words (&x)[kVectors]) {
  Ints dots = multiply_pairs(weights[0], x[0]);
  LK_UNROLL for (int k = 1; k < kVectors; ++k) dots = add_pairs(dots, weights[k], x[k]);
  return __builtin_convertvector(dots, vf);
}
LK_INLINE void load_words(const int16_t* x, Words (&words)[kVectors]) {
  LK_UNROLL for (int k = 0; k < kVectors; ++k) words[k] = load_vector<Words>(x + k * kWords);
}

// sums[j][i] + factors[j][i][0] * (dot product of the block of weight row j and that of packed row i). What is kept in
// registers is all rows' weights, so that x is loaded once for them, or without room for these one row's.
template <int kBits, int kRows, int kCols>
LK_INLINE void add_block(vf (&sums)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x,
                         const float (*factors)[kCols][kWidth]) {
  constexpr int kHeld = kRegisters >= 24 ? kRows : 1;
  LK_UNROLL for (int first = 0; first < kRows; first += kHeld) {
    Words weights[kHeld][kVectors];
    LK_UNROLL for (int j = 0; j < kHeld; ++j) Stored<kBits>::unpack(w + (first + j) * w_stride, weights[j]);
    LK_UNROLL for (int i = 0; i < kCols; ++i) {
      Words words[kVectors];
      load_words(x + i * kBlock, words);
      LK_UNROLL for (int j = 0; j < kHeld; ++j)
        sums[first + j][i] =
            accumulate(sums[first + j][i], block_dots(weights[j], words), set1(factors[first + j][i][0]));
    }
  }
}

}  // namespace lk::LK_VARIANT
