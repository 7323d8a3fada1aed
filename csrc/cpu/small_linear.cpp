#include "cpu/dot.h"
#include "cpu/ops.h"
#include "cpu/rms_norm_row.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int kMaxCols = 4;               // x rows of a register tile
constexpr int64_t kMaxPackedRows = 64;    // x rows per pass over the weights
constexpr int64_t kBytesPerTask = 96 << 10;

// Weight rows of a register tile with `cols` x rows.
constexpr int rows_of_tile(int cols) { return kRegisters / cols < 8 ? kRegisters / cols : 8; }

// What the tasks of one pass share: packed rows [0, m) are rows [first, first + m) of the call.
template <class T>
struct Pass {
  const SmallLinearArgs& args;
  const typename Dot<T>::X* x;
  int64_t x_stride;
  int64_t first, m;
};

template <class T>
LK_INLINE void finish(const Pass<T>& pass, const LinearWeight& weight, int64_t row, int64_t n, float total) {
  if (weight.bias) total += to_float(static_cast<const T*>(weight.bias)[n]);
  T y = from_float<T>(total);
  const int64_t m = pass.first + row;
  if (pass.args.residual) {
    const T residual = static_cast<const T*>(pass.args.residual)[m * pass.args.residual_stride + n];
    y = from_float<T>(to_float(residual) + to_float(y));
  }
  static_cast<T*>(weight.out)[m * weight.out_stride + n] = y;
}

template <class T, int kRows, int kCols>
LK_INLINE void tile(const Pass<T>& pass, const LinearWeight& weight, int64_t row, int64_t n) {
  float totals[kRows][kCols];
  dot_tile<T, kRows, kCols>(static_cast<const T*>(weight.data) + n * weight.stride, weight.stride,
                            pass.x + row * pass.x_stride, pass.x_stride, pass.args.c, totals);
  for (int j = 0; j < kRows; ++j)
    for (int i = 0; i < kCols; ++i) finish(pass, weight, row + i, n + j, totals[j][i]);
}

// Weight rows [n, n + kRows) against all x rows, cut into tiles of nearly equal width: kCols or one less.
template <class T, int kRows, int kCols>
LK_INLINE void strip(const Pass<T>& pass, const LinearWeight& weight, int64_t n) {
  const int64_t tiles = (pass.m + kCols - 1) / kCols;
  const int64_t narrow = tiles * kCols - pass.m;
  int64_t row = 0;
  for (int64_t t = narrow; t < tiles; ++t, row += kCols) tile<T, kRows, kCols>(pass, weight, row, n);
  if constexpr (kCols > 1)
    for (; row < pass.m; row += kCols - 1) tile<T, kRows, kCols - 1>(pass, weight, row, n);
}

// Weight rows [begin, end).
template <class T, int kCols>
void panel(const Pass<T>& pass, const LinearWeight& weight, int64_t begin, int64_t end) {
  constexpr int kRows = rows_of_tile(kCols);
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) strip<T, kRows, kCols>(pass, weight, n);
  for (; n < end; ++n) strip<T, 1, kCols>(pass, weight, n);
}

template <class T>
void run_pass(const Pass<T>& pass) {
  const SmallLinearArgs& a = pass.args;
  // A multiple of every tile height, so that only the last rows of a weight miss the full tile.
  int64_t rows_per_task = kBytesPerTask / ((a.c + 1) * int64_t(sizeof(T))) / 24 * 24;
  if (rows_per_task < 24) rows_per_task = 24;
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.num_weights; ++i) tasks += (a.weights[i].n + rows_per_task - 1) / rows_per_task;
  const int64_t tiles = (pass.m + kMaxCols - 1) / kMaxCols;
  const int cols = int((pass.m + tiles - 1) / tiles);  // so that at most `tiles` tiles are one narrower
  auto task = [&](int64_t index) {
    const LinearWeight* weight = a.weights;
    for (int64_t count; index >= (count = (weight->n + rows_per_task - 1) / rows_per_task); ++weight) index -= count;
    const int64_t begin = index * rows_per_task;
    const int64_t end = begin + rows_per_task < weight->n ? begin + rows_per_task : weight->n;
    switch (cols) {
      case 1: return panel<T, 1>(pass, *weight, begin, end);
      case 2: return panel<T, 2>(pass, *weight, begin, end);
      case 3: return panel<T, 3>(pass, *weight, begin, end);
      case 4: return panel<T, 4>(pass, *weight, begin, end);
    }
  };
  parallel_for(a.num_threads, tasks, task);
}

template <class T>
void run(const SmallLinearArgs& a) {
  using X = typename Dot<T>::X;
  const int64_t stride = packed_size<T>(a.c);
  const int64_t most = a.m < kMaxPackedRows ? a.m : kMaxPackedRows;
  X* packed = static_cast<X*>(workspace(Workspace::linear_x, size_t(most * stride) * sizeof(X)));
  T* normed = a.norm_weight ? static_cast<T*>(workspace(Workspace::linear_norm, size_t(a.c) * sizeof(T))) : nullptr;
  for (int64_t first = 0; first < a.m; first += kMaxPackedRows) {
    const int64_t m = a.m - first < kMaxPackedRows ? a.m - first : kMaxPackedRows;
    for (int64_t row = 0; row < m; ++row) {
      const T* x = static_cast<const T*>(a.x) + (first + row) * a.x_stride;
      if (normed) {
        rms_norm_row(x, static_cast<const T*>(a.norm_weight), a.norm_eps, normed, a.c);
        x = normed;
      }
      pack_row(x, a.c, packed + row * stride);
    }
    run_pass(Pass<T>{a, packed, stride, first, m});
  }
}

}  // namespace

void small_linear(const SmallLinearArgs& args) {
  if (args.m == 0) return;
  switch (args.dtype) {
    case DType::f32: return run<float>(args);
    case DType::f16: return run<f16>(args);
    case DType::bf16: return run<bf16>(args);
  }
}

}  // namespace lk::LK_VARIANT
