// What a round of decoding does between its ops: reads embeddings, sets out its tensors, counts what was emitted. Torch would
// take 11 launches for an autoregressive token, each a barrier between kernels that overlap.
//
// Bound by latency: 8 bytes per token, one embedding per row. Expected on an H100, estimates: 2 us each, what a launch costs.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kRoundThreads = 128;

struct EmbedLaunch {
  EmbedArgs args;
  bool wide;
};

template <class T>
__global__ void __launch_bounds__(kRoundThreads) embed_kernel(EmbedLaunch launch) {
  follow_previous_kernels();
  const EmbedArgs& a = launch.args;
  const int64_t row = blockIdx.x, i = (int64_t(blockIdx.y) * kRoundThreads + threadIdx.x) * kVector<T>;
  const T* from = static_cast<const T*>(a.table) + a.tokens[row * a.tokens_stride] * a.table_stride;
  T* to = static_cast<T*>(a.out) + row * a.out_stride;
  if (i < a.c) store_vector(to, i, a.c, launch.wide, load_vector(from, i, a.c, launch.wide));
}

__global__ void __launch_bounds__(kRoundThreads) begin_round_kernel(BeginRoundArgs a) {
  follow_previous_kernels();
  const int64_t i = int64_t(blockIdx.x) * kRoundThreads + threadIdx.x, b = i / a.t, t = i % a.t;
  if (b >= a.b) return;
  const int32_t position = a.lengths[b] + int32_t(t);
  a.positions[i] = position;
  a.step_lengths[t * a.b + b] = position;
  if (a.next_positions) a.next_positions[i] = position + 1;
  for (int field = 0; field < a.num_repeated; ++field) {
    const RepeatedField& f = a.repeated[field];
    if (f.itemsize == 8) static_cast<int64_t*>(f.to)[i] = static_cast<const int64_t*>(f.from)[b];
    else static_cast<int32_t*>(f.to)[i] = static_cast<const int32_t*>(f.from)[b];
  }
  if (t == 0) {
    a.tokens[b * a.t] = a.pending[b];
    a.num_draft[b] = min(max(a.remaining[b] - 1, 0), int32_t(a.t - 1));
  }
}

__global__ void __launch_bounds__(kRoundThreads) end_round_kernel(EndRoundArgs a) {
  follow_previous_kernels();
  const int64_t b = int64_t(blockIdx.x) * kRoundThreads + threadIdx.x;
  if (b >= a.b) return;
  const int32_t emitted = a.num_emitted[b];
  a.remaining[b] -= emitted;
  // of a sequence that had ended, which the host may not have seen yet, any token does
  a.pending[b] = max(a.emitted[b * a.t + max(emitted - 1, 0)], int64_t(0));
}

}  // namespace lk::cuda
