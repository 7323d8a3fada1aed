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
// at fixed distances. The tiled() units in front are as quantized_tiles.h says.
struct QuantizedRows {
#if defined(LK_VARIANT_AVX512_AMX)
  static constexpr int64_t kTileRows = 2 * lk::LK_VARIANT::kTileRows;  // three tiles
#else
  static constexpr int64_t kTileRows = lk::LK_VARIANT::kTileRows;
#endif
  static constexpr int64_t kMostRows = kMaxPackedRows;

  char* data;
  int64_t m, c;  // m may become smaller, until rows are packed

  QuantizedRows(int64_t rows, int64_t columns, Workspace use = Workspace::linear_x);
  static int64_t most_rows(int64_t) { return kMostRows; }
  int64_t packed_together() const { return tiled() ? kLanes : 1; }
  template <class T>
  void pack(int64_t row, int64_t count, const T* x, int64_t x_stride);

  // Dot products of every x row and the weight rows [begin, end). Rows up to w.n are likely to be this thread's next.
  void panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const;

  int64_t whole() const { return c / kBlock; }
  int64_t blocks() const { return (c + kBlock - 1) / kBlock; }
  int64_t units() const {
    return whole() / kLanes + __builtin_popcountll(uint64_t(whole() % kLanes)) + (c % kBlock ? 1 : 0);
  }
  // Units of 16 blocks that AMX multiplies. With fewer rows of x than a tile has, vectors do it sooner.
  int64_t tiled() const {
#if defined(LK_VARIANT_AVX512_AMX)
    return m >= kLanes ? whole() / kLanes : 0;
#else
    return 0;
#endif
  }
  // Bytes of the tiled units: for whole tiles of rows, 16-bit integers and PackedLanes.
  int64_t tiled_bytes() const {
    return tiled() * ((m + kLanes - 1) / kLanes * kLanes) * (2 * kLanes * kBlock + int64_t(sizeof(PackedLanes)));
  }
  int16_t* words_of(int64_t step, int64_t row) const {
    return reinterpret_cast<int16_t*>(data + tiled_bytes()) + ((step - tiled() * kLanes) * m + row) * kBlock;
  }
  PackedLanes* lanes_of(int64_t unit, int64_t row) const {
    return reinterpret_cast<PackedLanes*>(words_of(blocks(), 0)) + (unit - tiled()) * m + row;
  }
};

}  // namespace lk::LK_VARIANT
