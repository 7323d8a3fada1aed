// Attention of up to 16 query rows over one chunk of keys by AMX, in bfloat16. Keys are multiplied as they are stored; values
// are packed once for all query rows of a task.
//
// Weights are not rounded to bfloat16: each is a sum of two, which leaves an error of 2^-17. Dimensions of the sums come
// 32 at a time, the even and then the odd ones, so that packing values takes no permutation.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/attention_tile.h"

namespace lk::LK_VARIANT {

struct AttentionTiles {
  static constexpr int64_t kStep = 32;  // dimensions or keys of a product
  static constexpr int64_t kTileSize = kTile * kStep;
  static constexpr int64_t kFew = 4;     // query rows
  static constexpr int64_t kAtOnce = 4;  // tiles

  alignas(64) bf16 values[kMaxDim * kChunk];  // [steps of keys][even, odd of 32 dimensions] tiles of [16 pairs of keys, 16, 2]
  alignas(64) bf16 q[kMaxDim * kTile];        // [steps of dimensions] tiles of [16 pairs of dimensions, cols, 2]
  alignas(64) float p[kTile][kChunk];         // scores, then their exponentials
  alignas(64) bf16 high[kTile][kChunk], low[kTile][kChunk];  // the same: p = high + low
  int64_t cols = 0;  // query rows that tiles of q have room for
  Tiles tiles;

  // Floats that a row of sums takes.
  static int64_t sums_size(int64_t d) { return (d + kStep - 1) / kStep * kStep; }

  // query(i) is row i.
  template <class Query>
  void pack_queries(int64_t count, int64_t d, const Query& query) {
    cols = count == 1 ? 1 : count <= kFew ? kFew : kTile;
    for (int64_t c = 0; c < d; c += kStep) {
      vf pairs[kTile];  // of each row; then each pair of all rows
      for (int64_t i = 0; i < kTile; ++i)
        pairs[i] = i < count ? _mm512_castsi512_ps(load_some(query(i) + c, d - c)) : zero();
      transpose(pairs);
      float* to = reinterpret_cast<float*>(q + c * cols);
      for (const vf& pair : pairs) store(to, pair, cols), to += cols;
    }
  }

  // p = q k^T, of the tiles of keys that hold [begin, end). What rows in front of `begin` hold is multiplied, too.
  void score(const bf16* k, int64_t stride, int64_t d, int64_t begin, int64_t end) {
    Tiles::keep(this);
    int64_t first = begin / kTile * kTile;
    for (; first + kAtOnce * kTile <= end; first += kAtOnce * kTile)
      score_tiles<kAtOnce>(k + first * stride, stride, d, first, kTile);
    for (; first < end; first += kTile)
      score_tiles<1>(k + first * stride, stride, d, first, end - first < kTile ? end - first : kTile);
  }

