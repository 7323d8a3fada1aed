// Products of quantized weights by AMX, for units of 16 blocks and many x rows. Integers, and the order in which blocks are
// added, are those of quantized_panel.cpp, so are the bits.
//
// A unit's weights lie four columns at a time, [16 steps, 16 blocks, 4 columns]. A row of a tile is the 64 columns of one
// block, so steps and blocks change places in registers. x, of 16 bits, is 256 high + low: for each block two tiles of
// bytes, [16 steps, 16 rows, 4 columns]. What comes of them, [16 weight rows, 16 x rows] for each block, is put together
// and scaled by vectors of x rows. All that takes as long for 16 x rows as for one.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/quantized_panel.h"
#include "cpu/quantized_scales.h"

namespace lk::LK_VARIANT {

constexpr int64_t kUnitColumns = kLanes * kBlock;

// Where a unit's x is.
struct TiledUnit {
  char* data;      // [groups of 16 rows][blocks][high, low], a tile each
  int64_t stride;  // rows, in whole groups
  float* scales;   // [blocks, stride]
  int32_t* sums;   // likewise

  TiledUnit(const QuantizedRows& x, int64_t unit)
      : data(x.data + unit * (x.tiled_bytes() / x.tiled())),
        stride((x.m + kTile - 1) / kTile * kTile),
        scales(reinterpret_cast<float*>(data + stride * kUnitColumns * 2)),
        sums(reinterpret_cast<int32_t*>(scales + kLanes * stride)) {}

  char* tile(int64_t group, int64_t block, int64_t low) const {
    return data + ((group * kLanes + block) * 2 + low) * kTile * kBlock;
  }

  // Rows behind the last: nobody reads what comes of them, but with numbers too small to be normal it could take long.
  void fill_up(int64_t m) const {
    for (int64_t block = 0; block < kLanes; ++block)
      memset(scales + block * stride + m, 0, size_t(stride - m) * sizeof(float));
  }

  // A row's integers in the order of columns, and their scales by block.
  void place(int64_t row, const int32_t* q, const float* block_scales) const {
    for (int64_t block = 0; block < kLanes; ++block) {
      alignas(16) char high[kBlock], low[kBlock];
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = 0; i < kBlock; i += kWidth, q += kWidth) {
        const __m512i v = _mm512_load_si512(q);
        _mm_store_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(v, 8)));
        _mm_store_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(v));
        total = _mm512_add_epi32(total, v);
      }
      char *highs = tile(row / kTile, block, 0) + row % kTile * 4, *lows = tile(row / kTile, block, 1) + row % kTile * 4;
      LK_UNROLL for (int64_t step = 0; step < kTile; ++step) {
        memcpy(highs + step * kBlock, high + step * 4, 4);
        memcpy(lows + step * kBlock, low + step * 4, 4);
      }
      scales[block * stride + row] = block_scales[block];
      // Of 64 integers up to 2^15: exact.
      sums[block * stride + row] = int32_t(sum(_mm512_cvtepi32_ps(total)));
    }
  }
};

// The steps of a unit of one weight row, as signed bytes.
template <int kBits>
LK_INLINE void load_steps(const uint8_t* w, vf (&steps)[kTile]) {
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

// A unit of up to 16 weight rows.
struct TiledWeights {
  alignas(64) uint8_t tiles[kLanes][kTile][kBlock];
  alignas(64) float scales[kTile][kLanes], offsets[kTile][kLanes];
  bool has_offsets;

  template <int kBits>
  void load(const Matrix& w, const Columns& columns, int64_t n, int64_t rows) {
    const Quantization& q = w.quantization;
    const uint8_t* row = static_cast<const uint8_t*>(w.data) + n * w.stride + columns.unit.first * kBlock * kBits / 8;
    has_offsets = q.offset;
    for (int64_t j = 0; j < rows; ++j, row += w.stride) {
      vf steps[kTile];
      load_steps<kBits>(row, steps);
      transpose(steps);
#pragma GCC unroll 16
      for (int64_t block = 0; block < kLanes; ++block) memcpy(tiles[block][j], &steps[block], kBlock);
      store(scales[j], scales_of(q, n + j, columns, 0));
      if (has_offsets) store(offsets[j], offsets_of(q, n + j, columns, 0));
    }
    Tiles::keep(tiles);
  }
};

// By block and weight row, of 16 x rows: sums of the units so far.
using TiledSums = vf[kLanes][kTile];
constexpr int64_t kTiledGroups = kMaxPackedRows / kTile;

// What the tiles of two blocks give. One block's results take long, so there are always two more under way.
struct TwoTotals {
  alignas(64) int32_t high[2][kTile][kTile], low[2][kTile][kTile];

  __attribute__((always_inline)) void multiply(const TiledWeights& w, const TiledUnit& x, int64_t group, int64_t block) {
    _tile_loadd(4, w.tiles[block], kBlock);
    _tile_loadd(6, x.tile(group, block, 0), kBlock);
    _tile_zero(0);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, x.tile(group, block, 1), kBlock);
    _tile_zero(1);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, w.tiles[block + 1], kBlock);
    _tile_loadd(6, x.tile(group, block + 1, 0), kBlock);
    _tile_zero(2);
    _tile_dpbssd(2, 5, 6);
    _tile_loadd(7, x.tile(group, block + 1, 1), kBlock);
    _tile_zero(3);
    _tile_dpbsud(3, 5, 7);
    _tile_stored(0, high[0], kBlock);
    _tile_stored(1, low[0], kBlock);
    _tile_stored(2, high[1], kBlock);
    _tile_stored(3, low[1], kBlock);
    Tiles::keep(this);
  }

  // Adds block `block`, number `i` of the two, scaled.
  template <bool kBegins>
  __attribute__((always_inline)) void add_to(TiledSums& sums, int i, const TiledWeights& w, const TiledUnit& x, int64_t group,
                               int64_t block, int64_t rows) const {
    const int64_t at = block * x.stride + group * kTile;
    const vf x_scales = load(x.scales + at);
    LK_UNROLL for (int64_t j = 0; j < rows; ++j) {
      const Ints total = (load_vector<Ints>(high[i][j]) << 8) + load_vector<Ints>(low[i][j]);
      const vf before = kBegins ? zero() : sums[block][j];
      sums[block][j] = accumulate(before, __builtin_convertvector(total, vf), mul(set1(w.scales[j][block]), x_scales));
    }
    if (!w.has_offsets) return;
    const vf product = mul(__builtin_convertvector(load_vector<Ints>(x.sums + at), vf), x_scales);
    for (int64_t j = 0; j < rows; ++j) sums[block][j] = accumulate(sums[block][j], set1(w.offsets[j][block]), product);
  }
};

