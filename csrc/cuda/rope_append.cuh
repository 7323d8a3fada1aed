// rope_append: a block per row of the window. It works out the row's cosines and sines once, in shared memory, then a warp
// takes a head at a time: the query heads, the key heads, the value heads. Angles are float32 products, reduced to
// [-pi, pi] in float64, so that a position in the hundred thousands costs no digits.
//
// Bound by latency: 2 (h + 2 g) d itemsize bytes per row. Expected on an H100 (3.35 TB/s), estimates: bf16, d = 128,
// h = 32, g = 8: 8 rows 197 KB, 2 us, what a launch costs; 2048 rows 50 MB, 16 us.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kRopeThreads = 256;
constexpr int kRopeMaxDim = 256;

__device__ __forceinline__ void cosine_and_sine(float angle, float* cosine, float* sine) {
  const double turns = double(angle) * 0.15915494309189535;  // 1 / (2 pi)
  sincospif(float(2.0 * (turns - rint(turns))), sine, cosine);
}

// y may be x: both halves are read before either is written.
template <class T>
__device__ __forceinline__ void rotate(const T* x, T* y, const float* cosines, const float* sines, int half) {
  for (int i = threadIdx.x % 32; i < half; i += 32) {
    const float a = widen(x[i]), b = widen(x[half + i]), c = cosines[i], s = sines[i];
    y[i] = narrow<T>(a * c - b * s);
    y[half + i] = narrow<T>(b * c + a * s);
  }
}

template <class T>
__global__ void __launch_bounds__(kRopeThreads, 4) rope_append_kernel(RopeAppendArgs a) {
  __shared__ float cosines[kRopeMaxDim / 2], sines[kRopeMaxDim / 2];
  const int64_t b = blockIdx.y, t = blockIdx.x;
  if (a.num_queries && t >= a.num_queries[b]) return;
  const int half = int(a.d / 2);
  const float position = float(a.positions[b * a.positions_stride + t]);
  const float* inv_freq = a.inv_freq + b * a.inv_freq_stride[0] + t * a.inv_freq_stride[1];
  for (int i = threadIdx.x; i < half; i += kRopeThreads) {
    float cosine, sine;
    cosine_and_sine(position * inv_freq[i], &cosine, &sine);
    cosines[i] = cosine * a.attention_factor;
    sines[i] = sine * a.attention_factor;
  }
  __syncthreads();
  const int64_t slot = a.slot_ids ? a.slot_ids[b] : b, place = a.lengths[b] + t;
  T* q = static_cast<T*>(a.q) + b * a.q_stride[0] + t * a.q_stride[1];
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + t * a.k_stride[1];
  const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + t * a.v_stride[1];
  T* k_cache = static_cast<T*>(a.k_cache) + slot * a.k_cache_stride[0] + place * a.k_cache_stride[2];
  T* v_cache = static_cast<T*>(a.v_cache) + slot * a.v_cache_stride[0] + place * a.v_cache_stride[2];
  for (int64_t head = threadIdx.x / 32; head < a.h + 2 * a.g; head += kRopeThreads / 32) {
    if (head < a.h) {
      rotate(q + head * a.q_stride[2], q + head * a.q_stride[2], cosines, sines, half);
    } else if (head < a.h + a.g) {
      const int64_t g = head - a.h;
      rotate(k + g * a.k_stride[2], k_cache + g * a.k_cache_stride[1], cosines, sines, half);
    } else {
      const int64_t g = head - a.h - a.g;
      for (int64_t i = threadIdx.x % 32; i < a.d; i += 32)
        v_cache[g * a.v_cache_stride[1] + i] = v[g * a.v_stride[2] + i];
    }
  }
}

}  // namespace lk::cuda
