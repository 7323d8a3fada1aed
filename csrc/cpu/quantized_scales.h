// Where the lanes of a unit find their scales and offsets.
#pragma once

#include "cpu/quantization.h"
#include "cpu/quantized_dot.h"

namespace lk::LK_VARIANT {

constexpr bool kWholeSteps = kHalves == 1;  // with AVX-512

// A unit of columns, and where its lanes find their scales: lane l of half h at first[h] + lanes[h][l] of a row.
struct Columns {
  Unit unit;
  int64_t count;  // less than a block where they are what is left
  int64_t first[kHalves], scales[kHalves];
  alignas(64) int32_t lanes[kHalves][kWidth];
};

LK_INLINE void columns_of(const Unit& unit, int64_t c, int64_t per_group, int64_t groups, Columns* all) {
  const int64_t left = c - unit.first * kBlock;
  all->unit = unit;
  all->count = left < unit.blocks * kBlock ? left : unit.blocks * kBlock;
  for (int h = 0; h < kHalves; ++h) {
    const auto group = [&](int64_t lane) {
      const int64_t block = unit.first + ((h * kWidth + lane) * unit.blocks >> 4);
      return per_group == 1 ? block : block / per_group;  // divisions take time, and every call does this
    };
    // A whole vector where a row has so many, as this takes less time, too.
    const int64_t first = group(0);
    all->first[h] = groups < kWidth || first + kWidth <= groups ? first : groups - kWidth;
    all->scales[h] = groups < kWidth ? groups - first : kWidth;
    if (per_group == 1) {
      const int32_t skipped = int32_t(first - all->first[h]), blocks = int32_t(unit.blocks);
      for (int32_t l = 0; l < kWidth; ++l) all->lanes[h][l] = skipped + (l * blocks >> 4);
    } else {
      for (int l = 0; l < kWidth; ++l) all->lanes[h][l] = int32_t(group(l) - all->first[h]);
    }
  }
}
static_assert(kLanes == 1 << 4);

LK_INLINE int64_t scale_size(const Quantization& q) { return int64_t(size_of(DType(q.scale_dtype))); }

// The scales (or offsets) from `first` on, those of the lanes of one half.
template <class T>
LK_INLINE vf of_lanes(const T* first, const Columns& columns, int half) {
  const int64_t count = columns.scales[half];
  return permute(kWholeSteps || count < kWidth ? load(first, count) : load(first), columns.lanes[half]);
}

#if defined(LK_VARIANT_AVX512)
// Widened and permuted by one instruction.
LK_INLINE vf of_lanes(const bf16* first, const Columns& columns, int half) {
  const __m512i words = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first_lanes(columns.scales[half]), first));
  const __m512i high = _mm512_slli_epi32(_mm512_loadu_si512(columns.lanes[half]), 16);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, high, words));
}
#endif

// Those of a unit of row n, of the lanes of one half.
LK_INLINE vf scales_of(const Quantization& q, int64_t n, const Columns& columns, int half) {
  const char* scales = static_cast<const char*>(q.scale) + (n * q.scale_stride + columns.first[half]) * scale_size(q);
  return q.scale_dtype == int64_t(DType::bf16) ? of_lanes(reinterpret_cast<const bf16*>(scales), columns, half)
                                               : of_lanes(reinterpret_cast<const float*>(scales), columns, half);
}
LK_INLINE vf offsets_of(const Quantization& q, int64_t n, const Columns& columns, int half) {
  return of_lanes(q.offset + n * q.offset_stride + columns.first[half], columns, half);
}

}  // namespace lk::LK_VARIANT
