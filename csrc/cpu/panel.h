// Products of few packed x rows with many weight rows, in register tiles: the loop of every linear.
#pragma once

#include <type_traits>

#include "cpu/dot.h"
#include "cpu/quantization.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {

constexpr int kMaxCols = kRegisters >= 24 ? 8 : 4;  // x rows of a register tile
constexpr int64_t kMaxPackedRows = 64;  // x rows per pass over the weights
constexpr int64_t kTileRows = 24;       // a multiple of every tile's weight rows; with those of five, four are left over
constexpr size_t kLine = 64;            // bytes of a cache line
constexpr int64_t kShortRow = 1024;     // bytes; a model of rows no longer than this lies in the caches
constexpr int64_t kStayingBytes = 16 << 10;  // x no larger stays in the first-level cache beside weights
constexpr int64_t kAheadBytes = 4096;   // at least so far ahead are weights fetched: shorter takes less than the way there

// Weight rows of a register tile with `cols` x rows. With one x row memory is what it waits for, and six rows read it faster
// than eight: probably because rows a multiple of 4 KiB apart share one set of the first-level cache, of eight ways, with x.
constexpr int rows_of_tile(int cols) {
  const int most = cols == 1 ? 6 : 8;
  return kRegisters / cols < most ? kRegisters / cols : most;
}

// The same for the only tile, of more than four x rows that don't stay in the first-level cache, packed as they were. Beside
// memory it waits for the second-level cache, from which x comes, too: the more weight rows, the less often. There it pays to
// have a few of the sums on the stack. Measured with AVX-512.
template <class T>
constexpr int rows_of_wide_tile(int cols) {
  if (kWidth < 16 || !std::is_same_v<T, typename Dot<T>::X>) return rows_of_tile(cols);
  return cols == 5 ? 6 : cols == 6 ? 5 : 4;
}

// Of `m` x rows, at most how many are in one tile. Where they all are, weights are read once, and memory is waited for least.
constexpr int64_t most_cols(int64_t m) { return kMaxCols <= 4 || m > 12 ? 4 : m > 8 ? 6 : kMaxCols; }

// x rows of the wider tiles, when `m` are cut into as few as `most` allows: the others have one row less.
constexpr int64_t even_cols(int64_t m, int64_t most) {
  const int64_t tiles = (m + most - 1) / most;
  return (m + tiles - 1) / tiles;
}

template <class T>
struct Product {
  const T* w;  // weight rows of c elements, w_stride apart
  int64_t w_stride;
  const typename Dot<T>::X* x;  // m packed rows, x_stride apart
  int64_t x_stride;
  int64_t m, c;
};

// Where dot products go: those of x row i to data[i * stride] and behind.
struct Totals {
  float* data;
  int64_t stride;
};

// One tile over the kRows weight rows from w on. A request at every chunk of half a line and more: memory is what it waits
// for, and asking once for the line was slower.
template <class T, int kRows, int kCols, int kFetch>
LK_INLINE void strip_of_tile(const Product<T>& p, const T* w, int64_t ahead, Totals out) {
  constexpr int64_t kChunk = Dot<T>::kChunk;
  constexpr int kStep = 2 * kChunk * sizeof(T) < kLine ? int(kLine / (kChunk * sizeof(T))) : 1;  // chunks
  dot_tile<T, kRows, kCols, kStep, kFetch>(w, p.w_stride, p.x, p.x_stride, p.c, ahead, kStep * kChunk, out.data, out.stride);
}

// `tiles` tiles over the same, of kCols x rows or one less. Each asks for its share of the memory that is next, slowly; or,
// with kEarly, for all of it.
template <class T, int kRows, int kCols, int kFetch>
LK_INLINE void strip_of_tiles(const Product<T>& p, const T* w, int64_t tiles, int64_t ahead, Totals out) {
  constexpr int64_t kChunk = Dot<T>::kChunk;
  constexpr int kStep = kChunk * sizeof(T) < kLine ? int(kLine / (kChunk * sizeof(T))) : 1;  // chunks
  constexpr bool kShared = !(kFetch & kEarly);
  const int64_t narrow = tiles * kCols - p.m;
  const int64_t share = kShared ? p.c / tiles : 0, step = kStep * kChunk / (kShared ? tiles : 1);
  int64_t row = 0;
  for (int64_t t = narrow; t < tiles; ++t, row += kCols, ahead += share)
    dot_tile<T, kRows, kCols, kStep, kFetch>(w, p.w_stride, p.x + row * p.x_stride, p.x_stride, p.c, ahead, step,
                                             out.data + row * out.stride, out.stride);
  if constexpr (kCols > 1)
    for (; row < p.m; row += kCols - 1, ahead += share)
      dot_tile<T, kRows, kCols - 1, kStep, kFetch>(w, p.w_stride, p.x + row * p.x_stride, p.x_stride, p.c, ahead,
                                                   step, out.data + row * out.stride, out.stride);
}

