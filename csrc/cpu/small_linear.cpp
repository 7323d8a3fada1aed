#include "cpu/ops.h"
#include "cpu/quantized_panel.h"
#include "cpu/rms_norm_row.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kLeastBytesPerTask = 16 << 10, kMostBytesPerTask = 384 << 10;
constexpr int64_t kTasksPerThread = 16;  // when there is enough to do: so that nobody waits long for the last one
constexpr int64_t kLeastToShare = 4096;  // elements of x that are packed by more than one thread

// What the tasks of one pass share: packed rows [0, x.m) are rows [first, first + x.m) of the call.
template <class Rows>
struct Pass {
  const SmallLinearArgs& args;
  const Rows& x;
  int64_t first;
};

// Bias, rounding and residual of `count` outputs of one row, from `n` on.
template <class T>
LK_INLINE void finish(const SmallLinearArgs& a, const LinearWeight& weight, int64_t m, int64_t n, int64_t count,
                      const float* totals) {
  const T* bias = static_cast<const T*>(weight.bias);
  const T* residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(weight.out) + m * weight.out_stride + n;
  if (bias) bias += n;
  if (residual) residual += m * a.residual_stride + n;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t left = count - i;
    const bool whole = left >= kWidth;
    vf y = whole ? load(totals + i) : load(totals + i, left);
    if (bias) y = add(y, whole ? load(bias + i) : load(bias + i, left));
    if (residual) {
      alignas(64) T linear[kWidth];
      store(linear, y);
      y = add(whole ? load(residual + i) : load(residual + i, left), load(linear));
    }
    if (whole) store(out + i, y); else store(out + i, y, left);
  }
}

template <class T, class Rows>
void run_pass(const Pass<Rows>& pass) {
  const SmallLinearArgs& a = pass.args;
  constexpr int64_t kTileRows = Rows::kTileRows;
  const int64_t bits = a.weights->quantization.bits;
  const int64_t row_bytes = 1 + a.c * (bits ? bits : 8 * int64_t(sizeof(T))) / 8;
  int64_t rows = 0;
  for (int64_t i = 0; i < a.num_weights; ++i) rows += a.weights[i].n;
  int64_t bytes = rows * row_bytes / (kTasksPerThread * a.num_threads);
  if (bytes > kMostBytesPerTask) bytes = kMostBytesPerTask;
  if (bytes < kLeastBytesPerTask) bytes = kLeastBytesPerTask;
  // Whole tiles, so that only the last rows of a weight miss the full tile.
  int64_t rows_per_task = bytes / row_bytes / kTileRows * kTileRows;
  if (rows_per_task < kTileRows) rows_per_task = kTileRows;
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.num_weights; ++i) tasks += (a.weights[i].n + rows_per_task - 1) / rows_per_task;
  auto task = [&](int64_t index) {
    const LinearWeight* weight = a.weights;
    for (int64_t count; index >= (count = (weight->n + rows_per_task - 1) / rows_per_task); ++weight) index -= count;
    const int64_t begin = index * rows_per_task;
    const int64_t end = begin + rows_per_task < weight->n ? begin + rows_per_task : weight->n;
    const Matrix matrix{weight->data, weight->stride, weight->n, weight->quantization};
    alignas(64) float totals[Rows::kMostRows][kTileRows];
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int64_t count = end - n < kTileRows ? end - n : kTileRows;
      pass.x.panel(matrix, n, n + count, Totals{totals[0], kTileRows});
      for (int64_t row = 0; row < pass.x.m; ++row) finish<T>(a, *weight, pass.first + row, n, count, totals[row]);
    }
  };
  parallel_for(a.num_threads, tasks, task);
}

template <class T, class Rows>
void run_passes(const SmallLinearArgs& a) {
  const int64_t most = Rows::most_rows(a.c);
  Rows rows(a.m < most ? a.m : most, a.c);
  char* normed = nullptr;
  if (a.norm_weight) normed = static_cast<char*>(workspace(Workspace::linear_norm, size_t(rows.m * a.c) * sizeof(T)));
  for (int64_t first = 0; first < a.m; first += most) {
    rows.m = a.m - first < most ? a.m - first : most;
    const int64_t together = rows.packed_together();
    auto pack = [&](int64_t task) {
      const int64_t row = task * together, count = rows.m - row < together ? rows.m - row : together;
      const T* x = static_cast<const T*>(a.x) + (first + row) * a.x_stride;
      if (!normed) return rows.pack(row, count, x, a.x_stride);
      T* to = reinterpret_cast<T*>(normed) + row * a.c;
      for (int64_t i = 0; i < count; ++i)
        rms_norm_row(x + i * a.x_stride, static_cast<const T*>(a.norm_weight), a.norm_eps, to + i * a.c, a.c);
      rows.pack(row, count, to, a.c);
    };
    parallel_for(rows.m * a.c < kLeastToShare ? 1 : a.num_threads, (rows.m + together - 1) / together, pack);
    run_pass<T>(Pass<Rows>{a, rows, first});
  }
}

template <class T>
void run(const SmallLinearArgs& a) {
  if (a.weights->quantization.bits) return run_passes<T, QuantizedRows>(a);
  run_passes<T, DenseRows<T>>(a);
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
