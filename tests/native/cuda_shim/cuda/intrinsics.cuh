// Stands in for csrc/cuda/intrinsics.cuh: the same functions on the CPU, matrix fragments as the PTX manual lays them out.
#pragma once

#include <cuda_runtime.h>

#include "common/dtypes.h"

#define LK_DYNAMIC_SHARED(name) unsigned char* const name = shim::dynamic_shared()

namespace lk::cuda {

inline float widen(float value) { return value; }
inline float widen(f16 value) { return to_float(value); }
inline float widen(bf16 value) { return to_float(value); }

template <class T>
T narrow(float value) {
  return from_float<T>(value);
}

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) shim::fail("a 16-byte access is not aligned");
}

inline uint4 load_stream(const void* address) {
  check_aligned(address);
  return *static_cast<const uint4*>(address);
}

inline void store_wide(void* address, uint4 value) {
  check_aligned(address);
  *static_cast<uint4*>(address) = value;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  check_aligned(shared);
  check_aligned(global);
  shim::current->copies.push_back({shared, global, 16, bytes});
}
inline void copy_async_commit() { shim::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  shim::finish_copies(kPending);
}

inline void allow_next_kernel() {}
inline void wait_for_previous_kernels() { shim::wait_for_held(); }

// PTX ISA, mma.m16n8k16: with g = lane / 4 and t = lane % 4,
//   A: a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8), each with the next column above it
//   B: b[0] (2t, g), b[1] (2t + 8, g), each with the next row above it
//   C: c[0] (g, 2t), c[1] (g, 2t + 1), c[2] (g + 8, 2t), c[3] (g + 8, 2t + 1)
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float mine[12];  // both elements of a[0..3], then of b[0..1]
  for (int i = 0; i < 6; ++i) {
    const uint32_t pair = i < 4 ? a[i] : b[i - 4];
    mine[2 * i] = to_float(T{uint16_t(pair)});
    mine[2 * i + 1] = to_float(T{uint16_t(pair >> 16)});
  }
  const shim::Slot* slots = shim::exchange(mine, sizeof mine);
  const int lane = shim::current->number & 31;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, upper = k / 8;
      const float x = slots[row % 8 * 4 + holder].as_float[2 * (row / 8 + 2 * upper) + k % 2];
      c[i] += x * slots[column * 4 + holder].as_float[8 + 2 * upper + k % 2];
    }
  }
}

// PTX ISA, ldmatrix.x4: lane 8 i + r names row r of matrix i; a lane receives (lane / 4, 2 (lane % 4)) and the next column
// of each matrix, transposed (2 (lane % 4), lane / 4) and the next row.
template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  check_aligned(row);
  const shim::Slot* slots = shim::exchange(&row, sizeof row);
  const int lane = shim::current->number & 31;
  for (int i = 0; i < 4; ++i) {
    r[i] = 0;
    for (int j = 0; j < 2; ++j) {
      const int from = kTransposed ? lane % 4 * 2 + j : lane / 4, at = kTransposed ? lane / 4 : lane % 4 * 2 + j;
      const uint16_t* address;
      std::memcpy(&address, slots[8 * i + from].bytes, sizeof address);
      r[i] |= uint32_t(address[at]) << 16 * j;
    }
  }
}

}  // namespace lk::cuda
