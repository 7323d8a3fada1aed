// Products of bfloat16 weights by AMX, in tiles of 16 weight rows as they are stored times up to 16 packed x rows: what up to
// 16 x rows cost is what one costs. Included by panel.h.
//
// A tile has 16 rows of 64 bytes. TDPBF16PS takes 32 columns of the weights at a time; x it takes as pairs of columns, each
// pair of all its rows in a line (Intel's manual, volume 2, TDPBF16PS: the even and the odd products of a step are summed
// apart, then added to the sum). The order of an output's sums follows from its columns alone.
#pragma once

#include "cpu/amx_tiles.h"

namespace lk::LK_VARIANT {

template <>
struct DenseRows<bf16> {
  static constexpr int64_t kTileRows = 64;  // weight rows of four tiles
  static constexpr int64_t kMostRows = 256;  // per pass over the weights
  static constexpr int64_t kStep = 32;  // columns of a product

  bf16* data;  // [groups of 16 rows][pairs of columns][rows of the group][2]; the last group may have fewer
  int64_t padded, m, c;

  DenseRows(int64_t rows, int64_t columns, Workspace use = Workspace::linear_x)
      : padded((columns + kStep - 1) / kStep * kStep), m(rows), c(columns) {
    const int64_t groups = (rows + kTile - 1) / kTile;
    data = static_cast<bf16*>(workspace(use, size_t(groups * kTile * padded) * sizeof(bf16)));
  }

  // As many as half of the second-level cache holds.
  static int64_t most_rows(int64_t c) {
    const int64_t rows = (1 << 20) / (int64_t(sizeof(bf16)) * (c + 1)) / (2 * kTile) * (2 * kTile);
    return rows < 2 * kTile ? 2 * kTile : rows < kMostRows ? rows : kMostRows;
  }
  int64_t packed_together() const { return kTile; }
  int64_t cols(int64_t group) const { return m - group * kTile < kTile ? m - group * kTile : kTile; }
  const bf16* group_at(int64_t group) const { return data + group * kTile * padded; }

  // See the other DenseRows.
  void pack(int64_t row, int64_t count, const bf16* x, int64_t stride) {
    bf16* to = data + row * padded;
    if (count == 1) {
      memcpy(to, x, size_t(c) * sizeof(bf16));
      memset(to + c, 0, size_t(padded - c) * sizeof(bf16));
      return;
    }
    for (int64_t k = 0; k < padded; k += kStep) {
      vf pairs[kTile];  // of each row; then each pair of all rows
      for (int64_t i = 0; i < kTile; ++i) {
        const bf16* from = x + i * stride + k;
        pairs[i] = i >= count ? zero() : _mm512_castsi512_ps(c - k < kStep ? load_raw(from, c - k) : load_raw(from));
      }
      transpose(pairs);
      for (const vf& pair : pairs) store(reinterpret_cast<float*>(to), pair, count), to += 2 * count;
    }
  }

  // Dot products of every x row and the weight rows [begin, end). Rows up to w.n are likely to be this thread's next.
  void panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const {
    const int64_t pairs = m / kTile / 2 + (m % (2 * kTile) > kTile ? 1 : 0);
    Tiles tiles;
    Tiles::keep(data);
    const auto rows = [&](int64_t n) { return end - n < kTile ? end - n : kTile; };
    const auto totals_of = [&](int64_t group, int64_t n) {
      return Totals{out.data + group * kTile * out.stride + n - begin, out.stride};
    };
    if (pairs > 0) {
      // The processor by itself fetches the rows at hand, and none while these are multiplied with more x rows.
      const int64_t share = pairs > 1 ? 2 * kTile / pairs : 0;
      int64_t n = begin;
      for (; n + 2 * kTile <= end; n += 2 * kTile)
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const int64_t next = n + 2 * kTile + pair * share;
          const Fetch fetch{next, next + share <= w.n ? share : 0};
          block<2, 2>(tiles, w, n, kTile, 2 * pair, fetch, totals_of(2 * pair, n));
        }
      for (; n < end; n += kTile)
        for (int64_t pair = 0; pair < pairs; ++pair)
          block<1, 2>(tiles, w, n, rows(n), 2 * pair, Fetch{}, totals_of(2 * pair, n));
    }
    const int64_t last = 2 * pairs;
    if (last * kTile < m) {
      int64_t n = begin;
      for (; n + 4 * kTile <= end; n += 4 * kTile) block<4, 1>(tiles, w, n, kTile, last, Fetch{}, totals_of(last, n));
      for (; n + 2 * kTile <= end; n += 2 * kTile) block<2, 1>(tiles, w, n, kTile, last, Fetch{}, totals_of(last, n));
      for (; n < end; n += kTile) block<1, 1>(tiles, w, n, rows(n), last, Fetch{}, totals_of(last, n));
    }
  }

 private:
  // Weight rows to be fetched into the second-level cache meanwhile.
  struct Fetch {
    int64_t row = 0, count = 0;
  };

