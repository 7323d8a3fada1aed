// What a row of logits says: penalty, scores, and what a chunk of the vocabulary adds to the row's answer.
#pragma once

#include <cstring>

#include "cpu/exit_head.h"
#include "cpu/score_filter.h"

namespace lk::LK_VARIANT {

// What one chunk of the vocabulary says about one row.
struct Partial {
  float max;   // of the logits, NaN aside
  float sum;   // of exp(logit - base_of(max)), NaN included
  float best;  // largest score, noise included
  float best_logit;
  int32_t best_token;
  float upper;  // what no score as lm_head gives it exceeds; of screens with errors only
};

// What the sums of exponentials are relative to. exp(inf - inf) would be NaN.
LK_INLINE float base_of(float max) { return max == kInfinity || max == -kInfinity ? 0 : max; }

LK_INLINE bool is_sampled(const ExitHeadArgs& a, int64_t row) {
  return a.sampling.temperature && a.sampling.temperature[row] != 0;
}
LK_INLINE bool needs_filter(const ExitHeadArgs& a, int64_t row) {
  return is_sampled(a, row) && is_filtered(a.sampling, row, a.v);
}
LK_INLINE NoiseKey key_of(const ExitHeadArgs& a, int64_t row) {
  return noise_key(a.sampling.seed[row], a.sampling.stream ? a.sampling.stream[row] : 0, a.sampling.position[row]);
}

// dots -> logits
template <class T>
LK_INLINE vf logits_of(const ExitHeadArgs& a, vf dots, int64_t token, int64_t count) {
  if (a.bias) {
    const T* bias = static_cast<const T*>(a.bias) + token;
    dots = add(dots, count < kWidth ? load(bias, count) : load(bias));
  }
  dots = mul(dots, set1(a.logit_scale));
  if (a.softcap == 0) return dots;
  const vf cap = set1(a.softcap);
  return mul(cap, tanh(div(dots, cap)));
}

// Penalty on the logits of `count` tokens from `begin` on. Most are never seen, which eight bytes at once tell.
LK_INLINE void penalize(const PenaltyArgs& penalty, int64_t row, int64_t begin, int64_t count, float* logits) {
  const float factor = penalty.factor[row];
  const uint8_t* first_seen = penalty.first_seen + row / penalty.share * penalty.first_seen_stride + begin;
  const uint8_t position = penalty.position[row];
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, first_seen + i, sizeof eight);
    if (eight == ~uint64_t{0}) continue;
    for (int64_t j = i; j < i + 8; ++j)
      if (first_seen[j] <= position) logits[j] = logits[j] < 0 ? logits[j] * factor : logits[j] / factor;
  }
  for (; i < count; ++i)
    if (first_seen[i] <= position) logits[i] = logits[i] < 0 ? logits[i] * factor : logits[i] / factor;
}

// Index of the first score equal to `max`, the chunk's largest; 0 when there is none but NaN.
LK_INLINE int64_t index_of(const float* scores, float max) {
  if (max == -kInfinity) return 0;
  int64_t i = 0;
  while (scores[i] != max) ++i;
  return i;
}

// The scores of a chunk of logits, both of kHeadChunk elements, without filters; `noise` receives what was added.
LK_INLINE void scores_of(const ExitHeadArgs& a, int64_t row, int64_t begin, const float* logits, float* scores,
                         float* noise) {
  gumbel_noise<kHeadChunk>(key_of(a, row), begin, noise);
  const vf temperature = set1(a.sampling.temperature[row]), lowest = set1(-kInfinity);
  for (int64_t i = 0; i < kHeadChunk; i += kWidth)
    store(scores + i, add(max(div(load(logits + i), temperature), lowest), load(noise + i)));
}

// At most how far the score of a screened row may be from what lm_head itself gives: the screen's error carried through
// what becomes of the product, whose slope is at most 1 / temperature times the penalty, and what the few operations
// after the product round, generously.
struct Doubt {
  float per_error, per_logit, constant;
  Doubt(const ExitHeadArgs& a, int64_t row, float x_norm) {
    const float factor = a.penalty.factor ? a.penalty.factor[row] : 1;
    float slope = factor < 1 ? 1 / factor : factor;
    if (is_sampled(a, row)) slope /= a.sampling.temperature[row];
    per_error = 1.01f * x_norm * a.logit_scale * slope;
    per_logit = 0x1p-18f * slope;
    constant = a.softcap * per_logit + 0x1p-15f;
  }
  inline __attribute__((always_inline)) vf of(vf error, vf logit) const {
    const vf size = max(logit, sub(zero(), logit));
    return fma(error, set1(per_error), fma(size, set1(per_logit), set1(constant)));
  }
};

// `logits` has kHeadChunk elements, filled up with -inf. With a screen that has errors, x_norm is that of the row.
LK_INLINE Partial summarise(const ExitHeadArgs& a, int64_t row, int64_t begin, const float* logits, const float* x_norm) {
  Partial p;
  p.max = max_of_chunk(logits);
  const vf base = set1(base_of(p.max));
  vf sums[2] = {zero(), zero()};
  for (int64_t i = 0; i < kHeadChunk; i += 2 * kWidth)
    for (int j = 0; j < 2; ++j) sums[j] = add(sums[j], exp(sub(load(logits + i + j * kWidth), base)));
  p.sum = sum(add(sums[0], sums[1]));

  float memory[kHeadChunk], noise[kHeadChunk];
  const float* scores = logits;
  if (is_sampled(a, row) && !needs_filter(a, row)) {
    scores_of(a, row, begin, logits, memory, noise);
    scores = memory;
  }
  p.best = scores == logits ? p.max : max_of_chunk(scores);
  const int64_t index = index_of(scores, p.best);
  p.best_token = int32_t(begin + index);
  p.best_logit = logits[index];
  if (x_norm) {
    const Doubt doubt(a, row, *x_norm);
    vf upper = set1(-kInfinity);
    for (int64_t i = 0; i < kHeadChunk; i += kWidth) {
      const int64_t left = a.v - begin - i;
      if (left <= 0) break;
      const vf error = left < kWidth ? load(a.screen.error + begin + i, left) : load(a.screen.error + begin + i);
      const vf logit = load(logits + i);
      upper = max(add(load(scores + i), doubt.of(error, logit)), upper);
    }
    p.upper = max_of(upper);
  }
  return p;
}

}  // namespace lk::LK_VARIANT
