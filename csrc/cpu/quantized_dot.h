// How weights in 8 and 4 bits come apart, and are multiplied with packed x.
//
// Both are 16-bit integers there, and their products are summed exactly, in int32: x is at most 2^15 and a weight 2^7 in
// magnitude, a lane sums at most 64 products, so 2^28. A 32-bit lane holds four columns of each step (see
// cpu/quantization.h), and takes two at a time: part 0 is its columns 0 and 2, part 1 columns 1 and 3, since words come
// apart into these without a permutation. x lies likewise, in vectors [steps, rows, 2 parts].
#pragma once

#include "cpu/dot.h"
#include "cpu/quantized_unit.h"

namespace lk::LK_VARIANT {

constexpr int kWords = 2 * kWidth;        // 16-bit lanes of a vector
constexpr int kHalves = kLanes / kWidth;  // vectors of a step; each is gone through by itself

typedef int16_t Words __attribute__((vector_size(kWords * sizeof(int16_t))));
typedef uint16_t Unsigned __attribute__((vector_size(kWords * sizeof(int16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kWords)));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));

template <class V>
LK_INLINE V load_vector(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

// kWords bytes as words. GCC 12 widens them in halves if left to itself.
LK_INLINE Unsigned widened(const uint8_t* p) {
#if defined(LK_VARIANT_AVX512)
  return Unsigned(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(LK_VARIANT_AVX2)
  return Unsigned(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_vector<Bytes>(p), Unsigned);
#endif
}

// A vector of weights holds kSteps steps; part<i> of them belongs to step i % kSteps, and is part i / kSteps of it.
template <int kBits>
struct Stored;

template <>
struct Stored<8> {
  static constexpr int64_t kBytes = 64;  // of a block
  static constexpr int kSteps = 1;
  template <int kPart>
  LK_MEMBER Words part(Words v) {
    return kPart == 0 ? v << 8 >> 8 : v >> 8;
  }
};

template <>
struct Stored<4> {
  static constexpr int64_t kBytes = 32;
  static constexpr int kSteps = 2;
  template <int kPart>
  LK_MEMBER Words part(Words v) {  // q + 8
    return Words(kPart == 3 ? Unsigned(v) >> 12 : Unsigned(v) >> 4 * kPart & 15);
  }
};

#if defined(LK_VARIANT_AVX512_BF16)
constexpr bool kAddsPairsAtOnce = true;  // by one instruction, without a register in between
#else
constexpr bool kAddsPairsAtOnce = false;
#endif

// sums + products of 16-bit lanes, those of a pair added.
LK_INLINE Ints add_pairs(Ints sums, Words a, Words b) {
#if defined(LK_VARIANT_AVX512_BF16)
  return Ints(_mm512_dpwssd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#elif defined(LK_VARIANT_AVX512)
  return sums + Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(LK_VARIANT_AVX2)
  // Written so, because GCC 12 multiplies first and adds later, and keeps the products on the stack.
  Words products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "x"(b));
  return sums;
#else
  const Ints x = Ints(a), y = Ints(b);
  const auto low = [](Ints v) { return Ints(v << 16) >> 16; };
  return sums + (low(x) * low(y) + (x >> 16) * (y >> 16));
#endif
}

// dots[j][i] + products of w[j] and the vector of packed row i at x.
template <int kRows, int kCols>
LK_INLINE void add_words(Ints (&dots)[kRows][kCols], const Words (&w)[kRows], const int16_t* x) {
  LK_UNROLL for (int i = 0; i < kCols; ++i) {
    const Words v = load_vector<Words>(x + i * kBlock);
    if constexpr (kCols > 6) asm("" ::: "memory");  // or else the compiler loads it again for each weight row
    LK_UNROLL for (int j = 0; j < kRows; ++j) dots[j][i] = add_pairs(dots[j][i], w[j], v);
  }
}

// Besides the sums, one more register than the smaller of both sides has, if that is small: it is loaded first and stays.
template <int kBits, int kPart, int kRows, int kCols>
LK_INLINE void add_part(Ints (&dots)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x, int64_t x_step) {
  constexpr int kSteps = Stored<kBits>::kSteps;
  const auto part = [&](int j) __attribute__((always_inline)) {
    return Stored<kBits>::template part<kPart>(load_vector<Words>(w + j * w_stride));
  };
  x += kPart % kSteps * x_step + kPart / kSteps * (kBlock / 2);
  if constexpr (kRows > kCols && kCols > 2) {
    Words v[kCols];
    LK_UNROLL for (int i = 0; i < kCols; ++i) v[i] = load_vector<Words>(x + i * kBlock);
    LK_UNROLL for (int j = 0; j < kRows; ++j) {
      const Words row = part(j);
      LK_UNROLL for (int i = 0; i < kCols; ++i) dots[j][i] = add_pairs(dots[j][i], row, v[i]);
    }
  } else {
    Words rows[kRows];
    LK_UNROLL for (int j = 0; j < kRows; ++j) rows[j] = part(j);
    add_words(dots, rows, x);
  }
}

// dots[j][i] + products of one vector of each weight row, w_stride apart, and as many steps of packed row i, x_step apart.
template <int kBits, int kRows, int kCols>
LK_INLINE void add_steps(Ints (&dots)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x, int64_t x_step) {
  const auto forget = [&] { asm("" : "+r"(w)); };  // or else the compiler keeps what it has read in registers that it hasn't got
  add_part<kBits, 0>(dots, w, w_stride, x, x_step);
  forget();
  add_part<kBits, 1>(dots, w, w_stride, x, x_step);
  if constexpr (kBits == 4) {
    forget();
    add_part<kBits, 2>(dots, w, w_stride, x, x_step);
    forget();
    add_part<kBits, 3>(dots, w, w_stride, x, x_step);
  }
}

// The same for a block in order with 4 bits: half a vector of each weight row.
template <int kRows, int kCols>
LK_INLINE void add_nibbles(Ints (&dots)[kRows][kCols], const uint8_t* w, int64_t w_stride, const int16_t* x) {
  Words even[kRows], odd[kRows];
  LK_UNROLL for (int j = 0; j < kRows; ++j) {
    const Unsigned pairs = widened(w + j * w_stride);
    even[j] = Words(pairs & 15);
    odd[j] = Words(pairs >> 4);
  }
  add_words(dots, even, x);
  add_words(dots, odd, x + kBlock / 2);
}

}  // namespace lk::LK_VARIANT
