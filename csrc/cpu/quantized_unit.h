// The units that the columns of a quantized weight are stored in: see cpu/quantization.h.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace lk::LK_VARIANT {

constexpr int64_t kBlock = 64;  // columns that share a scale of x; a group of a weight has one or more of them
constexpr int kLanes = 16;      // of a unit, and its most blocks

// Blocks [first, first + blocks) of a row.
struct Unit {
  int64_t first, blocks;
};

// The unit that starts at block `first` of a row of `whole` whole blocks. What is left after these counts as one of one.
LK_INLINE Unit unit_from(int64_t first, int64_t whole) {
  int64_t blocks = kLanes;
  while (blocks > 1 && blocks > whole - first) blocks /= 2;
  return {first, blocks};
}

// The unit that `block` belongs to.
LK_INLINE Unit unit_of(int64_t block, int64_t whole) {
  Unit unit = unit_from(block / kLanes * kLanes, whole);
  while (unit.first + unit.blocks <= block) unit = unit_from(unit.first + unit.blocks, whole);
  return unit;
}

}  // namespace lk::LK_VARIANT
