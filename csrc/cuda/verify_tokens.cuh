// verify_tokens: a warp per sequence, a lane per draft.
//
// Bound by latency: 24 (K + 1) bytes per sequence. Expected on an H100, estimates: 2 us for b = 1, K = 6 and for b = 64,
// K = 12 alike, what a launch costs.
#pragma once

#include "cuda/verify_emit.cuh"

namespace lk::cuda {

constexpr int kVerifyThreads = 32;

__global__ void __launch_bounds__(kVerifyThreads) verify_tokens_kernel(VerifyTokensArgs a) {
  follow_previous_kernels();
  const int64_t row = blockIdx.x, drafts = drafts_of(a.round, row);
  const int64_t* draft = a.round.draft + row * a.round.draft_stride;
  const int64_t* target = a.target + row * a.target_stride;
  int64_t accepted = 0;
  for (; accepted < drafts; accepted += 32) {
    const int64_t i = accepted + threadIdx.x;
    const unsigned wrong = __ballot_sync(kAllLanes, i >= drafts || draft[i] != target[i]);
    if (wrong) {
      accepted += __ffs(wrong) - 1;
      break;
    }
  }
  emit(a.round, row, accepted, target[accepted]);
}

}  // namespace lk::cuda
