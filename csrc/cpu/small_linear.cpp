#include "cpu/ops.h"
#include "cpu/panel.h"
#include "cpu/rms_norm_row.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kLeastBytesPerTask = 96 << 10, kMostBytesPerTask = 384 << 10;
constexpr int64_t kTasksPerThread = 8;  // when there is enough to do: so that nobody waits long for the last one

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

template <class T>
void run_pass(const Pass<T>& pass) {
  const SmallLinearArgs& a = pass.args;
  const int64_t row_bytes = (a.c + 1) * int64_t(sizeof(T));
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
    const Product<T> product{static_cast<const T*>(weight->data), weight->stride, pass.x, pass.x_stride, pass.m, a.c};
    panel(product, begin, end, [&](int64_t row, int64_t n, float total) { finish(pass, *weight, row, n, total); });
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
