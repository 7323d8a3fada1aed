#include "cpu/ops.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kElementsPerTask = 4096;  // less is not worth a second thread

LK_INLINE vf swiglu_of(vf gate, vf up) {
  return mul(div(gate, add(set1(1), exp(sub(zero(), gate)))), up);
}

template <class T>
LK_INLINE void swiglu_row(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, swiglu_of(load(gate + i), load(up + i)));
  if (i < n) store(out + i, swiglu_of(load(gate + i, n - i), load(up + i, n - i)), n - i);
}

template <class T>
void run(const SwigluArgs& a) {
  const int64_t width = a.n < kElementsPerTask ? a.n : kElementsPerTask;  // columns and rows of a task
  const int64_t height = kElementsPerTask / width;
  const int64_t across = (a.n + width - 1) / width;
  auto task = [&](int64_t index) {
    const int64_t column = index % across * width, begin = index / across * height;
    const int64_t end = begin + height < a.m ? begin + height : a.m;
    const int64_t n = a.n - column < width ? a.n - column : width;
    for (int64_t row = begin; row < end; ++row)
      swiglu_row(static_cast<const T*>(a.gate) + row * a.gate_stride + column,
                 static_cast<const T*>(a.up) + row * a.up_stride + column,
                 static_cast<T*>(a.out) + row * a.out_stride + column, n);
  };
  parallel_for(a.num_threads, (a.m + height - 1) / height * across, task);
}

}  // namespace

void swiglu(const SwigluArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  switch (args.dtype) {
    case DType::f32: return run<float>(args);
    case DType::f16: return run<f16>(args);
    case DType::bf16: return run<bf16>(args);
  }
}

}  // namespace lk::LK_VARIANT
