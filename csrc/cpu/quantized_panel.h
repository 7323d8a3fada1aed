// Products of few packed x rows with rows of a quantized weight, in register tiles.
#pragma once

#include "cpu/panel.h"

namespace lk::LK_VARIANT {

// x rows as products with weights of `bits` take them: 16-bit integers [blocks of 64 columns, m, 64], so that a tile
// finds its rows at fixed distances; and of each row and block the scale, and scale times the sum of its integers.
struct QuantizedRows {
  char* data;
  int64_t m, c, bits;  // m may become smaller, until rows are packed

  QuantizedRows(int64_t rows, int64_t columns, int64_t bits, Workspace use = Workspace::linear_x);
  template <class T>
  void pack(int64_t row, const T* x);

  // Dot products of every x row and the weight rows [begin, end). Rows up to w.n are likely to be this thread's next.
  void panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const;

  int64_t bytes_of_row() const { return c * bits / 8 + 1; }

  int64_t blocks() const { return (c + 63) / 64; }
  int64_t scales() const { return (blocks() + kWidth - 1) / kWidth * kWidth; }  // of a row, zero behind the last block
  int16_t* words_of(int64_t block, int64_t row) const { return reinterpret_cast<int16_t*>(data) + (block * m + row) * 64; }
  float* scales_of(int64_t row) const { return reinterpret_cast<float*>(words_of(blocks(), 0)) + 2 * row * scales(); }
  float* sums_of(int64_t row) const { return scales_of(row) + scales(); }
};

}  // namespace lk::LK_VARIANT
