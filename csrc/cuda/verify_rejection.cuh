// verify_rejection: a block per sequence. It sums the weights of the next token a chunk of the vocabulary at a time, in
// float64, then walks over the chunks again to the one that holds the draw. A chunk's sum is the end of the same prefix sum
// that finds the token in it, so both agree to the bit.
//
// Bound by what one multiprocessor reads: 16 V bytes per sequence for standard, 8 (K + 1) V for block. Expected on an H100,
// estimates, V = 128256: b = 1, standard: 2 MB in 20 us; b = 64, K = 6, block: 0.5 GB, 150 us at 3.35 TB/s.
#pragma once

#include "cuda/verify_emit.cuh"

namespace lk::cuda {

constexpr int kRejectionThreads = 256;
constexpr int kRejectionRun = 8;  // neighbouring tokens of a thread
constexpr int kRejectionChunk = kRejectionThreads * kRejectionRun;

struct Sequence {
  const VerifyRejectionArgs& args;
  int64_t row, drafts;

  __device__ const float* q(int64_t i) const {
    return args.draft_probs + row * args.draft_probs_stride[0] + i * args.draft_probs_stride[1];
  }
  __device__ const float* p(int64_t i) const {
    return args.target_probs + row * args.target_probs_stride[0] + i * args.target_probs_stride[1];
  }
  __device__ double uniform(int64_t i, int which) const {
    return args.uniforms[row * args.uniforms_stride[0] + i * args.uniforms_stride[1] + which];
  }
  __device__ int64_t draft(int64_t i) const { return args.round.draft[row * args.round.draft_stride + i]; }
  __device__ bool known(int64_t token) const { return token >= 0 && token < args.vocab; }
};

// max(ratio * p - q, 0), or p when there is no q. NaN stays NaN.
struct Weights {
  const float* p;
  const float* q;
  double ratio;
  __device__ double operator()(int64_t i) const {
    if (!q) return p[i];
    const double left = ratio * double(p[i]) - double(q[i]);
    return left < 0 ? 0 : left;
  }
};

struct Scan {
  double before, total;  // of the chunk: what lies before this thread's run, and all of it
};

__device__ __forceinline__ Scan scan_block(double mine) {
  __shared__ double warps[kRejectionThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double through = mine;  // this thread's run included
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const double below = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += below;
  }
  double before = __shfl_up_sync(kAllLanes, through, 1);
  if (lane == 0) before = 0;
  __syncthreads();  // the last call's sums have been read
  if (lane == 31) warps[warp] = through;
  __syncthreads();
  double offset = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kRejectionThreads / 32; ++i) {
    if (i == warp) offset = total;
    total += warps[i];
  }
  return {offset + before, total};
}

__device__ __forceinline__ Scan scan_chunk(const Weights& weights, int64_t first, int64_t vocab) {
  double sum = 0;
  for (int i = 0; i < kRejectionRun; ++i) {
    const int64_t token = first + threadIdx.x * kRejectionRun + i;
    if (token < vocab) sum += weights(token);
  }
  return scan_block(sum);
}

__device__ __forceinline__ double total_of(const Weights& weights, int64_t vocab) {
  double total = 0;
  for (int64_t first = 0; first < vocab; first += kRejectionChunk) total += scan_chunk(weights, first, vocab).total;
  return total;
}

// The accepted length, and the weights of the next token: the same in every thread.
__device__ __forceinline__ int64_t accept_standard(const Sequence& s, Weights& next) {
  for (int64_t i = 0; i < s.drafts; ++i) {
    const int64_t token = s.draft(i);
    const double p = s.known(token) ? s.p(i)[token] : 0, q = s.known(token) ? s.q(i)[token] : 0;
    if (!(s.uniform(i, 0) * q < p)) {
      next = {s.p(i), s.q(i), 1};
      return i;
    }
  }
  next = {s.p(s.drafts), nullptr, 1};
  return s.drafts;
}

__device__ __forceinline__ int64_t accept_block(const Sequence& s, Weights& next) {
  int64_t accepted = 0;
  double ratio = 1, accepted_ratio = 1;
  for (int64_t i = 1; i <= s.drafts; ++i) {
    const int64_t token = s.draft(i - 1);
    const double product = s.known(token) ? ratio * (double(s.p(i - 1)[token]) / double(s.q(i - 1)[token])) : 0;
    ratio = product > 1 ? 1 : product;
    double threshold = ratio;
    if (i < s.drafts) {
      const double left_over = total_of({s.p(i), s.q(i), ratio}, s.args.vocab);
      const double denominator = left_over + 1 - ratio;
      threshold = denominator > 0 ? left_over / denominator : 1;
    }
    if (s.uniform(i - 1, 0) < threshold) {
      accepted = i;
      accepted_ratio = ratio;
    }
  }
  if (accepted == s.drafts) next = {s.p(accepted), nullptr, 1};
  else next = {s.p(accepted), s.q(accepted), accepted_ratio};
  return accepted;
}

constexpr unsigned kNoToken = 0xffffffffu;

// The smallest of the threads' values, in every thread.
__device__ __forceinline__ unsigned block_min(unsigned value) {
  __shared__ unsigned warps[kRejectionThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = min(value, __shfl_xor_sync(kAllLanes, value, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRejectionThreads / 32; ++i) value = min(value, warps[i]);
  return value;
}

// First index whose cumulative weight exceeds uniform * total; always one of a weight that is not zero, if there is one.
__device__ __forceinline__ int64_t draw(const Weights& weights, double uniform, double total, int64_t vocab) {
  const double bound = uniform * total;
  double cumulative = 0;
  int64_t last = 0;
  for (int64_t first = 0; first < vocab; first += kRejectionChunk) {
    const Scan scan = scan_chunk(weights, first, vocab);
    const bool here = !(cumulative + scan.total <= bound);
    if (here || scan.total != 0) {
      double sum = cumulative + scan.before;
      unsigned found = kNoToken, positive = kNoToken;  // counted from the chunk's end, so that the last is the smallest
      for (int i = 0; i < kRejectionRun; ++i) {
        const unsigned offset = threadIdx.x * kRejectionRun + i;
        if (first + offset >= vocab) break;
        const double weight = weights(first + offset);
        sum += weight;
        if (weight != 0) positive = kRejectionChunk - offset;
        if (found == kNoToken && weight != 0 && !(sum <= bound)) found = offset;
      }
      found = block_min(found);
      positive = block_min(positive);
      if (here && found != kNoToken) return first + found;
      if (positive != kNoToken) last = first + (kRejectionChunk - positive);
      if (here && positive != kNoToken) return last;
    }
    cumulative += scan.total;
  }
  return last;
}

__global__ void __launch_bounds__(kRejectionThreads) verify_rejection_kernel(VerifyRejectionArgs a) {
  follow_previous_kernels();
  const int64_t row = blockIdx.x;
  const Sequence s{a, row, drafts_of(a.round, row)};
  int64_t accepted = 0, token = 0;
  if (!a.round.finished[row]) {  // its probabilities may hold anything
    Weights next{nullptr, nullptr, 1};
    accepted = a.block ? accept_block(s, next) : accept_standard(s, next);
    double total = total_of(next, a.vocab);
    if (!(total > 0) && next.q) {
      next = {s.p(accepted), nullptr, 1};
      total = total_of(next, a.vocab);
    }
    token = draw(next, s.uniform(accepted, 1), total, a.vocab);
  }
  __syncthreads();  // finished_out may be `finished`
  if (threadIdx.x < 32) emit(a.round, row, accepted, token);
}

}  // namespace lk::cuda
