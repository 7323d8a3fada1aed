// Products of quantized weights in 16-bit words: see quantized_dot.h, which includes this.
//
// A 32-bit lane holds four columns of each step and takes two at a time: part 0 is its columns 0 and 2, part 1 columns 1 and
// 3, since words come apart into these without a permutation. x lies likewise, in vectors [steps, rows, 2 parts].
#pragma once

namespace lk::LK_VARIANT {

typedef int16_t Words __attribute__((vector_size(kWords * sizeof(int16_t))));
typedef uint16_t Unsigned __attribute__((vector_size(kWords * sizeof(int16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kWords)));

using Sums = Ints;
constexpr int kSumRegisters = 1;
LK_INLINE Sums start(Ints lanes) { return lanes; }
LK_INLINE Ints total(Sums sums) { return sums; }

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

// Part i of a vector of weights belongs to step i % kSteps, and is part i / kSteps of it.
template <int kBits, int kPart>
LK_INLINE Words part_of(Words v) {
  if (kBits == 8) return kPart == 0 ? v << 8 >> 8 : v >> 8;
  return Words(kPart == 3 ? Unsigned(v) >> 12 : Unsigned(v) >> 4 * kPart & 15);  // q + 8
}

#if defined(LK_VARIANT_AVX512_BF16)
constexpr bool kAddsAtOnce = true;  // by one instruction, without a register in between
#else
constexpr bool kAddsAtOnce = false;
#endif

// sums + products of 16-bit lanes, those of a pair added.
LK_INLINE Ints add_pairs(Ints sums, Words a, Words b) {
#if defined(LK_VARIANT_AVX512_BF16)
  return Ints(_mm512_dpwssd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#elif defined(LK_VARIANT_AVX512)
  return sums + Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(LK_VARIANT_NEON)
  const int16x8_t x = int16x8_t(a), y = int16x8_t(b);
  return sums + Ints(vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
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
    return part_of<kBits, kPart>(load_vector<Words>(w + j * w_stride));
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

// `step` is packed x, the vectors of a step of all lanes or of those of one half.
LK_INLINE Sums add_x(Sums sums, const int16_t* step) {
  const Words ones = Words{} + 1;
  sums = add_pairs(sums, load_vector<Words>(step), ones);
  return add_pairs(sums, load_vector<Words>(step + kBlock / 2), ones);
}

LK_INLINE void place(const int32_t* four, int64_t lane, int16_t* step) {
  constexpr uint64_t kLow = 0x0000ffff0000ffff;
  uint64_t pairs[2];
  memcpy(pairs, four, sizeof(pairs));
  const uint64_t parts = (pairs[0] & kLow) | (pairs[1] & kLow) << 16;
  const uint32_t low = uint32_t(parts), high = uint32_t(parts >> 32);
  memcpy(step + lane * 2, &low, sizeof(low));
  memcpy(step + lane * 2 + kBlock / 2, &high, sizeof(high));
}

}  // namespace lk::LK_VARIANT
