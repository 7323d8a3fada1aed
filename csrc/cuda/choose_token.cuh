// exit_head, the choice: a block per row merges the tiles' Partials in an order that depends on v alone.
//
// Top-k, top-p and min-p keep every token whose score reaches a threshold, so they need neither a sort nor the threshold:
// of the unfiltered draw, known from the first pass, it is enough to ask whether it is kept, by counting or weighing the
// tokens above it. If it is not, neither is anything below it, and the best of those above it is the next to ask. Under
// top-p the first question settles it with probability p. A question reads the row's logits once, 4 v bytes of L2 cache.
#pragma once

#include "cuda/exit_head.cuh"

namespace lk::cuda {

constexpr int kChooseThreads = 512;
constexpr int kChooseWarps = kChooseThreads / 32;
constexpr int kBins = 2048;

__device__ __forceinline__ float shuffle_xor(float v, int distance) { return __shfl_xor_sync(kAllLanes, v, distance); }
__device__ __forceinline__ int shuffle_xor(int v, int distance) { return __shfl_xor_sync(kAllLanes, v, distance); }
__device__ __forceinline__ Best shuffle_xor(const Best& v, int distance) {
  return {shuffle_xor(v.score, distance), shuffle_xor(v.token, distance)};
}

// combine(a, b) over the block in a fixed order; the result in every thread.
template <class V, class Combine>
__device__ __forceinline__ V block_reduce(V value, Combine combine) {
  __shared__ V warps[kChooseWarps];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  __syncthreads();  // the last call's results have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (int i = 1; i < kChooseWarps; ++i) value = combine(value, warps[i]);
  return value;
}
template <class V>
__device__ __forceinline__ V block_sum(V value) {
  return block_reduce(value, [](V a, V b) { return a + b; });
}

// Unsigned integers in the order of the floats.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The k-th largest of the row's logits, 1 <= k <= v, by counting in three levels of bins.
__device__ float kth_largest(const float* logits, int64_t v, int64_t k) {
  __shared__ int counts[kBins];
  __shared__ int warps[kChooseWarps];
  __shared__ int found_bin, found_above;
  constexpr int kBits[3] = {11, 11, 10};
  constexpr int kRun = kBins / kChooseThreads;
  uint32_t prefix = 0, mask = 0;
  int shift = 32;
  int remaining = int(k);
#pragma unroll
  for (int level = 0; level < 3; ++level) {
    shift -= kBits[level];
    const uint32_t bins = 1u << kBits[level];
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kChooseThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < v; i += kChooseThreads) {
      const uint32_t key = ordered(without_nan(logits[i]));
      if ((key & mask) == prefix) atomicAdd(&counts[key >> shift & (bins - 1)], 1);
    }
    __syncthreads();
    // From the top: thread t sums the t-th run of bins, and all threads the runs above.
    const int top = kBins - 1 - int(threadIdx.x) * kRun, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int mine = 0;
    for (int i = 0; i < kRun; ++i) mine += counts[top - i];
    int through = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, through, distance);
      if (lane >= distance) through += below;
    }
    if (lane == 31) warps[warp] = through;
    __syncthreads();
    int above = through - mine;
    for (int i = 0; i < warp; ++i) above += warps[i];
    if (above < remaining && remaining <= above + mine)
      for (int i = 0; i < kRun; ++i) {
        if (remaining <= above + counts[top - i]) {
          found_bin = top - i;
          found_above = above;
          break;
        }
        above += counts[top - i];
      }
    __syncthreads();
    prefix |= uint32_t(found_bin) << shift;
    mask |= 0xffffffffu << shift;
    remaining -= found_above;
  }
  return from_ordered(prefix);
}

struct Draw {
  float score, logit;
  int32_t token;
};

// The best of what the filters keep, given the best of everything and the largest logit.
__device__ __forceinline__ Draw draw_filtered(const ExitHeadArgs& a, int64_t row, Draw draw, float largest) {
  const SamplingArgs& s = a.sampling;
  const float* logits = a.logits + row * a.logits_stride;
  const float temperature = s.temperature[row], top = largest / temperature;
  const int64_t k = s.top_k && s.top_k[row] > 0 && s.top_k[row] < a.v ? s.top_k[row] : a.v;
  const float p = s.top_p ? s.top_p[row] : 1.0f, min_p = s.min_p ? s.min_p[row] : 0.0f;
  const auto score_of = [&](int64_t token) { return without_nan(logits[token]) / temperature; };
  if (!(draw.score < top)) return draw;
  float mass = 0;  // of what top-k keeps, where top-p needs it
  if (p < 1) {
    const float threshold = k < a.v ? kth_largest(logits, a.v, k) / temperature : -kInfinity;
    for (int64_t i = threadIdx.x; i < a.v; i += kChooseThreads)
      if (score_of(i) >= threshold) mass += expf(score_of(i) - top);
    mass = block_sum(mass);
  }
  const NoiseKey key = key_of(s, row);
  while (draw.score < top) {
    int count = 0;
    float above = 0;
    Best next{-kInfinity, draw.token};
    for (int64_t i = threadIdx.x; i < a.v; i += kChooseThreads) {
      const float score = score_of(i);
      if (!(score > draw.score)) continue;
      ++count;
      above += expf(score - top);
      next = better(next, {score + gumbel_noise(key, i), int32_t(i)});
    }
    count = block_sum(count);
    above = block_sum(above);
    if (count < k && (p >= 1 || above < p * mass) && expf(draw.score - top) >= min_p) break;
    draw.token = block_reduce(next, better).token;
    draw.logit = logits[draw.token];
    draw.score = score_of(draw.token);
  }
  return draw;
}

__global__ void __launch_bounds__(kChooseThreads) choose_token_kernel(ExitHeadArgs a) {
  follow_previous_kernels();
  const int64_t row = blockIdx.x, tiles = (a.v + kTileRows - 1) / kTileRows;
  const Partial* partials = static_cast<const Partial*>(a.partials) + row * tiles;
  float largest = -kInfinity;
  Best best{-kInfinity, 0x7fffffff};
#pragma unroll 8  // loads under way at once
  for (int64_t i = threadIdx.x; i < tiles; i += kChooseThreads) {
    largest = fmaxf(largest, partials[i].max);
    best = better(best, {partials[i].best, partials[i].best_token});
  }
  largest = block_reduce(largest, [](float x, float y) { return fmaxf(x, y); });
  best = block_reduce(best, better);
  const float base = base_of(largest);
  float total = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < tiles; i += kChooseThreads)
    if (partials[i].sum != 0) total += partials[i].sum * expf(base_of(partials[i].max) - base);
  total = block_sum(total);
  Draw draw{best.score, partials[best.token / kTileRows].best_logit, best.token};
  if (is_filtered(a.sampling, row, a.v)) {
    draw.score = without_nan(draw.logit) / a.sampling.temperature[row];  // without the noise
    draw = draw_filtered(a, row, draw, largest);
  }
  if (threadIdx.x == 0) {
    const float log_total = logf(total);
    a.token[row] = draw.token;
    a.logprob[row] = draw.logit - base - log_total;
    a.confidence[row] = expf(largest - base - log_total);
  }
}

}  // namespace lk::cuda
