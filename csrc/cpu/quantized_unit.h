// The units that the columns of a quantized weight are stored in: see cpu/quantization.h.
#pragma once

#include <cstdint>

namespace lk {

// Blocks [first, first + blocks) of a row.
struct Unit {
  int64_t first, blocks;
};

// The unit that starts at block `first` of a row of `whole` whole blocks. What is left after these counts as one of one.
inline Unit unit_from(int64_t first, int64_t whole) {
  int64_t blocks = 16;
  while (blocks > 1 && blocks > whole - first) blocks /= 2;
  return {first, blocks};
}

// The unit that `block` belongs to.
inline Unit unit_of(int64_t block, int64_t whole) {
  Unit unit = unit_from(block / 16 * 16, whole);
  while (unit.first + unit.blocks <= block) unit = unit_from(unit.first + unit.blocks, whole);
  return unit;
}

// Where in its unit four columns are stored, the i-th four of `block`.
struct Place {
  int64_t step, lane;
};
inline Place place_of(const Unit& unit, int64_t block, int64_t i) {
  const int64_t lanes = 16 / unit.blocks;  // of a block
  return {i % unit.blocks, (block - unit.first) * lanes + i / unit.blocks};
}

}  // namespace lk
