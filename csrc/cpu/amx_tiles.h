// The tile registers of AMX, and what goes with them.
#pragma once

#include <immintrin.h>

#include "cpu/dot.h"

namespace lk::LK_VARIANT {

constexpr int64_t kTile = 16;  // rows of a tile; a row has 64 bytes

// The shapes of the tile registers: sums in 0 to 3, weights in 4 and 5, x in 6 and 7. They stay as they are when an op ends,
// since the next one often wants the same, and asking is ten times as fast as shaping; the system empties tiles before a
// processor sleeps.
class Tiles {
 public:
  // From here on tiles have `rows` weight rows, and x rows: first of those in sums 0 and 2 and x 6, then in 1, 3 and 7. With
  // second == 0 all have `first`.
  void shape(int64_t rows, int64_t first, int64_t second) {
    if (rows == rows_ && first == first_ && second == second_) return;
    rows_ = rows, first_ = first, second_ = second;
    Config wanted, loaded;
    for (int i = 0; i < 8; ++i) {
      const int64_t cols = i % 2 && second ? second : first;
      wanted.rows[i] = uint8_t(i < 6 ? rows : 16);
      wanted.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * cols);
    }
    keep(&wanted);
    _tile_storeconfig(&loaded);
    keep(&loaded);
    if (_mm512_cmpneq_epi32_mask(_mm512_load_si512(&wanted), _mm512_load_si512(&loaded))) _tile_loadconfig(&wanted);
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

// A tile of sums [rows, cols] side by side -> out[i * stride + j] = sums[j * cols + i].
[[maybe_unused]] static void write_transposed(const float* sums, int64_t rows, int64_t cols, float* out, int64_t stride) {
  vf v[kTile];
  for (int64_t j = 0; j < kTile; ++j) v[j] = j < rows ? load(sums + j * cols, cols) : zero();
  transpose(v);
  for (int64_t i = 0; i < cols; ++i) store(out + i * stride, v[i], rows);
}

}  // namespace lk::LK_VARIANT
