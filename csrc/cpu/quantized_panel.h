// Products of few packed x rows with rows of a quantized weight, in register tiles.
#pragma once

#include "cpu/panel.h"
#include "cpu/quantized_unit.h"

namespace lk::LK_VARIANT {

// Of the 16 lanes of a unit: the scales of packed x, and the sums of its integers.
struct PackedLanes {
  float scales[kLanes];
  int32_t sums[kLanes];
};

// x rows as products with quantized weights take them: 16-bit integers [steps, m, 64] (a block has one step; for the
// order of the 64 see quantized_words.h and quantized_bytes.h) and behind them PackedLanes [units, m]. So a tile finds its rows
// at fixed distances.
struct QuantizedRows {
  static constexpr int64_t kTileRows = lk::LK_VARIANT::kTileRows;
  static constexpr int64_t kMostRows = kMaxPackedRows;
  static constexpr int64_t kPackedTogether = 1;
  static int64_t most_rows(int64_t) { return kMostRows; }

  char* data;
  int64_t m, c;  // m may become smaller, until rows are packed

  QuantizedRows(int64_t rows, int64_t columns, Workspace use = Workspace::linear_x);
  template <class T>
  void pack(int64_t row, int64_t count, const T* x, int64_t x_stride);

  // Dot products of every x row and the weight rows [begin, end). Rows up to w.n are likely to be this thread's next.
  void panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const;

  int64_t whole() const { return c / kBlock; }
  int64_t blocks() const { return (c + kBlock - 1) / kBlock; }
  int64_t units() const {
    return whole() / kLanes + __builtin_popcountll(uint64_t(whole() % kLanes)) + (c % kBlock ? 1 : 0);
  }
  int16_t* words_of(int64_t step, int64_t row) const {
    return reinterpret_cast<int16_t*>(data) + (step * m + row) * kBlock;
  }
  PackedLanes* lanes_of(int64_t unit, int64_t row) const {
    return reinterpret_cast<PackedLanes*>(words_of(blocks(), 0)) + unit * m + row;
  }
};

}  // namespace lk::LK_VARIANT