// Weight rows [n, n + kRows) against all x rows, cut into tiles of nearly equal width: kCols or one less. Meanwhile the rows
// from `next` on are fetched. Which requests pay was measured (benchmarks/NOTES.md, "Prefetches are dropped").
template <class T, int kRows, int kCols>
LK_INLINE void strip(const Product<T>& p, int64_t n, int64_t next, Totals out) {
  constexpr bool kWholeLines = Dot<T>::kChunk * sizeof(T) >= kLine;
  const T* w = p.w + n * p.w_stride;
  const int64_t ahead = (next - n) * p.w_stride, tiles = (p.m + kCols - 1) / kCols;
  constexpr bool kAlone = kCols < 3 || kCols > 6;  // in most_cols() and panel()
  if (kAlone || tiles == 1) {
    if constexpr (kWholeLines) {
      if (kCols <= 6 && p.c * int64_t(sizeof(T)) <= kShortRow)
        return strip_of_tile<T, kRows, kCols, kEarly>(p, w, ahead, out);
      return strip_of_tile<T, kRows, kCols, kEarly | kAgain>(p, w, ahead, out);
    } else {
      return strip_of_tile<T, kRows, kCols, 0>(p, w, ahead, out);
    }
  }
  if constexpr (!kAlone) {
    if constexpr (kWholeLines)
      if (kCols > 4 || tiles == 2) return strip_of_tiles<T, kRows, kCols, kEarly>(p, w, tiles, ahead, out);
    if (kCols == 4 && tiles < 4) return strip_of_tiles<T, kRows, kCols, kAgain>(p, w, tiles, ahead, out);
    strip_of_tiles<T, kRows, kCols, kAgain | kEveryOther>(p, w, tiles, ahead, out);
  }
}

template <class T, int kCols, int kRows = rows_of_tile(kCols)>
static void panel_of(const Product<T>& p, int64_t begin, int64_t end, int64_t limit, Totals out) {
  constexpr int kRest = kTileRows % kRows;
  const int64_t ahead = kRows + kAheadBytes / ((p.c + 1) * int64_t(sizeof(T)) * kRows) * kRows;
  const auto next = [&](int64_t n, int rows) { return n + ahead + rows <= limit ? n + ahead : n; };
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows, out.data += kRows) strip<T, kRows, kCols>(p, n, next(n, kRows), out);
  if constexpr (kRest > 0)
    for (; n + kRest <= end; n += kRest, out.data += kRest) strip<T, kRest, kCols>(p, n, next(n, kRest), out);
  for (; n < end; ++n, ++out.data) strip<T, 1, kCols>(p, n, n, out);
}

// Dot products of every x row and the weight rows [begin, end). Rows up to `limit` are likely to be this thread's next.
template <class T>
LK_INLINE void panel(const Product<T>& p, int64_t begin, int64_t end, int64_t limit, Totals out) {
  const int64_t cols = even_cols(p.m, most_cols(p.m));
  switch (cols) {
    case 1: return panel_of<T, 1>(p, begin, end, limit, out);
    case 2: return panel_of<T, 2>(p, begin, end, limit, out);
    case 3: return panel_of<T, 3>(p, begin, end, limit, out);
    case 4: return panel_of<T, 4>(p, begin, end, limit, out);
  }
  if constexpr (kMaxCols > 4) {
    if (p.m * p.c * int64_t(sizeof(*p.x)) > kStayingBytes) {
      switch (p.m) {
        case 5: return panel_of<T, 5, rows_of_wide_tile<T>(5)>(p, begin, end, limit, out);
        case 6: return panel_of<T, 6, rows_of_wide_tile<T>(6)>(p, begin, end, limit, out);
        case 7: return panel_of<T, 7, rows_of_wide_tile<T>(7)>(p, begin, end, limit, out);
        case 8: return panel_of<T, 8, rows_of_wide_tile<T>(8)>(p, begin, end, limit, out);
      }
    }
    switch (cols) {
      case 5: return panel_of<T, 5>(p, begin, end, limit, out);
      case 6: return panel_of<T, 6>(p, begin, end, limit, out);
      case 7: return panel_of<T, 7>(p, begin, end, limit, out);
      case 8: return panel_of<T, 8>(p, begin, end, limit, out);
    }
  }
}

// Packed x rows, for weights stored in their dtype.
template <class T>
struct DenseRows {
  static constexpr int64_t kTileRows = lk::LK_VARIANT::kTileRows;
  static constexpr int64_t kMostRows = kMaxPackedRows;
  static int64_t most_rows(int64_t) { return kMostRows; }  // of x per pass over weights of so many columns
  int64_t packed_together() const { return 1; }  // rows that are packed by one call, because they share cache lines

  typename Dot<T>::X* data;
  int64_t stride, m, c;

  DenseRows(int64_t rows, int64_t columns, Workspace use = Workspace::linear_x)
      : stride(packed_size<T>(columns)), m(rows), c(columns) {
    data = static_cast<typename Dot<T>::X*>(workspace(use, size_t(rows * stride) * sizeof(*data)));
  }
  // Rows [row, row + count) are those at x and behind, x_stride elements apart; row is a multiple of packed_together(),
  // and count as much, or what is left.
  void pack(int64_t row, int64_t count, const T* x, int64_t x_stride) {
    for (int64_t i = 0; i < count; ++i) pack_row(x + i * x_stride, c, data + (row + i) * stride);
  }

  // Dot products of every x row and the weight rows [begin, end). Rows up to w.n are likely to be this thread's next.
  void panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const {
    const Product<T> product{static_cast<const T*>(w.data), w.stride, data, stride, m, c};
    lk::LK_VARIANT::panel(product, begin, end, w.n, out);
  }
};

// Packs all rows: those at x and behind, x_stride elements apart.
template <class Rows, class T>
LK_INLINE void pack_all(Rows& rows, const T* x, int64_t x_stride) {
  const int64_t together = rows.packed_together();
  for (int64_t row = 0; row < rows.m; row += together)
    rows.pack(row, rows.m - row < together ? rows.m - row : together, x + row * x_stride, x_stride);
}

}  // namespace lk::LK_VARIANT

#if defined(LK_VARIANT_AVX512_AMX)
#include "cpu/amx_panel.h"
#endif
