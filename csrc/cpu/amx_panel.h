// Products of bfloat16 weights by AMX, in tiles of 16 weight rows as they are stored times up to 16 packed x rows: what up to
// 16 x rows cost is what one costs. Included by panel.h.
//
// A tile has 16 rows of 64 bytes. TDPBF16PS takes 32 columns of the weights at a time; x it takes as pairs of columns, each
// pair of all its rows in a line (Intel's manual, volume 2, TDPBF16PS: the even and the odd products of a step are summed
// apart, then added to the sum). The order of an output's sums follows from its columns alone.
#pragma once

#include <immintrin.h>

namespace lk::LK_VARIANT {

// The shapes of the tile registers: sums in 0 to 3, weights in 4 and 5, x in 6 and 7. A register that is not in use has no
// rows.
class Tiles {
 public:
  // From here on tiles have `rows` weight rows, and x rows: first of those in sums 0 and 2 and x 6, then in 1, 3 and 7. With
  // second == 0 all have `first`.
  void shape(int64_t rows, int64_t first, int64_t second) {
    if (rows == rows_ && first == first_ && second == second_) return;
    rows_ = rows, first_ = first, second_ = second;
    Config config;
    for (int i = 0; i < 8; ++i) {
      const int64_t cols = i % 2 && second ? second : first;
      config.rows[i] = uint8_t(i < 6 ? rows : 16);
      config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * cols);
    }
    keep(&config);
    _tile_loadconfig(&config);
  }

  // To the compiler the instructions read and write no memory: what was stored at `data` is now, and is read again.
  LK_MEMBER void keep(const void* data) { asm volatile("" : : "r"(data) : "memory"); }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  int64_t rows_ = 0, first_ = 0, second_ = 0;
};

// v[i][j] and v[j][i] change places.
LK_INLINE void transpose(vf (&v)[16]) {
  alignas(64) static constexpr struct Index {
    int32_t low[4][16] = {}, high[4][16] = {};
    constexpr Index() {
      for (int stage = 0; stage < 4; ++stage)
        for (int j = 0; j < 16; ++j) {
          const int half = 8 >> stage;
          low[stage][j] = j & half ? 16 + j - half : j;
          high[stage][j] = j & half ? 16 + j : j + half;
        }
    }
  } kIndex;
  LK_UNROLL for (int stage = 0; stage < 4; ++stage) {
    const int half = 8 >> stage;
    const __m512i low = _mm512_load_si512(kIndex.low[stage]), high = _mm512_load_si512(kIndex.high[stage]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & half) continue;
      const vf a = v[i], b = v[i + half];
      v[i] = _mm512_permutex2var_ps(a, low, b);
      v[i + half] = _mm512_permutex2var_ps(a, high, b);
    }
  }
}

template <>
struct DenseRows<bf16> {
  static constexpr int64_t kTileRows = 64;  // weight rows of four tiles
  static constexpr int64_t kMostRows = 256;
  static constexpr int64_t kPackedTogether = 16;
  static constexpr int64_t kTile = 16;   // rows
  static constexpr int64_t kStep = 32;   // columns

  bf16* data;  // [groups of 16 rows][pairs of columns][rows of the group][2]; the last group may have fewer
  int64_t padded, m, c;

  DenseRows(int64_t rows, int64_t columns, Workspace use = Workspace::linear_x)
      : padded((columns + kStep - 1) / kStep * kStep), m(rows), c(columns) {
    const int64_t groups = (rows + kTile - 1) / kTile;
    data = static_cast<bf16*>(workspace(use, size_t(groups * kTile * padded) * sizeof(bf16)));
  }

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

  // Dot products of every x row and the weight rows [begin, end).
  void panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const {
    const bf16* rows = static_cast<const bf16*>(w.data) + begin * w.stride;
    const int64_t count = end - begin;
    Tiles tiles;
    Tiles::keep(data);
    for (int64_t m0 = 0; m0 < m; m0 += 2 * kTile, out.data += 2 * kTile * out.stride) {
      const int64_t group = m0 / kTile;
      const bool two = m - m0 > kTile;
      int64_t n = 0;
      if (two) {
        for (; n + 32 <= count; n += 32) block<2, 2>(tiles, rows + n * w.stride, w.stride, kTile, group, at(out, n));
      } else {
        for (; n + 64 <= count; n += 64) block<4, 1>(tiles, rows + n * w.stride, w.stride, kTile, group, at(out, n));
        if (n + 32 <= count) block<2, 1>(tiles, rows + n * w.stride, w.stride, kTile, group, at(out, n)), n += 32;
      }
      for (; n < count; n += kTile) {
        const int64_t left = count - n < kTile ? count - n : kTile;
        if (two) block<1, 2>(tiles, rows + n * w.stride, w.stride, left, group, at(out, n));
        else block<1, 1>(tiles, rows + n * w.stride, w.stride, left, group, at(out, n));
      }
    }
    _tile_release();  // what is not in use needs not be saved when threads take turns
  }

