// swiglu: a vector of 16 bytes per thread.
//
// Bound by bytes: 3 m n itemsize. Expected on an H100 (3.35 TB/s), estimates: bf16, n = 14336, m = 8: 0.7 MB, 2 us, what a
// launch costs; m = 2048: 176 MB, 55 us.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kSwigluThreads = 128;

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

struct SwigluLaunch {
  SwigluArgs args;
  bool wide;
};

template <class T>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(SwigluLaunch launch) {
  const SwigluArgs& a = launch.args;
  follow_previous_kernels();
  const int64_t row = blockIdx.x;
  const int64_t i = (int64_t(blockIdx.y) * kSwigluThreads + threadIdx.x) * kVector<T>;
  if (i >= a.n) return;
  Vector<T> gate = load_vector(static_cast<const T*>(a.gate) + row * a.gate_stride, i, a.n, launch.wide);
  const Vector<T> up = load_vector(static_cast<const T*>(a.up) + row * a.up_stride, i, a.n, launch.wide);
#pragma unroll
  for (int j = 0; j < gate.size; ++j) gate.at[j] = swiglu(gate.at[j], up.at[j]);
  store_vector(static_cast<T*>(a.out) + row * a.out_stride, i, a.n, launch.wide, gate);
}

}  // namespace lk::cuda
