// AMX for machines without it, after the pseudocode of Intel's manual: the eight tile registers of a thread, and the
// instructions the kernels use. Included by immintrin.h. What the processor would refuse stops the program.
#pragma once

namespace emulated {
struct Tile {
  int rows, bytes;  // none until configured
  unsigned char data[16][64];
};
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
}  // namespace emulated

// One for all files, as there is one in the processor; no other variant has tiles.
namespace lk::avx512_amx {
inline thread_local emulated::Tile emulated_tiles[8];
inline thread_local emulated::TileConfig emulated_config;
}

namespace emulated {

using lk::avx512_amx::emulated_tiles;

static_assert(sizeof(TileConfig) == 64, "what LDTILECFG reads");
static inline void configure_tiles(const void* p) {
  TileConfig& config = lk::avx512_amx::emulated_config;
  memcpy(&config, p, sizeof(config));
  if (config.palette != 1 || config.start_row) abort();
  for (uint8_t byte : config.reserved)
    if (byte) abort();
  for (int i = 0; i < 16; ++i) {
    if (config.rows[i] > (i < 8 ? 16 : 0) || config.row_bytes[i] > (i < 8 ? 64 : 0)) abort();
    if ((config.rows[i] == 0) != (config.row_bytes[i] == 0)) abort();
    if (i >= 8) continue;
    Tile& tile = emulated_tiles[i];
    tile.rows = config.rows[i];
    tile.bytes = config.row_bytes[i];
    memset(tile.data, 0, sizeof(tile.data));
  }
}
static inline void store_config(void* p) { memcpy(p, &lk::avx512_amx::emulated_config, sizeof(TileConfig)); }
static inline Tile& configured(int i) {
  if (emulated_tiles[i].rows == 0) abort();
  return emulated_tiles[i];
}
static inline void zero_tile(int i) { memset(configured(i).data, 0, sizeof(emulated_tiles[i].data)); }
static inline void load_tile(int i, const void* base, int64_t stride) {
  zero_tile(i);
  Tile& tile = emulated_tiles[i];
  for (int row = 0; row < tile.rows; ++row)
    memcpy(tile.data[row], static_cast<const char*>(base) + row * stride, size_t(tile.bytes));
}
static inline void store_tile(int i, void* base, int64_t stride) {
  const Tile& tile = configured(i);
  for (int row = 0; row < tile.rows; ++row)
    memcpy(static_cast<char*>(base) + row * stride, tile.data[row], size_t(tile.bytes));
}
template <class T>
EMULATED T element(const Tile& tile, int row, int i) {
  T value;
  memcpy(&value, tile.data[row] + i * sizeof(T), sizeof(T));
  return value;
}
// sums [m, n], a [m, k], b [k, n], of 32-bit elements.
static inline void check_shapes(const Tile& sums, const Tile& a, const Tile& b) {
  if (a.rows != sums.rows || b.bytes != sums.bytes || b.rows != a.bytes / 4) abort();
}
// The even and the odd products of an output each in a sum of their own.
static inline void multiply_bf16(int sums, int a, int b) {
  Tile &s = configured(sums), &x = configured(a), &y = configured(b);
  check_shapes(s, x, y);
  for (int m = 0; m < s.rows; ++m)
    for (int n = 0; n < s.bytes / 4; ++n) {
      float part[2] = {0, 0};
      for (int k = 0; k < x.bytes / 4; ++k)
        for (int i = 0; i < 2; ++i)
          part[i] = flushed(__builtin_fmaf(bfloat(element<uint16_t>(x, m, 2 * k + i)),
                                           bfloat(element<uint16_t>(y, k, 2 * n + i)), part[i]));
      const float sum = flushed(flushed(element<float>(s, m, n)) + flushed(part[0] + part[1]));
      memcpy(s.data[m] + n * 4, &sum, 4);
    }
}

// Bytes, a signed.
template <class B>
EMULATED void multiply_bytes(int sums, int a, int b) {
  Tile &s = configured(sums), &x = configured(a), &y = configured(b);
  check_shapes(s, x, y);
  for (int m = 0; m < s.rows; ++m)
    for (int n = 0; n < s.bytes / 4; ++n) {
      int32_t sum = element<int32_t>(s, m, n);
      for (int k = 0; k < x.bytes; ++k)
        sum += element<int8_t>(x, m, k) * element<B>(y, k / 4, 4 * n + k % 4);
      memcpy(s.data[m] + n * 4, &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig(p) emulated::configure_tiles(p)
#define _tile_storeconfig(p) emulated::store_config(p)
#define _tile_zero(i) emulated::zero_tile(i)
#define _tile_loadd(i, base, stride) emulated::load_tile(i, base, stride)
#define _tile_stored(i, base, stride) emulated::store_tile(i, base, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply_bf16(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated::multiply_bytes<int8_t>(sums, a, b)
#define _tile_dpbsud(sums, a, b) emulated::multiply_bytes<uint8_t>(sums, a, b)
