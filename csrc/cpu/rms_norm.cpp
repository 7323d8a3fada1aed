#include "cpu/ops.h"
#include "cpu/rms_norm_row.h"
#include "cpu/thread_pool.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // less is not worth a second thread

template <class T>
void run(const RmsNormArgs& a) {
  int64_t rows_per_task = kElementsPerTask / a.c;
  if (rows_per_task < 1) rows_per_task = 1;
  auto task = [&](int64_t index) {
    const int64_t begin = index * rows_per_task;
    const int64_t end = begin + rows_per_task < a.m ? begin + rows_per_task : a.m;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      if (a.residual) {
        T* residual = static_cast<T*>(a.residual) + row * a.residual_stride;
        add_row(residual, x, a.c);
        x = residual;
      }
      rms_norm_row(x, static_cast<const T*>(a.weight), a.eps, static_cast<T*>(a.out) + row * a.out_stride, a.c);
    }
  };
  parallel_for(a.num_threads, (a.m + rows_per_task - 1) / rows_per_task, task);
}

}  // namespace

void rms_norm(const RmsNormArgs& args) {
  if (args.m == 0 || args.c == 0) return;
  switch (args.dtype) {
    case DType::f32: return run<float>(args);
    case DType::f16: return run<f16>(args);
    case DType::bf16: return run<bf16>(args);
  }
}

}  // namespace lk::LK_VARIANT
