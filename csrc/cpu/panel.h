// Products of few packed x rows with many weight rows, in register tiles: the loop of every linear.
#pragma once

#include "cpu/dot.h"

namespace lk::LK_VARIANT {

constexpr int kMaxCols = 4;             // x rows of a register tile
constexpr int64_t kMaxPackedRows = 64;  // x rows per pass over the weights
constexpr int64_t kTileRows = 24;       // a multiple of every tile's weight rows

// Weight rows of a register tile with `cols` x rows.
constexpr int rows_of_tile(int cols) {
  if (cols > 2) return kRegisters / kMaxCols;
  return kRegisters / cols < 8 ? kRegisters / cols : 8;
}

template <class T>
struct Product {
  const T* w;  // weight rows of c elements, w_stride apart
  int64_t w_stride;
  const typename Dot<T>::X* x;  // m packed rows, x_stride apart
  int64_t x_stride;
  int64_t m, c;
};

template <class T, int kRows, int kCols, class Sink>
LK_INLINE void tile(const Product<T>& p, int64_t row, int64_t n, int64_t ahead, int64_t step,
                    const Sink& sink) {
  float totals[kRows][kCols];
  dot_tile<T, kRows, kCols>(p.w + n * p.w_stride, p.w_stride, p.x + row * p.x_stride, p.x_stride, p.c, ahead, step,
                            totals);
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kCols; ++i) sink(row + i, n + j, totals[j][i]);
}

// Weight rows [n, n + kRows) against all x rows, cut into tiles of nearly equal width: kCols or one less. Each tile
// fetches its share of the rows from `next` on.
template <class T, int kRows, int kCols, class Sink>
LK_INLINE void strip(const Product<T>& p, int64_t n, int64_t next, const Sink& sink) {
  const int64_t tiles = (p.m + kCols - 1) / kCols;
  const int64_t narrow = tiles * kCols - p.m;
  const int64_t share = p.c / tiles, step = Dot<T>::kChunk / tiles;
  int64_t row = 0, ahead = (next - n) * p.w_stride;
  for (int64_t t = narrow; t < tiles; ++t, row += kCols, ahead += share)
    tile<T, kRows, kCols>(p, row, n, ahead, step, sink);
  if constexpr (kCols > 1)
    for (; row < p.m; row += kCols - 1, ahead += share) tile<T, kRows, kCols - 1>(p, row, n, ahead, step, sink);
}

template <class T, int kCols, class Sink>
static void panel_of(const Product<T>& p, int64_t begin, int64_t end, const Sink& sink) {
  constexpr int kRows = rows_of_tile(kCols);
  int64_t n = begin;
  // Rows behind `end` may be another thread's, so the last strip asks for what it has itself.
  for (; n + kRows <= end; n += kRows) strip<T, kRows, kCols>(p, n, n + 2 * kRows <= end ? n + kRows : n, sink);
  for (; n < end; ++n) strip<T, 1, kCols>(p, n, n, sink);
}

// Calls sink(x row, weight row, dot product) for every x row and the weight rows [begin, end).
template <class T, class Sink>
LK_INLINE void panel(const Product<T>& p, int64_t begin, int64_t end, const Sink& sink) {
  const int64_t tiles = (p.m + kMaxCols - 1) / kMaxCols;
  switch ((p.m + tiles - 1) / tiles) {  // so that at most `tiles` tiles are one narrower
    case 1: return panel_of<T, 1>(p, begin, end, sink);
    case 2: return panel_of<T, 2>(p, begin, end, sink);
    case 3: return panel_of<T, 3>(p, begin, end, sink);
    case 4: return panel_of<T, 4>(p, begin, end, sink);
  }
}

}  // namespace lk::LK_VARIANT
