// Products of quantized weights by AMX, for units of 16 blocks and more than a few x rows: the integers and the order of
// their sums are those of quantized_panel.cpp.
//
// A unit's weights lie four columns at a time, [16 steps, 16 blocks, 4 columns]; a row of a tile is the 64 columns of one
// block, so steps and blocks are exchanged in registers. x, of 16 bits, is 256 high + low, bytes each, and for each 16
// rows and each block two tiles, [2][16 steps, 16 rows, 4 columns]; its scales and sums are [16 blocks, m]. Rows that fill
// up the last tile are whatever they were, and nobody reads what comes of them. What comes out are sums for 16 weight rows times 16 x rows, to be scaled, block by block.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/quantized_panel.h"
#include "cpu/quantized_scales.h"

namespace lk::LK_VARIANT {

constexpr int64_t kUnitColumns = kLanes * kBlock;

// Where a unit's x is: tiles of block `block` and rows `row` and on, a multiple of 16; scales and sums of all m rows.
struct TiledUnit {
  char* data;
  float* scales;
  int32_t* sums;
  int64_t stride;  // of scales and sums: whole tiles

  TiledUnit(const QuantizedRows& x, int64_t unit) : stride((x.m + kTile - 1) / kTile * kTile) {
    data = x.data + unit * (x.tiled_bytes() / x.tiled());
    scales = reinterpret_cast<float*>(data + stride * kUnitColumns * 2);
    sums = reinterpret_cast<int32_t*>(scales + kLanes * stride);
  }
  // Rows from m on, of the last tile: nobody reads what comes of them, but with what lies there it could take long.
  void fill_up(int64_t m) const {
    for (int64_t block = 0; block < kLanes; ++block)
      memset(scales + block * stride + m, 0, size_t(stride - m) * sizeof(float));
  }
  char* tile(int64_t row, int64_t block, int64_t which) const {
    return data + row * kUnitColumns * 2 + (block * 2 + which) * kTile * kBlock;
  }
};

// The integers of a unit of row `row`, their scales by block.
LK_INLINE void place_tiled(const TiledUnit& unit, int64_t row, const int32_t* q, const float* scales) {
  const int64_t first = row / kTile * kTile, place = 4 * (row - first);
  for (int64_t block = 0; block < kLanes; ++block) {
    alignas(16) char high[kBlock], low[kBlock];
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < kBlock; i += kWidth, q += kWidth) {
      const __m512i v = _mm512_load_si512(q);
      _mm_store_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(v, 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(v));
      sum = _mm512_add_epi32(sum, v);
    }
    char *highs = unit.tile(first, block, 0) + place, *lows = unit.tile(first, block, 1) + place;
    LK_UNROLL for (int64_t i = 0; i < kTile; ++i) {
      memcpy(highs + 64 * i, high + 4 * i, 4);
      memcpy(lows + 64 * i, low + 4 * i, 4);
    }
    unit.scales[block * unit.stride + row] = scales[block];
    // Sums below 2^22: exact in float, in any order.
    unit.sums[block * unit.stride + row] = int32_t(lk::LK_VARIANT::sum(_mm512_cvtepi32_ps(sum)));
  }
}

// The steps of a unit of one weight row, as signed bytes.
template <int kBits>
LK_INLINE void steps_of(const uint8_t* w, vf (&steps)[kTile]) {
  typedef uint8_t Bytes __attribute__((vector_size(64)));
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kBits; ++i) {
    const Bytes v = load_vector<Bytes>(w + i * 64);
    if constexpr (kBits == 8) {
      steps[i] = vf(v);
    } else {
      steps[2 * i] = vf((v & 15) - 8);
      steps[2 * i + 1] = vf((v >> 4) - 8);
    }
  }
}

// Sums of 16 x rows for the blocks (a unit's, all units' added) of 16 weight rows.
using TiledSums = vf[kLanes][kTile];
constexpr int64_t kTiledGroups = kMaxPackedRows / kTile;

// What tiles give for one block: 256 high + low, [16 weight rows, 16 x rows].
struct BlockTotals {
  alignas(64) int32_t high[kTile][kTile], low[kTile][kTile];
};

