// exit_head: final norm, LM head and choice of the token.
//
//   normed   = rms_norm(hidden, norm_weight, eps)                            (bits of the op of that name)
//   logits   = softcap * tanh(logit_scale * (normed . lm_head + bias) / softcap), float32
//   penalty  logits of seen tokens: divided by the row's factor where positive, multiplied by it where negative
//   greedy   token = argmax(logits), the lowest index among equals
//   sampled  token = argmax(filtered(logits / temperature) + Gumbel noise); filters as in reference/exit_head.py
//   logprob, confidence: log-probability of the token and largest probability of softmax(logits)
//
// NaN counts as -inf in the choice; logprob and confidence are NaN then. The dot products are summed like small_linear's,
// the softmax over chunks of kHeadChunk tokens, merged in rising order.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/quantization.h"

namespace lk {

constexpr int64_t kHeadChunk = 192;  // tokens; a task, a multiple of 4 and of every vector and tile

// Null tensors switch a filter (or the stream) off.
struct SamplingArgs {
  const float* temperature;  // [n]; 0: the row is greedy. Null: every row is
  const int64_t* seed;       // [n]
  const int64_t* position;   // [n]
  const int64_t* stream;     // [n]
  const int64_t* top_k;      // [n]; 0: off
  const float* top_p;        // [n]; 1: off
  const float* min_p;        // [n]; 0: off
};

struct PenaltyArgs {
  const float* factor;  // [n], above 0. Null: no penalty
  const uint8_t* first_seen;  // [n / share, v]: position from which on a token is seen; 255: never
  int64_t first_seen_stride;
  const uint8_t* position;  // [n], below 255
  int64_t share;            // rows in a row of n that share a row of first_seen
};

// A quantized copy of lm_head, read in its place. It names the few tokens whose rows of lm_head are read as well.
struct ScreenArgs {
  const void* weight;  // [v, c] as `quantization` says. Null: no screen
  int64_t stride;      // bytes
  Quantization quantization;
  // [v]: times the norm of a normed row, at least what separates its product with the copy from that with lm_head, both
  // as computed. All tokens that could be the largest are looked at again, so the token is that of lm_head.
  // Null: the kRescored largest are.
  const float* error;
};
constexpr int kRescored = 16;

struct ExitHeadArgs {
  const void* hidden;  // [n, c], rows hidden_stride elements apart
  int64_t hidden_stride;
  const void* norm_weight;  // [c]
  float eps;
  const void* lm_head;  // [v, c]; see `quantization`
  int64_t lm_head_stride;
  const void* bias;  // [v] or null
  float logit_scale;
  float softcap;  // 0: no cap
  PenaltyArgs penalty;
  SamplingArgs sampling;
  float* logits_out;  // [n, v] or null
  int64_t logits_stride;
  int64_t* token;     // out [n]
  float* logprob;     // out [n]
  float* confidence;  // out [n]
  int64_t n, c, v;
  DType dtype;  // of hidden, norm_weight, lm_head, bias
  int num_threads;
  Quantization quantization = {};  // of lm_head
  ScreenArgs screen = {};
};

}  // namespace lk
