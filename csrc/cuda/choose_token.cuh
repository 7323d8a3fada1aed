// exit_head, the choice: a block per row merges the tiles' Partials in an order that depends on v alone.
//
// Top-k, top-p and min-p keep every token whose score reaches a threshold, so they need neither a sort nor the threshold:
// of the unfiltered draw, known from the first pass, it is enough to ask whether it is kept, by counting or weighing the
// tokens above it. If it is not, neither is anything below it, and the best of those above it is the next to ask. Under
// top-p the first question settles it with probability p. A question reads the tiles' maxima, 1.5 v bytes of cache, and the
// logits of those tiles alone that have one above.
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

// The k-th largest of values by counting in three levels of bins. for_each(visit) visits those of this thread, each time the
// same; there are at least k.
template <class ForEach>
__device__ float kth_largest(ForEach for_each, int64_t k) {
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
    for_each([&](float value) {
      const uint32_t key = ordered(value);
      if ((key & mask) == prefix) atomicAdd(&counts[key >> shift & (bins - 1)], 1);
    });
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

// What the first pass left of a row.
struct LogitsRow {
  const Partial* partials;
  const float* logits;
  int64_t v, tiles;

  // visit(largest logit of the tile) for this thread's tiles.
  template <class Visit>
  __device__ __forceinline__ void for_tiles(Visit visit) const {
    for (int64_t tile = threadIdx.x; tile < tiles; tile += kChooseThreads) visit(partials[tile].max);
  }

  // visit(token, logit) for this thread's tokens, those at least that have a logit from `least` on.
  template <class Visit>
  __device__ __forceinline__ void for_tokens(float least, Visit visit) const {
    for (int64_t tile = threadIdx.x; tile < tiles; tile += kChooseThreads) {
      if (!(partials[tile].max >= least)) continue;
      const int64_t first = tile * kTileRows;
      float values[kTileRows];
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) values[i] = first + i < v ? without_nan(logits[first + i]) : -kInfinity;
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) visit(first + i, values[i]);
    }
  }

  // As many tiles as have one from the k-th largest of their maxima on: the logits of all others are smaller.
  __device__ float kth_logit(int64_t k) const {
    const float least = k > tiles ? -kInfinity : kth_largest([&](auto visit) { for_tiles(visit); }, k);
    return kth_largest([&](auto visit) { for_tokens(least, [&](int64_t, float logit) { visit(logit); }); }, k);
  }
};

struct Draw {
  float score, logit;
  int32_t token;
};

// The best of what the filters keep, given the best of everything and the largest logit.
__device__ __forceinline__ Draw draw_filtered(const ExitHeadArgs& a, const LogitsRow& row, int64_t index, Draw draw,
                                              float largest) {
  const SamplingArgs& s = a.sampling;
  const float temperature = s.temperature[index], top = largest / temperature;
  const int64_t k = s.top_k && s.top_k[index] > 0 && s.top_k[index] < a.v ? s.top_k[index] : a.v;
  const float p = s.top_p ? s.top_p[index] : 1.0f, min_p = s.min_p ? s.min_p[index] : 0.0f;
  if (!(draw.score < top)) return draw;
  float mass = 0;  // of what top-k keeps, where top-p needs it
  if (p < 1) {
    if (k < a.v) {
      const float kth = row.kth_logit(k), threshold = kth / temperature;
      // somewhat below: smaller logits may have the same score
      row.for_tokens(kth - fabsf(kth) * 1e-6f, [&](int64_t, float logit) {
        const float score = logit / temperature;
        if (score >= threshold) mass += expf(score - top);
      });
    } else {
#pragma unroll 8
      for (int64_t tile = threadIdx.x; tile < row.tiles; tile += kChooseThreads)
        if (row.partials[tile].mass != 0)
          mass += row.partials[tile].mass * expf(base_of(row.partials[tile].max) / temperature - top);
    }
    mass = block_sum(mass);
  }
  const NoiseKey key = key_of(s, index);
  while (draw.score < top) {
    int count = 0;
    float above = 0;
    Best next{-kInfinity, draw.token};
    row.for_tokens(draw.logit, [&](int64_t token, float logit) {
      const float score = logit / temperature;
      if (!(score > draw.score)) return;
      ++count;
      above += expf(score - top);
      next = better(next, {score + gumbel_noise(key, token), int32_t(token)});
    });
    count = block_sum(count);
    above = block_sum(above);
    if (count < k && (p >= 1 || above < p * mass) && expf(draw.score - top) >= min_p) break;
    draw.token = block_reduce(next, better).token;
    draw.logit = without_nan(row.logits[draw.token]);
    draw.score = draw.logit / temperature;
  }
  return draw;
}

__global__ void __launch_bounds__(kChooseThreads, 1) choose_token_kernel(ExitHeadArgs a) {
  follow_previous_kernels();
  const int64_t row = blockIdx.x, tiles = (a.v + kTileRows - 1) / kTileRows;
  const Partial* partials = static_cast<const Partial*>(a.partials) + row * tiles;
  const LogitsRow logits{partials, a.logits + row * a.logits_stride, a.v, tiles};
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
    draw = draw_filtered(a, logits, row, draw, largest);
  }
  if (threadIdx.x == 0) {
    const float log_total = logf(total);
    a.token[row] = draw.token;
    a.logprob[row] = draw.logit - base - log_total;
    a.confidence[row] = expf(largest - base - log_total);
  }
}

}  // namespace lk::cuda
