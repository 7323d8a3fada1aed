// The last step of verify_tokens and verify_rejection, one warp per sequence: cutting what it emits.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

// How many drafts of the sequence are real.
__device__ __forceinline__ int64_t drafts_of(const VerifyRound& a, int64_t row) {
  return max(int64_t(0), min(int64_t(a.num_draft[row]), a.drafts));
}

__device__ __forceinline__ bool ends_sequence(const VerifyRound& a, int64_t token) {
  for (int64_t i = 0; i < a.num_eos; ++i)
    if (a.eos_ids[i] == token) return true;
  return false;
}

// Emits `accepted` drafts and then `last`, cut after the first EOS and at `remaining`; nothing for a finished sequence.
__device__ __forceinline__ void emit(const VerifyRound& a, int64_t row, int64_t accepted, int64_t last) {
  const int lane = threadIdx.x % 32;
  const int64_t* draft = a.draft + row * a.draft_stride;
  int64_t* tokens = a.tokens + row * a.tokens_stride;
  const bool finished = a.finished[row];
  const int64_t remaining = a.remaining[row];
  int64_t emitted = finished ? 0 : max(int64_t(0), min(accepted + 1, remaining));
  bool eos = false;
  for (int64_t first = 0; first < emitted; first += 32) {
    const int64_t i = first + lane;
    const bool ends = i < emitted && ends_sequence(a, i < accepted ? draft[i] : last);
    const unsigned found = __ballot_sync(kAllLanes, ends);
    if (found) {
      emitted = first + __ffs(found);
      eos = true;
      break;
    }
  }
  for (int64_t i = lane; i <= a.drafts; i += 32) tokens[i] = i < emitted ? (i < accepted ? draft[i] : last) : -1;
  __syncwarp();  // finished_out may be `finished`
  if (lane == 0) {
    a.num_emitted[row] = int32_t(emitted);
    a.num_accepted[row] = int32_t(min(accepted, emitted));
    a.finished_out[row] = finished || eos || emitted >= remaining;
  }
}

}  // namespace lk::cuda