  // Values of the keys [begin, end) for which seen(key) holds; zeros for the others of their steps.
  template <class Seen>
  void pack_values(const bf16* v, int64_t stride, int64_t d, int64_t begin, int64_t end, const Seen& seen) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    for (int64_t first = begin / kStep * kStep; first < end; first += kStep)
      for (int64_t i = 0; i < kStep; i += 2) {
        const auto row = [&](int64_t key) { return key >= begin && key < end && seen(key) ? v + key * stride : nullptr; };
        const bf16 *one = row(first + i), *two = row(first + i + 1);
        bf16* to = values + first * sums_size(d) + i * kTile;
        for (int64_t c = 0; c < d; c += kStep, to += 2 * kTileSize) {
          const __m512i a = one ? load_some(one + c, d - c) : _mm512_setzero_si512();
          const __m512i b = two ? load_some(two + c, d - c) : _mm512_setzero_si512();
          _mm512_store_si512(to, _mm512_or_si512(_mm512_andnot_si512(upper, a), _mm512_slli_epi32(b, 16)));
          _mm512_store_si512(to + kTileSize, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(upper, b)));
        }
      }
  }

  // Row `row` of p as it is in [begin, end), and 0 elsewhere in the steps of [all_begin, all_end).
  void split(int64_t row, int64_t begin, int64_t end, int64_t all_begin, int64_t all_end) {
    for (int64_t j = all_begin / kStep * kStep; j < (all_end + kStep - 1) / kStep * kStep; j += kWidth) {
      // softmax() has made whole vectors of the row's.
      const vf v = j + kWidth > begin && j < end ? load(p[row] + j) : zero();
      store(high[row] + j, v);
      store(low[row] + j, sub(v, load(high[row] + j)));
    }
  }

  // sums[i * stride + c] = sum of p[first + i] v, over the steps of keys that hold [begin, end), of `count` rows.
  void weigh(int64_t first, int64_t count, int64_t d, int64_t begin, int64_t end, float* sums, int64_t stride) {
    const int64_t size = sums_size(d), bytes = stride * int64_t(sizeof(float));
    tiles.shape(count, kTile, 0);
    Tiles::keep(this);
    int64_t c = 0;
    for (; c + 2 * kStep <= size; c += 2 * kStep) weigh_dimensions<2>(first, c, size, begin, end, sums, bytes);
    if (c < size) weigh_dimensions<1>(first, c, size, begin, end, sums, bytes);
    Tiles::keep(sums);
  }

 private:
  LK_MEMBER __m512i load_some(const bf16* p, int64_t n) { return n < kStep ? load_raw(p, n) : load_raw(p); }

  // kTiles tiles of keys, the first one's row 0 at k; the last has `keys`.
  template <int kTiles>
  void score_tiles(const bf16* k, int64_t stride, int64_t d, int64_t first, int64_t keys) {
    const int64_t whole = d / kStep * kStep;
    tiles.shape(keys, cols, 0);
    _tile_zero(0);
    if constexpr (kTiles > 1) {
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t c = 0; c < whole; c += kStep) multiply_keys<kTiles>(q + c * cols, k + c, stride);
    if (whole < d) {
      alignas(64) bf16 last[kTiles * kTile][kStep] = {};
      for (int64_t j = 0; j < (kTiles - 1) * kTile + keys; ++j)
        memcpy(last[j], k + j * stride + whole, size_t(d - whole) * sizeof(bf16));
      Tiles::keep(last);
      multiply_keys<kTiles>(q + whole * cols, last[0], kStep);
    }
    alignas(64) float sums[kTiles][kTile * kTile];
    const auto at = [&](int i) { return cols == 1 ? p[0] + first + i * kTile : sums[i]; };
    _tile_stored(0, at(0), 4 * cols);
    if constexpr (kTiles > 1) {
      _tile_stored(1, at(1), 4 * cols);
      _tile_stored(2, at(2), 4 * cols);
      _tile_stored(3, at(3), 4 * cols);
    }
    Tiles::keep(at(0));
    for (int i = 0; i < kTiles && cols > 1; ++i) {
      if (cols == kFew) write_few(sums[i], first + i * kTile);
      else write_transposed(sums[i], kTile, cols, p[0] + first + i * kTile, kChunk);
    }
  }

  template <int kTiles>
  __attribute__((always_inline)) void multiply_keys(const bf16* x, const bf16* k, int64_t stride) {
    _tile_loadd(6, x, 4 * cols);
    _tile_loadd(4, k, 2 * stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTiles > 1) {
      _tile_loadd(5, k + kTile * stride, 2 * stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, k + 2 * kTile * stride, 2 * stride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, k + 3 * kTile * stride, 2 * stride);
      _tile_dpbf16ps(3, 5, 6);
    }
  }

  // Dimensions from c on, 32 or 64.
  template <int kSteps>
  void weigh_dimensions(int64_t first, int64_t c, int64_t size, int64_t begin, int64_t end, float* sums, int64_t bytes) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kSteps > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t j = begin / kStep * kStep; j < end; j += kStep) {
      const bf16* v = values + j * size + c * kStep;
      for (int part = 0; part < 2; ++part) {
        _tile_loadd(4, (part ? low : high)[first] + j, sizeof(high[0]));
        _tile_loadd(6, v, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, v + kTileSize, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kSteps > 1) {
          _tile_loadd(6, v + 2 * kTileSize, 64);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(7, v + 3 * kTileSize, 64);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
    }
    _tile_stored(0, sums + c, bytes);
    _tile_stored(1, sums + c + kTile, bytes);
    if constexpr (kSteps > 1) {
      _tile_stored(2, sums + c + 2 * kTile, bytes);
      _tile_stored(3, sums + c + 3 * kTile, bytes);
    }
  }

  // write_transposed() for kFew columns.
  void write_few(const float* sums, int64_t first) {
    alignas(64) static constexpr int32_t kEveryFourth[kTile] = {0, 4, 8, 12, 16, 20, 24, 28};
    const vf a = load(sums), b = load(sums + 16), c = load(sums + 32), e = load(sums + 48);
    for (int i = 0; i < kFew; ++i) {
      const __m512i index = _mm512_add_epi32(_mm512_load_si512(kEveryFourth), _mm512_set1_epi32(i));
      const vf low_half = _mm512_permutex2var_ps(a, index, b), high_half = _mm512_permutex2var_ps(c, index, e);
      store(p[i] + first, _mm512_shuffle_f32x4(low_half, high_half, 0x44));
    }
  }
};

// 32 dimensions of a row, or its last n, from the even and the odd ones.
LK_INLINE void store_even_odd(bf16* out, vf even, vf odd, int64_t n) {
  const auto wide = [](vf x) { return _mm512_cvtepu16_epi32(narrow(x, bf16())); };
  const __m512i all = _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16));
  alignas(64) bf16 row[AttentionTiles::kStep];
  _mm512_store_si512(row, all);
  memcpy(out, row, size_t(n < AttentionTiles::kStep ? n : AttentionTiles::kStep) * sizeof(bf16));
}

}  // namespace lk::LK_VARIANT
