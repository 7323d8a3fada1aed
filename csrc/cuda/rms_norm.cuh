// rms_norm: a warp per row, whatever the row's width, so that small_linear and exit_head can norm their input inside a
// block and get the same bits: lane l sums the vectors l, l + 32, ... of the row, an accumulator per place in the vector.
//
// Bound by latency in decoding, by bytes in prefill: 2 m c itemsize (4 with a residual), 4 m c operations. Expected on an
// H100 (3.35 TB/s), estimates: bf16, m = 8, c = 4096: 131 KB, 2 us, about what a launch costs; m = 2048, c = 4096: 34 MB,
// 12 us.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kNormWarps = 4;

// 1 / sqrt(mean(x^2) + eps) of a row, computed by one warp, known to all of its lanes.
template <class T>
__device__ __forceinline__ float inverse_rms(const T* x, int64_t c, float eps, bool wide) {
  Vector<T> squares{};
  constexpr int kTogether = 8, kStep = 32 * squares.size;  // as many loads are asked for before the first is needed
  const int64_t first = threadIdx.x % 32 * squares.size;
  const auto add = [&](float value, int j) { squares.at[j] = fmaf(value, value, squares.at[j]); };
  if (wide && c % squares.size == 0) {
    for (int64_t i = first; i < c; i += kTogether * kStep) {
      Elements<T> v[kTogether];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) v[n].wide = load_whole(x, i + n * kStep, c);
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
#pragma unroll
        for (int j = 0; j < squares.size; ++j) add(widen(v[n].at[j]), j);
    }
  } else {
    for (int64_t i = first; i < c; i += kStep) {
      const Vector<T> v = load_vector(x, i, c, false);
#pragma unroll
      for (int j = 0; j < v.size; ++j) add(v.at[j], j);
    }
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < squares.size; ++j) sum += squares.at[j];
  return 1.0f / sqrtf(warp_sum(sum) / float(c) + eps);
}

struct RmsNormLaunch {
  RmsNormArgs args;
  bool wide;
};

template <class T>
__global__ void __launch_bounds__(32 * kNormWarps) rms_norm_kernel(RmsNormLaunch launch) {
  const RmsNormArgs& a = launch.args;
  follow_previous_kernels();
  const int64_t row = int64_t(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  if (row >= a.m) return;
  const int lane = threadIdx.x % 32;
  constexpr int kStep = 32 * kVector<T>;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  if (a.residual) {
    T* residual = static_cast<T*>(a.residual) + row * a.residual_stride;
    for (int64_t i = lane * kVector<T>; i < a.c; i += kStep) {
      Vector<T> sum = load_vector(residual, i, a.c, launch.wide);
      const Vector<T> v = load_vector(x, i, a.c, launch.wide);
#pragma unroll
      for (int j = 0; j < sum.size; ++j) sum.at[j] += v.at[j];
      store_vector(residual, i, a.c, launch.wide, sum);
    }
    x = residual;
  }
  const float scale = inverse_rms(x, a.c, a.eps, launch.wide);
  T* out = static_cast<T*>(a.out) + row * a.out_stride;
  for (int64_t i = lane * kVector<T>; i < a.c; i += kStep) {
    Vector<T> v = load_vector(x, i, a.c, launch.wide);
    const Vector<T> weight = load_vector(static_cast<const T*>(a.weight), i, a.c, launch.wide);
#pragma unroll
    for (int j = 0; j < v.size; ++j) v.at[j] = v.at[j] * scale * weight.at[j];
    store_vector(out, i, a.c, launch.wide, v);
  }
}

}  // namespace lk::cuda
