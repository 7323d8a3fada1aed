// How a block of 64 columns of a quantized weight row, or a few of them, are multiplied with packed x rows.
//
// Both are 16-bit integers there; their products are summed exactly, in int32: x is at most 2^15 and a weight 2^7 in
// magnitude, a vector lane sums at most 8 products, so 2^25. x lies in the order in which the weights come apart: 8 bits
// widen while they are loaded, 4 bits take shifts and masks, and no permutation.
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

// Blocks that are multiplied together.
#if defined(LK_VARIANT_AVX512_BF16)
constexpr int64_t together(int64_t bits) { return bits == 4 ? 2 : 1; }
#else
constexpr int64_t together(int64_t) { return 1; }
#endif

// Bytes of a block, and unpack() into 16-bit lanes. These come in runs of kRun columns kStep apart: the first run from
// column 0 on, the next from 1 on, and after kStep of them from column kRun * kStep on. place() writes the 16-bit
// integers of the block `part` of those that are together so that they meet their weights.
template <int kBits>
struct Stored;

template <int64_t kRun, int64_t kStep>
LK_INLINE void place_runs(const int32_t* q, int16_t* words) {
  for (int64_t group = 0; group < kBlock; group += kRun * kStep)
    for (int64_t step = 0; step < kStep; ++step)
      for (int64_t i = 0; i < kRun; ++i) words[group + step * kRun + i] = int16_t(q[group + step + i * kStep]);
}

template <>
struct Stored<8> {
  static constexpr int64_t kBytes = 64;
  LK_MEMBER void unpack(const uint8_t* p, Words (&w)[kVectors]) {
    LK_UNROLL for (int i = 0; i < kVectors; ++i)
      w[i] = widened(p + i * kWords);
  }
  LK_MEMBER void place(const int32_t* q, int16_t* words, int64_t) { place_runs<kBlock, 1>(q, words); }
};

template <>
struct Stored<4> {
  static constexpr int64_t kBytes = 32;
#if defined(LK_VARIANT_AVX512_BF16)
  // Of both blocks the high bytes of the even columns, those of the odd ones, and the low bytes likewise.
  LK_MEMBER void place(const int32_t* q, int16_t* words, int64_t part) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(words) + part * kBytes;
    for (int64_t i = 0; i < kBlock; ++i) {
      uint8_t* high = bytes + i % 2 * kBlock + i / 2;
      high[0] = uint8_t(q[i] >> 8), high[2 * kBlock] = uint8_t(q[i]);
    }
  }
#else
  LK_MEMBER void place(const int32_t* q, int16_t* words, int64_t) { place_runs<16, 4>(q, words); }
  // q + 8.
  LK_MEMBER void unpack(const uint8_t* p, Words (&w)[kVectors]) {
#if defined(LK_VARIANT_AVX512)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const Unsigned v = Unsigned(_mm512_inserti64x4(_mm512_castsi256_si512(half), _mm256_srli_epi16(half, 4), 1));
    w[0] = Words(v & 15);
    w[1] = Words(v >> 8 & 15);
#else
    const Unsigned v = load_vector<Unsigned>(p);
    w[0] = Words(v & 15);
    w[1] = Words(v >> 4 & 15);
    w[2] = Words(v >> 8 & 15);
    w[3] = Words(v >> 12);
#endif
  }
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

#if defined(LK_VARIANT_AVX512_BF16)
// 4 bits: bytes of weights times those of x, high ones first. One vector has even or odd columns of two blocks, one in
// each half, so unpacking is a shift and two masks for both: with one x row that is what takes the time.
template <int kRows, int kCols>
LK_INLINE void add_two_blocks(vf (&sums)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x,
                              const float (*factors)[kCols][kWidth]) {
  Unsigned even[kRows], odd[kRows];
  LK_UNROLL for (int j = 0; j < kRows; ++j) {
    const Unsigned v = load_vector<Unsigned>(w + j * w_stride);
    even[j] = v & 0x0f0f;
    odd[j] = v >> 4 & 0x0f0f;
  }
  LK_UNROLL for (int i = 0; i < kCols; ++i) {
    const int16_t* words = x + i * 2 * kBlock;
    const __m512i high_even = _mm512_load_si512(words), high_odd = _mm512_load_si512(words + kWords);
    const __m512i low_even = _mm512_load_si512(words + 2 * kWords), low_odd = _mm512_load_si512(words + 3 * kWords);
    LK_UNROLL for (int j = 0; j < kRows; ++j) {
      __m512i dots = _mm512_dpbusd_epi32(__m512i(Ints{}), __m512i(even[j]), high_even);
      dots = _mm512_dpbusd_epi32(dots, __m512i(odd[j]), high_odd);
      dots = _mm512_slli_epi32(dots, 8);
      dots = _mm512_dpbusd_epi32(dots, low_even, __m512i(even[j]));
      dots = _mm512_dpbusd_epi32(dots, low_odd, __m512i(odd[j]));
      const float* two = factors[j][i];
      const vf factor = _mm512_mask_mov_ps(set1(two[0]), __mmask16(0xff00), set1(two[1]));
      sums[j][i] = accumulate(sums[j][i], _mm512_cvtepi32_ps(dots), factor);
    }
  }
}
#endif

// sums[j][i] + factors[j][i][0] * (dot product of the block of weight row j and that of packed row i), and likewise for
// the blocks that are together with it. What is kept in registers is all rows' weights, so that x is loaded once for
// them, or without room for these one row's.
template <int kBits, int kRows, int kCols>
LK_INLINE void add_block(vf (&sums)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x,
                         const float (*factors)[kCols][kWidth]) {
#if defined(LK_VARIANT_AVX512_BF16)
  if constexpr (kBits == 4) return add_two_blocks(sums, w, w_stride, x, factors);
  else
#endif
  {
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
}

}  // namespace lk::LK_VARIANT
