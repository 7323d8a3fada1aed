// How x becomes integers with a scale for each block, and where they go: see quantized_panel.h.
#include "cpu/quantized_dot.h"
#include "cpu/quantized_panel.h"
#if defined(LK_VARIANT_AVX512_AMX)
#include "cpu/quantized_tiles.h"
#endif
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

constexpr float kSmallest = 0x1p-100f;

// The largest magnitude of the first `count` elements, at most a block's. NaN and infinity make a NaN of *none, as max() may
// lose them.
template <class T>
LK_INLINE float largest_of(const T* x, int64_t count, vf* none) {
  vf largest = zero(), nothing = zero();
  for (int64_t i = 0; i < kBlock; i += kWidth) {
    const vf v = count - i >= kWidth ? load(x + i) : count > i ? load(x + i, count - i) : zero();
    largest = max(largest, max(v, sub(zero(), v)));
    nothing = fma(v, zero(), nothing);
  }
  *none = add(*none, nothing);
  return max_of(largest);
}

// Those elements as integers, zeros behind them; returns their scale, the power of two that brings the largest to 2^14 and
// above: small whole numbers and bfloat16 stay exact.
template <class T>
LK_INLINE float integers_of(const T* x, int64_t count, float largest, int32_t* q) {
  const bool counts = largest >= kSmallest;
  const uint32_t exponent = float_bits(largest) & 0x7f800000;
  const vf inverse = set1(counts ? float_from_bits((uint32_t(2 * 127 + 14) << 23) - exponent) : 0);
  for (int64_t i = 0; i < kBlock; i += kWidth) {
    const vf v = count - i >= kWidth ? load(x + i) : count > i ? load(x + i, count - i) : zero();
    const Ints integers = __builtin_convertvector(min(round_int(mul(v, inverse)), set1(32767)), Ints);
    memcpy(q + i, &integers, sizeof(integers));
  }
  return counts ? float_from_bits(exponent - (uint32_t(14) << 23)) : 0;
}

// A unit's integers to where it has them, and the sums of its lanes. By way of a copy without gaps: steps of many rows are
// far apart, in few sets of the first-level cache.
LK_INLINE void place_unit(const int32_t* q, int64_t blocks, int16_t* words, int64_t x_step, int32_t* sums) {
  alignas(64) int16_t steps[kLanes][kBlock];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t step = 0; step < blocks; ++step, q += 4) place(q, lane, steps[step]);
  }
  for (int64_t step = 0; step < blocks; ++step) memcpy(words + step * x_step, steps[step], sizeof(steps[step]));
  for (int half = 0; half < kHalves; ++half) {
    Sums all = start(Ints{});
    for (int64_t step = 0; step < blocks; ++step) all = add_x(all, steps[step] + half * kWords);
    const Ints lanes = total(all);
    memcpy(sums + half * kWidth, &lanes, sizeof(lanes));
  }
}

template <class T>
void pack_row(const QuantizedRows& rows, int64_t row, const T* x) {
  PackedLanes* packed = rows.lanes_of(rows.tiled(), row);
  float* first_scale = packed->scales;
  vf none = zero();
  for (int64_t first = 0; first < rows.blocks();) {
    const Unit unit = unit_from(first, rows.whole());
    const T* from = x + first * kBlock;
    const int64_t count = rows.c - first * kBlock;
    // One loop after the other, so that none waits for the results of the one before.
    float largest[kLanes], scales[kLanes];
    alignas(64) int32_t q[kLanes * kBlock];
    for (int64_t i = 0; i < unit.blocks; ++i) largest[i] = largest_of(from + i * kBlock, count - i * kBlock, &none);
    for (int64_t i = 0; i < unit.blocks; ++i)
      scales[i] = integers_of(from + i * kBlock, count - i * kBlock, largest[i], q + i * kBlock);
    if (first < rows.tiled() * kLanes) {
#if defined(LK_VARIANT_AVX512_AMX)
      const TiledUnit tiled(rows, first / kLanes);
      tiled.place(row, q, scales);
      if (first == 0) first_scale = tiled.scales + row;
#endif
    } else {
      place_unit(q, unit.blocks, rows.words_of(first, row), rows.m * kBlock, packed->sums);
      for (int64_t lane = 0; lane < kLanes; ++lane) packed->scales[lane] = scales[lane * unit.blocks / kLanes];
      packed += rows.m;
    }
    first += unit.blocks;
  }
  const float nothing = sum(none);
  if (nothing != 0) *first_scale = nothing;
}

}  // namespace

QuantizedRows::QuantizedRows(int64_t rows, int64_t columns, Workspace use) : m(rows), c(columns) {
  const int64_t bytes = blocks() * kBlock * int64_t(sizeof(int16_t)) + units() * int64_t(sizeof(PackedLanes));
  data = static_cast<char*>(workspace(use, size_t((rows + (tiled() ? kLanes : 0)) * bytes)));
}

template <class T>
void QuantizedRows::pack(int64_t row, int64_t count, const T* x, int64_t x_stride) {
  for (int64_t i = 0; i < count; ++i) pack_row(*this, row + i, x + i * x_stride);
#if defined(LK_VARIANT_AVX512_AMX)
  if (row + count == m)
    for (int64_t unit = 0; unit < tiled(); ++unit) TiledUnit(*this, unit).fill_up(m);
#endif
}
template void QuantizedRows::pack(int64_t, int64_t, const float*, int64_t);
template void QuantizedRows::pack(int64_t, int64_t, const f16*, int64_t);
template void QuantizedRows::pack(int64_t, int64_t, const bf16*, int64_t);

}  // namespace lk::LK_VARIANT
