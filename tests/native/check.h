// Shared by the driver's cases: buffers of exactly the size the op may touch, so that a sanitizer sees one element more.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/ops.h"

#define LK_CHECK_OP(op, Args) void check_##op(int num_threads);
LK_CPU_OPS(LK_CHECK_OP)  // an op without a case does not link

inline std::atomic<int> g_failures{0};

inline void expect(bool holds, const char* what, int dtype = -1, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (holds) return;
  ++g_failures;
  std::fprintf(stderr, "FAILED: %s (dtype %d, %lld %lld %lld)\n", what, dtype, (long long)a, (long long)b, (long long)c);
}

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33) * 2654435761u;
  }
  float uniform() { return float(bits() >> 8) * 0x1p-24f; }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
};

template <class T>
constexpr lk::DType dtype_of = sizeof(T) == 4 ? lk::DType::f32 : lk::DType::f16;
template <>
inline constexpr lk::DType dtype_of<lk::bf16> = lk::DType::bf16;

// Heap memory of exactly `size` elements.
template <class T>
struct Buffer {
  int64_t size;
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t n) : size(n), data(new T[size_t(n)]) {}
  Buffer(const Buffer& other) : Buffer(other.size) {
    if (size) memcpy(data.get(), other.data.get(), size_t(size) * sizeof(T));
  }
  operator T*() const { return data.get(); }
  void fill(T value) { for (int64_t i = 0; i < size; ++i) data[i] = value; }
};

template <class T>
Buffer<T> random_buffer(int64_t n, uint64_t seed, float scale = 1, float shift = 0) {
  Buffer<T> buffer(n);
  Random random(seed);
  for (int64_t i = 0; i < n; ++i) buffer[i] = lk::from_float<T>((2 * random.uniform() - 1) * scale + shift);
  return buffer;
}

// A weight [n, c] in 8 or 4 bits with rows that lie apart; its scale in bfloat16, or in float beside an offset.
struct Quantized {
  int64_t stride, groups;
  Buffer<uint8_t> values;
  Buffer<float> scale, offset;
  Buffer<lk::bf16> narrow;
  lk::Quantization format;

  Quantized(int64_t n, int64_t c, int64_t bits, int64_t group, bool with_offset, uint64_t seed)
      : stride(c * bits / 8 + 3), groups((c + group - 1) / group),
        values(n ? (n - 1) * stride + c * bits / 8 : 0),
        scale(random_buffer<float>(n * groups, seed, 0.01f)), offset(random_buffer<float>(n * groups, seed + 1, 0.01f)),
        narrow(random_buffer<lk::bf16>(n * groups, seed, 0.01f)),
        format{bits, group, narrow, groups, int64_t(lk::DType::bf16), nullptr, groups} {
    if (with_offset)
      format.scale = scale, format.scale_dtype = int64_t(lk::DType::f32), format.offset = offset;
    Random random(seed + 2);
    for (int64_t i = 0; i < values.size; ++i) values[i] = uint8_t(random.bits());
  }
};

// Elements between the first of row 0 and the last of the last row.
inline int64_t span(int64_t rows, int64_t stride, int64_t width) { return rows ? (rows - 1) * stride + width : 0; }

template <class T>
bool same(const T* a, const T* b, int64_t n) { return n == 0 || memcmp(a, b, size_t(n) * sizeof(T)) == 0; }

// Calls check<T>(num_threads) for every element type.
#define FOR_EVERY_DTYPE(check, num_threads) \
  check<float>(num_threads);                \
  check<lk::f16>(num_threads);              \
  check<lk::bf16>(num_threads)