 private:
  static Totals at(Totals out, int64_t n) { return {out.data + n, out.stride}; }

  // kW tiles of weight rows from w on, times kX groups of x rows from `group` on. The last tile of weights has `rows`.
  template <int kW, int kX>
  void block(Tiles& tiles, const bf16* w, int64_t stride, int64_t rows, int64_t group, Totals out) const {
    const int64_t first = cols(group), second = kX > 1 ? cols(group + 1) : 0;
    tiles.shape(rows, first, second);
    _tile_zero(0);
    if constexpr (kW * kX > 1) _tile_zero(1);
    if constexpr (kW * kX > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const bf16 *x = group_at(group), *y = group_at(group + 1);
    int64_t k = 0;
#pragma GCC unroll 1
    for (; k + kStep <= c; k += kStep, x += kStep * first, y += kStep * second)
      step<kW, kX>(w + k, 2 * stride, x, 4 * first, y, 4 * second);
    if (k < c) {
      alignas(64) bf16 last[kW * kTile][kStep] = {};
      for (int64_t j = 0; j < (kW - 1) * kTile + rows; ++j)
        memcpy(last[j], w + j * stride + k, size_t(c - k) * sizeof(bf16));
      Tiles::keep(last);
      step<kW, kX>(last[0], 2 * kStep, x, 4 * first, y, 4 * second);
    }
    if constexpr (kX == 1) {
      alignas(64) float sums[kW * kTile * kTile];
      const int64_t size = 4 * first;  // bytes of a row of sums
      float* to = first == 1 ? out.data : sums;
      _tile_stored(0, to, size);
      if constexpr (kW > 1) _tile_stored(1, to + kTile * first, size);
      if constexpr (kW > 2) {
        _tile_stored(2, to + 2 * kTile * first, size);
        _tile_stored(3, to + 3 * kTile * first, size);
      }
      Tiles::keep(to);
      if (first > 1)
        for (int i = 0; i < kW; ++i) write(sums + i * kTile * first, first, i < kW - 1 ? kTile : rows, at(out, i * kTile));
    } else {
      alignas(64) float sums[kW][2][kTile * kTile];
      _tile_stored(0, sums[0][0], 4 * first);
      _tile_stored(1, sums[0][1], 4 * second);
      if constexpr (kW > 1) {
        _tile_stored(2, sums[1][0], 4 * first);
        _tile_stored(3, sums[1][1], 4 * second);
      }
      Tiles::keep(sums);
      for (int i = 0; i < kW; ++i) {
        const int64_t some = i < kW - 1 ? kTile : rows;
        write(sums[i][0], first, some, at(out, i * kTile));
        write(sums[i][1], second, some, at({out.data + kTile * out.stride, out.stride}, i * kTile));
      }
    }
  }

  // One step of columns.
  template <int kW, int kX>
  LK_MEMBER void step(const bf16* w, int64_t w_bytes, const bf16* x, int64_t x_bytes, const bf16* y,
                             int64_t y_bytes) {
    const auto rows_at = [&](int tile) { return reinterpret_cast<const char*>(w) + tile * kTile * w_bytes; };
    _tile_loadd(6, x, x_bytes);
    _tile_loadd(4, rows_at(0), w_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kX == 2) {
      _tile_loadd(7, y, y_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kW == 2) {
        _tile_loadd(5, rows_at(1), w_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      if constexpr (kW > 1) {
        _tile_loadd(5, rows_at(1), w_bytes);
        _tile_dpbf16ps(1, 5, 6);
      }
      if constexpr (kW > 2) {
        _tile_loadd(4, rows_at(2), w_bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, rows_at(3), w_bytes);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }

  // sums [rows][cols] -> totals: those of x row i at out.data[i * stride].
  static void write(const float* sums, int64_t cols, int64_t rows, Totals out) {
    vf v[16];
    for (int64_t j = 0; j < 16; ++j) v[j] = j < rows ? load(sums + j * cols, cols) : zero();
    transpose(v);
    for (int64_t i = 0; i < cols; ++i) store(out.data + i * out.stride, v[i], rows);
  }
};

}  // namespace lk::LK_VARIANT
