#include <atomic>

#include "cpu/ops.h"
#include "cpu/quantized_dot.h"
#include "cpu/thread_pool.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kElementsPerTask = 65536;  // less is not worth a second thread

// The value of largest magnitude, the first of equals. NaN and infinity make a NaN of *none, which max() may lose.
template <class T>
LK_INLINE float extreme(const T* w, int64_t count, vf* none) {
  vf high = zero(), low = zero(), nan = zero();
  for (int64_t i = 0; i < count; i += kWidth) {
    const vf v = count - i < kWidth ? load(w + i, count - i) : load(w + i);
    high = max(high, v);
    low = max(low, sub(zero(), v));
    nan = fma(v, zero(), nan);
  }
  *none = add(*none, nan);
  const float most = max_of(high), least = max_of(low);
  if (most != least) return most > least ? most : -least;
  for (int64_t i = 0; i < count; ++i)
    if (__builtin_fabsf(to_float(w[i])) == most) return to_float(w[i]);
  return 0;
}

// A block's columns to where its unit has them. The block is whole, or what is left of a row.
template <int kBits>
LK_INLINE void write(const int32_t (&q)[kBlock], const Unit& unit, int64_t block, int64_t count, uint8_t* row) {
  constexpr int64_t kBytes = kBlock * kBits / 8;
  alignas(64) uint8_t bytes[kBlock];
  if (unit.blocks == 1) {
    if constexpr (kBits == 8)
      for (int64_t i = 0; i < kBlock; ++i) bytes[i] = uint8_t(q[i]);
    else
      for (int64_t i = 0; i < kBlock / 2; ++i) bytes[i] = uint8_t((q[2 * i] + 8) | (q[2 * i + 1] + 8) << 4);
    memcpy(row + block * kBytes, bytes, size_t(count * kBits / 8));
    return;
  }
  constexpr int64_t kSteps = 8 / kBits;  // in a byte
  for (int64_t i = 0; i < kBlock; ++i) bytes[i] = uint8_t(kBits == 8 ? q[i] : q[i] + 8);
  const int64_t lanes = kLanes / unit.blocks;  // of the block
  uint8_t* to = row + unit.first * kBytes + (block - unit.first) * lanes * 4;
  const uint8_t* from = bytes;
  for (int64_t lane = 0; lane < lanes; ++lane, to += 4)
    for (int64_t step = 0; step < unit.blocks / kSteps; ++step, from += 4 * kSteps) {
      uint32_t four, next;
      memcpy(&four, from, sizeof(four));
      memcpy(&next, from + 4 * (kSteps - 1), sizeof(next));
      if (kBits == 4) four |= next << 4;
      memcpy(to + step * kLanes * 4, &four, sizeof(four));
    }
}

// Sums of squares, in double so that neither the smallest nor the largest numbers lose theirs.
struct Squares {
  double error = 0, norm = 0;
};

// Columns [0, count) of a group whose first block is `first` of the row's `whole` whole ones.
template <int kBits, bool kMeasured, class T>
void round_group(const T* w, int64_t first, int64_t count, int64_t whole, float step, uint8_t* row, Squares* squares) {
  const vf most = set1(kBits == 8 ? 127 : 7), least = set1(kBits == 8 ? -127 : -8);
  const vf scale = set1(step), divisor = set1(step == 0 ? 1 : step);
  // The power of two next to 1 / step. Times it, every number of the group has a square in float.
  const uint32_t exponent = float_bits(step) & 0x7f800000;
  const float inverse = float_from_bits((uint32_t(2 * 127) << 23) - exponent);
  vf error = zero(), norm = zero();
  for (int64_t block = 0; block < count; block += kBlock) {
    alignas(64) int32_t q[kBlock];
    for (int64_t i = 0; i < kBlock; i += kWidth) {
      const T* p = w + block + i;
      const int64_t left = count - block - i;
      const vf v = left >= kWidth ? load(p) : left > 0 ? load(p, left) : zero();
      const vf whole = max(min(round_int(div(v, divisor)), most), least);
      const Ints numbers = __builtin_convertvector(whole, Ints);
      memcpy(q + i, &numbers, sizeof(numbers));
      if constexpr (kMeasured) {
        const vf lost = mul(sub(v, mul(whole, scale)), set1(inverse)), all = mul(v, set1(inverse));
        error = fma(lost, lost, error);
        norm = fma(all, all, norm);
      }
    }
    const int64_t index = first + block / kBlock;
    write<kBits>(q, unit_of(index, whole), index, count - block < kBlock ? count - block : kBlock, row);
  }
  if constexpr (kMeasured) {
    const double unit = 1 / double(inverse);
    squares->error += double(sum(error)) * unit * unit;
    squares->norm += double(sum(norm)) * unit * unit;
  }
}

// False where a number is not finite.
template <int kBits, bool kMeasured, class T>
bool quantize_row(const QuantizeArgs& a, int64_t row) {
  const T* w = static_cast<const T*>(a.weight) + row * a.weight_stride;
  const int64_t groups = (a.c + a.group - 1) / a.group;
  bf16* scale = a.scale + row * groups;
  auto width = [&](int64_t group) { return a.c - group * a.group < a.group ? a.c - group * a.group : a.group; };
  vf none = zero();
  for (int64_t i = 0; i < groups; ++i) {
    const float largest = extreme(w + i * a.group, width(i), &none);
    scale[i] = from_float<bf16>(kBits == 8 ? __builtin_fabsf(largest) / 127 : largest / -8);
  }
  if (sum(none) != 0) return false;
  Squares squares;
  uint8_t* values = a.values + row * a.c * kBits / 8;
  for (int64_t i = 0; i < groups; ++i)
    round_group<kBits, kMeasured>(w + i * a.group, i * a.group / kBlock, width(i), a.c / kBlock, to_float(scale[i]), values,
                                  &squares);
  if (a.error) a.error[row] = float(__builtin_sqrt(squares.error));
  if (a.norm) a.norm[row] = float(__builtin_sqrt(squares.norm));
  return true;
}

template <int kBits, bool kMeasured, class T>
void run(const QuantizeArgs& a) {
  const int64_t rows_per_task = 1 + kElementsPerTask / (a.c + 1);
  std::atomic<int64_t> bad_row{a.n};
  auto task = [&](int64_t index) {
    const int64_t begin = index * rows_per_task;
    const int64_t end = begin + rows_per_task < a.n ? begin + rows_per_task : a.n;
    for (int64_t row = begin; row < end; ++row) {
      if (quantize_row<kBits, kMeasured, T>(a, row)) continue;
      int64_t first = bad_row.load();
      while (row < first && !bad_row.compare_exchange_weak(first, row)) continue;
      return;
    }
  };
  parallel_for(a.num_threads, (a.n + rows_per_task - 1) / rows_per_task, task);
  *a.bad_row = bad_row.load();
}

template <class T>
void run(const QuantizeArgs& a) {
  const bool measured = a.error || a.norm;
  if (a.bits == 8)
    measured ? run<8, true, T>(a) : run<8, false, T>(a);
  else
    measured ? run<4, true, T>(a) : run<4, false, T>(a);
}

}  // namespace

void quantize(const QuantizeArgs& args) {
  switch (args.dtype) {
    case DType::f32: return run<float>(args);
    case DType::f16: return run<f16>(args);
    case DType::bf16: return run<bf16>(args);
  }
}

}  // namespace lk::LK_VARIANT