// Weight rows [n, n + rows), at most 16, and all x rows: the sums of all tiled units.
template <int kBits, bool kWhole>
void sum_units(Tiles& tiles, const Matrix& w, const QuantizedRows& x, int64_t n, int64_t rows, TiledSums* sums) {
  if constexpr (kWhole) rows = kTile;
  constexpr int64_t kUnitBytes = kUnitColumns * kBits / 8;
  const int64_t per_group = w.quantization.group / kBlock, scales = (x.blocks() + per_group - 1) / per_group;
  tiles.shape(rows, kTile, 0);
  for (int64_t u = 0; u < x.tiled(); ++u) {
    const TiledUnit unit(x, u);
    Columns columns;
    columns_of({u * kLanes, kLanes}, x.c, per_group, scales, &columns);
    TiledWeights weights;
    weights.load<kBits>(w, columns, n, rows);
    // What is fetched meanwhile: the next unit of these rows, or the first one of the next rows.
    const bool last = u + 1 == x.tiled();
    const uint8_t* next = static_cast<const uint8_t*>(w.data) +
                          (last ? (n + kTile) * w.stride : n * w.stride + (u + 1) * kUnitBytes);
    const int64_t fetched = n + (last ? 2 * kTile : kTile) <= w.n ? kUnitBytes : 0;
    for (int64_t group = 0; group * kTile < x.m; ++group) {
      TwoTotals totals[2];
      totals[0].multiply(weights, unit, group, 0);
      for (int64_t block = 0; block < kLanes; block += 2) {
        for (int64_t j = block; j < block + 2 && group == 0; ++j)
          for (int64_t i = 0; i < fetched; i += 64) prefetch_l2(next + j * w.stride + i);
        if (block + 2 < kLanes) totals[block / 2 % 2 ^ 1].multiply(weights, unit, group, block + 2);
        for (int i = 0; i < 2; ++i) {
          const TwoTotals& from = totals[block / 2 % 2];
          if (u == 0) from.add_to<true>(sums[group], i, weights, unit, group, block + i, rows);
          else from.add_to<false>(sums[group], i, weights, unit, group, block + i, rows);
        }
      }
    }
  }
}

// Calls use(first row, rows, sums) for each 16 of the weight rows [begin, end).
template <int kBits, class Use>
LK_INLINE void for_each_tile(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, const Use& use) {
  alignas(64) TiledSums sums[kTiledGroups];
  Tiles tiles;
  Tiles::keep(x.data);
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t rows = end - n < kTile ? end - n : kTile;
    if (rows == kTile) sum_units<kBits, true>(tiles, w, x, n, rows, sums);
    else sum_units<kBits, false>(tiles, w, x, n, rows, sums);
    use(n, rows, sums);
  }
}

// The sums of weight rows [begin, end), at most kTileRows, as quantized_panel.cpp has them, for it to go on with: of weight
// row j and x row i the lanes at sums[i * kTileRows + j].
template <int kBits>
void begin_tiled(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, vf* sums) {
  for_each_tile<kBits>(w, x, begin, end, [&](int64_t n, int64_t rows, TiledSums* tiled) {
    for (int64_t m = 0; m < x.m; m += kTile)
      for (int64_t j = 0; j < rows; ++j) {
        vf lanes[kTile];
        for (int64_t block = 0; block < kLanes; ++block) lanes[block] = tiled[m / kTile][block][j];
        transpose(lanes);
        for (int64_t i = 0; i < kTile && m + i < x.m; ++i) sums[(m + i) * kTileRows + n - begin + j] = lanes[i];
      }
  });
}

// QuantizedRows::panel() where all units are tiled.
template <int kBits>
void all_tiled(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Totals out) {
  for_each_tile<kBits>(w, x, begin, end, [&](int64_t n, int64_t rows, TiledSums* tiled) {
    for (int64_t m = 0; m < x.m; m += kTile) {
      TiledSums& sums = tiled[m / kTile];
      // Halves onto each other, as in sum().
      for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t block = 0; block < half; ++block)
          for (int64_t j = 0; j < rows; ++j) sums[block][j] = add(sums[block][j], sums[block + half][j]);
      vf totals[kTile];
      for (int64_t j = 0; j < kTile; ++j) totals[j] = j < rows ? sums[0][j] : zero();
      transpose(totals);
      for (int64_t i = 0; i < kTile && m + i < x.m; ++i)
        store(out.data + (m + i) * out.stride + n - begin, totals[i], rows);
    }
  });
}

}  // namespace lk::LK_VARIANT
