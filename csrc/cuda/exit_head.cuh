// exit_head, the pass over the head's weights: linear_tile.cuh's product, whose epilogue turns a tile of 16 tokens of the
// vocabulary into one Partial per row: largest logit, sum of exponentials, best score, noise included. choose_token.cuh
// merges them. Logits reach memory only where asked for, or where a filter has to look at all of them.
//
// Bound by the bytes of the head: v c itemsize; 2 n v c operations (n filled up to 8). Expected on an H100 (3.35 TB/s,
// 989 TFLOP/s), estimates: bf16, v = 128256, n = 1: c = 2048: 525 MB, 165 us; c = 4096: 1.05 GB, 325 us.
#pragma once

#include "cuda/gumbel.cuh"
#include "cuda/linear_tile.cuh"

namespace lk::cuda {

constexpr float kInfinity = __builtin_huge_valf();

// What a tile of the vocabulary says about a row.
struct Partial {
  float max;   // of the logits, NaN aside
  float sum;   // of exp(logit - base_of(max)), NaN included
  float mass;  // of exp((logit - base_of(max)) / temperature), NaN aside, where top-p asks for it
  float best;  // largest score, noise included
  float best_logit;
  int32_t best_token;
};
static_assert(sizeof(Partial) == kPartialBytes);

// What the sums of exponentials are relative to: exp(inf - inf) would be NaN.
__device__ __forceinline__ float base_of(float max) { return max == kInfinity || max == -kInfinity ? 0.0f : max; }
__device__ __forceinline__ float without_nan(float x) { return x == x ? x : -kInfinity; }

// A score and its token: the larger score wins, of equal ones the lower token.
struct Best {
  float score;
  int32_t token;
};
__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
}

__device__ __forceinline__ bool is_sampled(const SamplingArgs& s, int64_t row) {
  return s.temperature && s.temperature[row] != 0;
}
__device__ __forceinline__ bool is_filtered(const SamplingArgs& s, int64_t row, int64_t vocab) {
  return is_sampled(s, row) && ((s.top_k && s.top_k[row] > 0 && s.top_k[row] < vocab) || (s.top_p && s.top_p[row] < 1) ||
                                (s.min_p && s.min_p[row] > 0));
}
__device__ __forceinline__ bool is_seen(const PenaltyArgs& p, int64_t row, int64_t token) {
  return p.first_seen[row / p.share * p.first_seen_stride + token] <= p.position[row];
}
__device__ __forceinline__ NoiseKey key_of(const SamplingArgs& s, int64_t row) {
  return noise_key(s.seed[row], s.stream ? s.stream[row] : 0, s.position[row]);
}

struct ExitHeadLaunch {
  LinearInput input;
  ExitHeadArgs args;
};

template <class T, int kTiles, bool kWide>
__global__ void __launch_bounds__(kLinearThreads, kTiles > 2 ? 1 : 2) exit_head_kernel(ExitHeadLaunch launch) {
  const ExitHeadArgs& a = launch.args;
  const int tiles = int((a.v + kTileRows - 1) / kTileRows);
  const auto rows_of = [&](int tile) {
    const WeightRows upper{a.lm_head, a.lm_head_stride, int64_t(tile) * kTileRows, a.v};
    return WeightTile{upper, {upper.data, upper.stride, upper.first + 8, upper.end}};
  };
  const auto finish = [&](int tile, int i, float logit) {
    const bool real = i / kTileRows < launch.input.m;  // the others only take part in the shuffles
    const int64_t row = real ? i / kTileRows : 0;
    const int64_t token = int64_t(tile) * kTileRows + i % kTileRows;
    const bool exists = real && token < a.v;
    if (a.bias && exists) logit += widen(static_cast<const T*>(a.bias)[token]);
    logit *= a.logit_scale;
    if (a.softcap != 0) logit = a.softcap * tanhf(logit / a.softcap);
    if (a.penalty.factor && exists && is_seen(a.penalty, row, token))
      logit = logit < 0 ? logit * a.penalty.factor[row] : logit / a.penalty.factor[row];
    if (!exists) logit = -kInfinity;
    if (a.logits && exists && (a.keep_logits || is_filtered(a.sampling, row, a.v)))
      a.logits[row * a.logits_stride + token] = logit;
    float score = without_nan(logit), max = score;
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
    float sum = expf(logit - base_of(max));
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    float mass = 0;
    if (a.sampling.top_p) {
      if (exists && is_filtered(a.sampling, row, a.v)) mass = expf((score - base_of(max)) / a.sampling.temperature[row]);
#pragma unroll
      for (int distance = 8; distance > 0; distance /= 2) mass += __shfl_xor_sync(kAllLanes, mass, distance);
    }
    if (exists && is_sampled(a.sampling, row))
      score = score / a.sampling.temperature[row] + gumbel_noise(key_of(a.sampling, row), token);
    Best best{score, int32_t(token)};
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
      best = better(best, {__shfl_xor_sync(kAllLanes, best.score, distance),
                           __shfl_xor_sync(kAllLanes, best.token, distance)});
    if (exists && token == best.token)
      static_cast<Partial*>(a.partials)[row * tiles + tile] = {max, sum, mass, best.score, logit, best.token};
  };
  for_tiles<Product<T, kTiles, kWide>, T, kWide>(launch.input, tiles, rows_of, finish);
}

}  // namespace lk::cuda