// Weight rows [n, n + rows), at most 16: sums[group of x rows], of all tiled units.
template <int kBits, bool kWhole>
void sum_tiled(Tiles& tiles, const Matrix& w, const QuantizedRows& x, int64_t n, int64_t rows, TiledSums* sums) {
  if constexpr (kWhole) rows = kTile;
  const Quantization& q = w.quantization;
  const int64_t units = x.tiled(), per_group = q.group / kBlock, groups = (x.blocks() + per_group - 1) / per_group;
  const int64_t unit_bytes = kUnitColumns * kBits / 8;
  for (int64_t u = 0; u < units; ++u) {
    const TiledUnit unit(x, u);
    Columns columns;
    columns_of({u * kLanes, kLanes}, x.c, per_group, groups, &columns);
    alignas(64) uint8_t weights[kLanes][kTile][kBlock];
    alignas(64) float scales[kTile][kLanes], offsets[kTile][kLanes];
    const uint8_t* row = static_cast<const uint8_t*>(w.data) + n * w.stride + u * unit_bytes;
    for (int64_t j = 0; j < rows; ++j) {
      vf steps[kTile];
      steps_of<kBits>(row + j * w.stride, steps);
      transpose(steps);
#pragma GCC unroll 16
      for (int64_t block = 0; block < kLanes; ++block) memcpy(weights[block][j], &steps[block], kBlock);
      store(scales[j], scales_of(q, n + j, columns, 0));
      if (q.offset) store(offsets[j], offsets_of(q, n + j, columns, 0));
    }
    // What comes next is fetched meanwhile: the next unit of these rows, or the first of the next rows.
    const uint8_t* next = u + 1 < units ? row + unit_bytes
                          : n + 2 * kTile <= w.n ? row + kTile * w.stride - u * unit_bytes : nullptr;
    Tiles::keep(weights);
    for (int64_t m = 0; m < x.m; m += kTile) {
      tiles.shape(rows, kTile, 0);
      BlockTotals totals[4];
      const auto multiply = [&](int64_t block) __attribute__((always_inline)) {
        _tile_loadd(4, weights[block], kBlock);
        _tile_loadd(6, unit.tile(m, block, 0), 64);
        _tile_zero(0);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, unit.tile(m, block, 1), 64);
        _tile_zero(1);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, weights[block + 1], kBlock);
        _tile_loadd(6, unit.tile(m, block + 1, 0), 64);
        _tile_zero(2);
        _tile_dpbssd(2, 5, 6);
        _tile_loadd(7, unit.tile(m, block + 1, 1), 64);
        _tile_zero(3);
        _tile_dpbsud(3, 5, 7);
        _tile_stored(0, totals[block % 4].high, 64);
        _tile_stored(1, totals[block % 4].low, 64);
        _tile_stored(2, totals[block % 4 + 1].high, 64);
        _tile_stored(3, totals[block % 4 + 1].low, 64);
      };
      const auto scale = [&](int64_t block, auto before) __attribute__((always_inline)) {
        const BlockTotals& from = totals[block % 4];
        const vf x_scales = load(unit.scales + block * unit.stride + m);
        vf* to = sums[m / kTile][block];
        LK_UNROLL for (int64_t j = 0; j < rows; ++j) {
          const Ints total = (load_vector<Ints>(from.high[j]) << 8) + load_vector<Ints>(from.low[j]);
          to[j] = accumulate(before(to[j]), __builtin_convertvector(total, vf), mul(set1(scales[j][block]), x_scales));
        }
        if (!q.offset) return;
        const Ints all = load_vector<Ints>(unit.sums + block * unit.stride + m);
        const vf product = mul(__builtin_convertvector(all, vf), x_scales);
        for (int64_t j = 0; j < rows; ++j) to[j] = accumulate(to[j], set1(offsets[j][block]), product);
      };
      multiply(0);
      for (int64_t block = 0; block < kLanes; block += 2) {
        if (next && m == 0)
          for (int64_t j = 0; j < 2; ++j)
            for (int64_t i = 0; i < unit_bytes; i += 64) prefetch_l2(next + (block + j) * w.stride + i);
        if (block + 2 < kLanes) multiply(block + 2);
        Tiles::keep(totals);
        for (int64_t i = block; i < block + 2; ++i) {
          if (u == 0) scale(i, [](const vf&) { return zero(); });
          else scale(i, [](const vf& sum) { return sum; });
        }
      }
    }
  }
}

template <int kBits>
void sum_tiled(Tiles& tiles, const Matrix& w, const QuantizedRows& x, int64_t n, int64_t rows, TiledSums* sums) {
  if (rows == kTile) sum_tiled<kBits, true>(tiles, w, x, n, rows, sums);
  else sum_tiled<kBits, false>(tiles, w, x, n, rows, sums);
}

// sums[i * kTileRows + j], vectors of lanes, of weight rows [begin, end), at most kTileRows: begun with the tiled units.
template <int kBits>
void begin_tiled(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, vf* sums) {
  alignas(64) TiledSums blocks[kTiledGroups];
  Tiles tiles;
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t rows = end - n < kTile ? end - n : kTile;
    sum_tiled<kBits>(tiles, w, x, n, rows, blocks);
    for (int64_t m = 0; m < x.m; m += kTile)
      for (int64_t j = 0; j < rows; ++j) {
        vf v[kTile];
        for (int64_t block = 0; block < kLanes; ++block) v[block] = blocks[m / kTile][block][j];
        transpose(v);
        for (int64_t i = 0; i < kTile && m + i < x.m; ++i) sums[(m + i) * kTileRows + n - begin + j] = v[i];
      }
  }
  _tile_release();
}

// Dot products of rows that have tiled units alone.
template <int kBits>
void all_tiled(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Totals out) {
  alignas(64) TiledSums blocks[kTiledGroups];
  Tiles tiles;
  for (int64_t n = begin; n < end; n += kTile, out.data += kTile) {
    const int64_t rows = end - n < kTile ? end - n : kTile;
    sum_tiled<kBits>(tiles, w, x, n, rows, blocks);
    for (int64_t m = 0; m < x.m; m += kTile) {
      TiledSums& sums = blocks[m / kTile];
      // Halves onto each other, as in sum().
      for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t block = 0; block < half; ++block)
          for (int64_t j = 0; j < rows; ++j) sums[block][j] = add(sums[block][j], sums[block + half][j]);
      vf totals[kTile] = {};
      for (int64_t j = 0; j < rows; ++j) totals[j] = sums[0][j];
      transpose(totals);
      for (int64_t i = 0; i < kTile && m + i < x.m; ++i) store(out.data + (m + i) * out.stride, totals[i], rows);
    }
  }
  _tile_release();
}

}  // namespace lk::LK_VARIANT
