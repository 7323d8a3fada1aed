// Attention of a few query rows over one chunk of keys: the arithmetic of verify_attention.
#pragma once

#include "cpu/dot.h"

namespace lk::LK_VARIANT {

constexpr int64_t kChunk = 128;  // keys
constexpr int kTileRows = 4;     // query rows that share a load of K or V
constexpr int64_t kMaxDim = 256;
constexpr float kNothing = -3e38f;  // the maximum of no scores: finite, so that a difference of two is no NaN

template <class T>
struct Tile {
  alignas(64) typename Dot<T>::X q[kTileRows][kMaxDim];  // packed
  alignas(64) float p[kTileRows][kChunk];                // scores, then their exponentials, by offset in the chunk
  float* sums[kTileRows];                                // [d] weighted values
};

// p[row][j .. j + kKeys) = q[row] . k, for kKeys rows of K.
template <class T, int kRows, int kKeys>
LK_INLINE void score_keys(Tile<T>& tile, const T* k, int64_t stride, int64_t d, int64_t j) {
  using D = Dot<T>;
  vf s[kKeys][kRows];
  for (int key = 0; key < kKeys; ++key)
    for (int row = 0; row < kRows; ++row) s[key][row] = zero();
  int64_t c = 0;
  for (; c + D::kChunk <= d; c += D::kChunk) {
#pragma GCC unroll 4
    for (int key = 0; key < kKeys; ++key) {
      const typename D::Chunk chunk = D::load(k + key * stride + c);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) s[key][row] = D::add(s[key][row], chunk, tile.q[row] + c);
    }
  }
  if (c < d)
    for (int key = 0; key < kKeys; ++key) {
      const typename D::Chunk chunk = D::load(k + key * stride + c, d - c);
      for (int row = 0; row < kRows; ++row) s[key][row] = D::add(s[key][row], chunk, tile.q[row] + c);
    }
  for (int row = 0; row < kRows; ++row) {
    if constexpr (kKeys == 4) {
      sum4(s[0][row], s[1][row], s[2][row], s[3][row], tile.p[row] + j);
    } else if constexpr (kKeys == 2 && kRows % 2 == 0) {
      alignas(16) float pair[4];
      if (row % 2) continue;
      sum4(s[0][row], s[1][row], s[0][row + 1], s[1][row + 1], pair);
      memcpy(tile.p[row] + j, pair, 8);
      memcpy(tile.p[row + 1] + j, pair + 2, 8);
    } else {
      for (int key = 0; key < kKeys; ++key) tile.p[row][j + key] = sum(s[key][row]);
    }
  }
}

// Scores of the keys [begin, end) of the chunk; k and v are its first rows. Unless v is null, the rows of V are on their way
// meanwhile.
template <class T, int kRows>
LK_INLINE void score(Tile<T>& tile, const T* k, int64_t stride, const T* v, int64_t v_stride, int64_t d, int64_t begin,
                     int64_t end) {
  constexpr int kKeys = kRows * 4 <= kRegisters ? 4 : 2;
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t j = begin;
  for (; j + kKeys <= end; j += kKeys) {
    for (int key = 0; key < kKeys && v; ++key)
      for (int64_t c = 0; c < d; c += kLine) prefetch(v + (j + key) * v_stride + c);
    score_keys<T, kRows, kKeys>(tile, k + j * stride, stride, d, j);
  }
  for (; j < end; ++j) score_keys<T, kRows, 1>(tile, k + j * stride, stride, d, j);
}

struct Softmax {
  float max, sum;
};

// p[begin, end) = exp(scale * p - max). Invisible scores in between are -inf. Vectors lie at multiples of kWidth, and what
// they hold outside the range counts as invisible, so the order of the sum does not depend on the range.
LK_INLINE Softmax softmax(float* p, float scale, int64_t begin, int64_t end) {
  const float hidden = -__builtin_inff();
  const int64_t first = begin / kWidth * kWidth, last = (end + kWidth - 1) / kWidth * kWidth;
  for (int64_t j = first; j < begin; ++j) p[j] = hidden;
  for (int64_t j = end; j < last; ++j) p[j] = hidden;
  vf most = set1(kNothing);
  for (int64_t j = first; j < last; j += kWidth) {
    const vf s = mul(load(p + j), set1(scale));
    store(p + j, s);
    most = max(most, s);
  }
  const float maximum = max_of(most);
  vf total = zero();
  for (int64_t j = first; j < last; j += kWidth) {
    const vf e = exp(sub(load(p + j), set1(maximum)));
    store(p + j, e);
    total = add(total, e);
  }
  return {maximum, sum(total)};
}

template <class T, int kRows, int kVectors>
LK_INLINE void add_columns(Tile<T>& tile, int first_row, const T* v, int64_t stride, int64_t begin, int64_t end,
                           int64_t column, int64_t n) {
  vf s[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < kVectors; ++i) s[row][i] = load(tile.sums[first_row + row] + column + i * kWidth);
  for (int64_t j = begin; j < end; ++j) {
    vf weight[kRows];
    for (int row = 0; row < kRows; ++row) weight[row] = set1(tile.p[first_row + row][j]);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const T* values = v + j * stride + column + i * kWidth;
      const vf value = n < kWidth ? load(values, n) : load(values);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) s[row][i] = fma(weight[row], value, s[row][i]);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < kVectors; ++i) store(tile.sums[first_row + row] + column + i * kWidth, s[row][i]);
}

// sums[row] += p[row][j] * v[j] for j in [begin, end), in rising order, of kRows rows from first_row on. The sums have room
// for whole vectors.
template <class T, int kRows>
LK_INLINE void add_values(Tile<T>& tile, int first_row, const T* v, int64_t stride, int64_t d, int64_t begin,
                          int64_t end) {
  constexpr int kVectors = kRows * 4 <= kRegisters ? 4 : 2;
  int64_t column = 0;
  for (; column + kVectors * kWidth <= d; column += kVectors * kWidth)
    add_columns<T, kRows, kVectors>(tile, first_row, v, stride, begin, end, column, kWidth);
  for (; column < d; column += kWidth)
    add_columns<T, kRows, 1>(tile, first_row, v, stride, begin, end, column, d - column);
}

}  // namespace lk::LK_VARIANT