  // kW tiles of weight rows from n on, times kX groups of x rows from `group` on. The last tile of weights has `rows`.
  template <int kW, int kX>
  void block(Tiles& tiles, const Matrix& weight, int64_t n, int64_t rows, int64_t group, Fetch fetch, Totals out) const {
    const int64_t first = cols(group), second = kX > 1 ? cols(group + 1) : 0, stride = weight.stride;
    const bf16* w = static_cast<const bf16*>(weight.data) + n * stride;
    tiles.shape(rows, first, second);
    _tile_zero(0);
    if constexpr (kW * kX > 1) _tile_zero(1);
    if constexpr (kW * kX > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    if constexpr (kX == 1) {
      // One after the other: more rows at a time, pages apart, wait for their translations.
      sum_tile<0>(w, stride, rows, group);
      if constexpr (kW > 1) sum_tile<1>(w + kTile * stride, stride, rows, group);
      if constexpr (kW > 2) {
        sum_tile<2>(w + 2 * kTile * stride, stride, rows, group);
        sum_tile<3>(w + 3 * kTile * stride, stride, rows, group);
      }
    } else {
      sum_pair<kW>(w, stride, rows, group, w + (fetch.row - n) * stride, fetch.count);
    }
    alignas(64) float sums[4][kTile * kTile];
    float* alone = out.data;  // where totals of one x row lie side by side, as its sums do
    const bool direct = kX == 1 && first == 1;
    const auto at = [&](int i) { return direct ? alone + i * kTile : sums[i]; };
    const int64_t size = 4 * first, second_size = kX > 1 ? 4 * second : size;  // bytes of a row of sums
    _tile_stored(0, at(0), size);
    if constexpr (kW * kX > 1) _tile_stored(1, at(1), second_size);
    if constexpr (kW * kX > 2) {
      _tile_stored(2, at(2), size);
      _tile_stored(3, at(3), second_size);
    }
    Tiles::keep(at(0));
    if (direct) return;
    for (int i = 0; i < kW * kX; ++i) {
      const int64_t tile = i / kX, x_row = i % kX * kTile;
      write_transposed(sums[i], tile < kW - 1 ? kTile : rows, i % kX ? second : first,
                       out.data + x_row * out.stride + tile * kTile, out.stride);
    }
  }

  // Sums kSum += a tile of weight rows times a group.
  template <int kSum>
  void sum_tile(const bf16* w, int64_t stride, int64_t rows, int64_t group) const {
    const int64_t width = cols(group);
    const bf16* x = group_at(group);
    int64_t k = 0;
#pragma GCC unroll 1
    for (; k + kStep <= c; k += kStep, x += kStep * width) add_step<kSum>(w + k, 2 * stride, x, 4 * width);
    if (k == c) return;
    alignas(64) bf16 last[kTile][kStep] = {};
    for (int64_t j = 0; j < rows; ++j) memcpy(last[j], w + j * stride + k, size_t(c - k) * sizeof(bf16));
    Tiles::keep(last);
    add_step<kSum>(last[0], 2 * kStep, x, 4 * width);
  }
  template <int kSum>
  LK_MEMBER void add_step(const bf16* w, int64_t w_bytes, const bf16* x, int64_t x_bytes) {
    if constexpr (kSum % 2 == 0) {
      _tile_loadd(6, x, x_bytes);
      _tile_loadd(4, w, w_bytes);
    } else {
      _tile_loadd(7, x, x_bytes);
      _tile_loadd(5, w, w_bytes);
    }
    if constexpr (kSum == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSum == 1) _tile_dpbf16ps(1, 5, 7);
    if constexpr (kSum == 2) _tile_dpbf16ps(2, 4, 6);
    if constexpr (kSum == 3) _tile_dpbf16ps(3, 5, 7);
  }

  // Sums 0 to 3 += kW tiles of weight rows, the last of `rows`, times two groups, while `count` rows at `ahead` are fetched.
  template <int kW>
  void sum_pair(const bf16* w, int64_t stride, int64_t rows, int64_t group, const bf16* ahead, int64_t count) const {
    const int64_t first = cols(group), second = cols(group + 1);
    const bf16 *x = group_at(group), *y = group_at(group + 1);
    int64_t k = 0;
#pragma GCC unroll 1
    for (; k + kStep <= c; k += kStep, x += kStep * first, y += kStep * second) {
      for (int64_t i = 0; i < count; ++i) prefetch_l2(ahead + i * stride + k);
      add_pair_step<kW>(w + k, 2 * stride, x, 4 * first, y, 4 * second);
    }
    if (k == c) return;
    alignas(64) bf16 last[kW * kTile][kStep] = {};
    for (int64_t j = 0; j < (kW - 1) * kTile + rows; ++j)
      memcpy(last[j], w + j * stride + k, size_t(c - k) * sizeof(bf16));
    Tiles::keep(last);
    add_pair_step<kW>(last[0], 2 * kStep, x, 4 * first, y, 4 * second);
  }
  template <int kW>
  LK_MEMBER void add_pair_step(const bf16* w, int64_t w_bytes, const bf16* x, int64_t x_bytes, const bf16* y,
                               int64_t y_bytes) {
    _tile_loadd(6, x, x_bytes);
    _tile_loadd(4, w, w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, y, y_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kW == 2) {
      _tile_loadd(5, reinterpret_cast<const char*>(w) + kTile * w_bytes, w_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

}  // namespace lk::LK_VARIANT
