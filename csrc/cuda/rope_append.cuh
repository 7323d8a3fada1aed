// rope_append: a warp takes a head at a time: the query heads, the key heads, the value heads. A block works out its row's
// cosines and sines in shared memory; with few rows the heads are spread over blocks that do so each. Angles are float32 products, reduced to
// [-pi, pi] in float64, so that a position in the hundred thousands costs no digits.
//
// Bound by latency: 2 (h + 2 g) d itemsize bytes per row. Expected on an H100 (3.35 TB/s), estimates: bf16, d = 128,
// h = 32, g = 8: 8 rows 197 KB, 2 us, what a launch costs; 2048 rows 50 MB, 16 us.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kRopeWarps = 8;
constexpr int kRopeThreads = 32 * kRopeWarps;
constexpr int64_t kFewRows = 64;
constexpr int kRopeMaxDim = 256;

__device__ __forceinline__ void cosine_and_sine(float angle, float* cosine, float* sine) {
  const double turns = double(angle) * 0.15915494309189535;  // 1 / (2 pi)
  sincospif(float(2.0 * (turns - rint(turns))), sine, cosine);
}

template <class T>
__global__ void __launch_bounds__(kRopeThreads, 4) rope_append_kernel(RopeAppendArgs a) {
  __shared__ float cosines[kRopeMaxDim / 2], sines[kRopeMaxDim / 2];
  constexpr int kMost = kRopeMaxDim / 2 / 32;  // pairs of a lane
  follow_previous_kernels();
  const int64_t t = blockIdx.x, b = blockIdx.y;
  if (a.num_queries && t >= a.num_queries[b]) return;
  const int half = int(a.d / 2), lane = threadIdx.x % 32;
  const int64_t slot = a.slot_ids ? a.slot_ids[b] : b, place = a.lengths[b] + t;
  T* q = static_cast<T*>(a.q) + b * a.q_stride[0] + t * a.q_stride[1];
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + t * a.k_stride[1];
  const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + t * a.v_stride[1];
  T* k_cache = static_cast<T*>(a.k_cache) + slot * a.k_cache_stride[0] + place * a.k_cache_stride[2];
  T* v_cache = static_cast<T*>(a.v_cache) + slot * a.v_cache_stride[0] + place * a.v_cache_stride[2];
  bool known = false;  // the cosines and sines
  for (int64_t first = int64_t(blockIdx.z) * kRopeWarps; first < a.h + 2 * a.g; first += int64_t(gridDim.z) * kRopeWarps) {
    const int64_t head = first + threadIdx.x / 32, key = head - a.h, value = key - a.g;
    const T* from = head < a.h ? q + head * a.q_stride[2] : key < a.g ? k + key * a.k_stride[2] : v + value * a.v_stride[2];
    T* to = head < a.h    ? q + head * a.q_stride[2]
            : key < a.g ? k_cache + key * a.k_cache_stride[1]
                        : v_cache + value * a.v_cache_stride[1];
    T low[kMost], high[kMost];
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int i = lane + 32 * n;
      if (value < a.g && i < half) low[n] = from[i], high[n] = from[half + i];
    }
    if (!known) {  // while those are on their way
      const float position = float(a.positions[b * a.positions_stride + t]);
      const float* inv_freq = a.inv_freq + b * a.inv_freq_stride[0] + t * a.inv_freq_stride[1];
      for (int i = threadIdx.x; i < half; i += kRopeThreads) {
        float cosine, sine;
        cosine_and_sine(position * inv_freq[i], &cosine, &sine);
        cosines[i] = cosine * a.attention_factor;
        sines[i] = sine * a.attention_factor;
      }
      __syncthreads();
      known = true;
    }
#pragma unroll
    for (int n = 0; n < kMost; ++n) {
      const int i = lane + 32 * n;
      if (value >= a.g || i >= half) continue;
      if (key < a.g) {
        const float x = widen(low[n]), y = widen(high[n]), c = cosines[i], s = sines[i];
        low[n] = narrow<T>(x * c - y * s);
        high[n] = narrow<T>(y * c + x * s);
      }
      to[i] = low[n], to[half + i] = high[n];
    }
  }
}

}  // namespace lk::cuda
