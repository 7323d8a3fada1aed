// verify_rejection: speculative sampling by rejection, `standard` (Leviathan et al., arXiv 2211.17192, algorithm 1) or
// `block` (Sun et al., arXiv 2403.10444, algorithm 2). With q and p the draft's and the target's probabilities:
//
//   next token   first index whose cumulative weight exceeds uniform * total; the weights are max(r * p - q, 0), or p
//                after every draft was accepted and where nothing is left over. Sums are float64 in index order.
//
// A draft outside [0, vocab) has target probability 0.
#pragma once

#include <cstdint>

#include "cpu/verify_emit.h"

namespace lk {

struct VerifyRejectionArgs {
  VerifyRound round;
  const float* draft_probs;  // [batch, drafts, vocab]
  int64_t draft_probs_stride[2];
  const float* target_probs;  // [batch, drafts + 1, vocab]
  int64_t target_probs_stride[2];
  const float* uniforms;  // [batch, drafts + 1, 2]: acceptance, next token
  int64_t uniforms_stride[2];
  int64_t vocab;
  bool block;
  int num_threads;
};

}  // namespace lk
