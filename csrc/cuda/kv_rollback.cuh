// kv_rollback: a chain of drafts only adds to the lengths, one small launch. With a path or scrub a launch over all layers
// comes first, a block per window of one head of one layer's k or v: the rows that move pass through shared memory, a slice
// of their columns at a time, so that every read comes before any write.
//
// Bound by latency, with a path by bytes: 8 layers b g keep d itemsize. Expected on an H100 (3.35 TB/s), estimates: chain:
// 2 us, what a launch costs; path, bf16, 32 layers, g = 8, d = 128, keep = 8, b = 16: 67 MB, 20 us.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kRollbackThreads = 128;
constexpr int64_t kRollbackShared = 32 << 10;

__global__ void __launch_bounds__(kRollbackThreads) add_lengths_kernel(KvRollbackArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kRollbackThreads + threadIdx.x;
  follow_previous_kernels();
  if (b < a.b) a.lengths[b] += a.keep[b];
}

// Word: an unsigned integer of the element's size.
template <class Word>
__global__ void __launch_bounds__(kRollbackThreads) move_rows_kernel(KvRollbackArgs a) {
  LK_DYNAMIC_SHARED(shared);
  follow_previous_kernels();
  Word* moved = reinterpret_cast<Word*>(shared);
  const int64_t b = blockIdx.y, layer = blockIdx.z, g = blockIdx.x / 2;
  const int64_t slot = a.slot_ids ? a.slot_ids[b] : b;
  const bool value = blockIdx.x % 2;
  const int64_t* stride = value ? a.v_cache_stride : a.k_cache_stride;
  Word* window = static_cast<Word*>(value ? a.v_cache : a.k_cache) + layer * stride[0] + slot * stride[1] + g * stride[2] +
                 a.lengths[b] * stride[3];
  const int64_t keep = a.keep[b];
  if (a.path) {
    const int32_t* path = a.path + b * a.path_stride;
    const int64_t most = kRollbackShared / int64_t(sizeof(Word)) / a.window;
    for (int64_t column = 0; column < a.d; column += most) {
      const int64_t width = min(most, a.d - column);
      for (int64_t i = threadIdx.x; i < keep * width; i += kRollbackThreads) {
        const int64_t from = path[i / width];
        if (from != i / width) moved[i] = window[from * stride[3] + column + i % width];
      }
      __syncthreads();
      for (int64_t i = threadIdx.x; i < keep * width; i += kRollbackThreads)
        if (path[i / width] != i / width) window[i / width * stride[3] + column + i % width] = moved[i];
      __syncthreads();
    }
  }
  if (a.scrub)
    for (int64_t i = threadIdx.x; i < (a.window - keep) * a.d; i += kRollbackThreads)
      window[(keep + i / a.d) * stride[3] + i % a.d] = 0;
}

}  // namespace lk::cuda
