// Drawing from a row of logits in memory under top-k, top-p and min-p (reference/exit_head.py). What a filter keeps is
// everything from a threshold on, found by counting in three levels of bins over the floats' ordered bits, not by sorting.
#pragma once

#include "cpu/exit_head.h"
#include "cpu/gumbel.h"

namespace lk::LK_VARIANT {

constexpr float kInfinity = __builtin_inff();

// Unsigned integers in the order of the floats.
LK_INLINE uint32_t ordered(float value) {
  const uint32_t bits = float_bits(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
LK_INLINE float from_ordered(uint32_t key) { return float_from_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

// One row's scores: logits / temperature, NaN as -inf.
struct ScoreRow {
  const float* logits;
  int64_t vocab;
  float temperature;

  // The scores of a chunk, filled up with -inf; returns how many there are.
  inline __attribute__((always_inline)) int64_t chunk(int64_t begin, float* scores) const {
    const int64_t count = vocab - begin < kHeadChunk ? vocab - begin : kHeadChunk;
    const vf divisor = set1(temperature), lowest = set1(-kInfinity);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(scores + i, max(div(load(logits + begin + i), divisor), lowest));
    if (i < count) store(scores + i, max(div(load(logits + begin + i, count - i), divisor), lowest));
    for (i = count; i < kHeadChunk; ++i) scores[i] = -kInfinity;
    return count;
  }
};

LK_INLINE float max_of_chunk(const float* scores) {
  vf best = set1(-kInfinity);  // of a pair with a NaN, max() returns the second
  for (int64_t i = 0; i < kHeadChunk; i += kWidth) best = max(load(scores + i), best);
  return max_of(best);
}

// weights = exp(scores - top)
LK_INLINE void exp_of_chunk(const float* scores, float top, float* weights) {
  for (int64_t i = 0; i < kHeadChunk; i += kWidth) store(weights + i, exp(sub(load(scores + i), set1(top))));
}

// Sum of exp(score - top) over the scores from `threshold` on.
static float total_weight(const ScoreRow& row, float top, float threshold) {
  float scores[kHeadChunk], weights[kHeadChunk];
  double total = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kHeadChunk) {
    const int64_t count = row.chunk(begin, scores);
    exp_of_chunk(scores, top, weights);
    for (int64_t i = 0; i < count; ++i)
      if (scores[i] >= threshold) total += weights[i];
  }
  return float(total);
}

struct Bins {
  static constexpr int kBits[3] = {11, 11, 10};
  uint32_t prefix = 0, mask = 0;  // of the keys that are still candidates
  int shift = 32, width = 0;

  inline __attribute__((always_inline)) void next_level(int level) {
    width = kBits[level];
    shift -= width;
  }
  inline __attribute__((always_inline)) bool holds(uint32_t key) const { return (key & mask) == prefix; }
  inline __attribute__((always_inline)) uint32_t of(uint32_t key) const { return key >> shift & ((1u << width) - 1); }
  inline __attribute__((always_inline)) void enter(uint32_t bin) {
    prefix |= bin << shift;
    mask |= 0xffffffffu << shift;
  }
};

// The k-th largest score, 1 <= k <= vocab.
static float kth_largest(const ScoreRow& row, int64_t k) {
  float scores[kHeadChunk];
  int32_t counts[2048];
  Bins bins;
  for (int level = 0; level < 3; ++level) {
    bins.next_level(level);
    memset(counts, 0, sizeof counts);
    for (int64_t begin = 0; begin < row.vocab; begin += kHeadChunk) {
      const int64_t count = row.chunk(begin, scores);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t key = ordered(scores[i]);
        if (bins.holds(key)) ++counts[bins.of(key)];
      }
    }
    int bin = 2047;
    for (; bin > 0 && counts[bin] < k; --bin) k -= counts[bin];
    bins.enter(uint32_t(bin));
  }
  return from_ordered(bins.prefix);
}

// The lowest of the scores from `kept` on that less than `p` of the probability lies above; the highest has nothing above.
static float nucleus(const ScoreRow& row, float top, float kept, double p) {
  float scores[kHeadChunk], weights[kHeadChunk];
  double masses[2048];
  bool present[2048];
  const float total = total_weight(row, top, kept);
  double above = 0;
  Bins bins;
  for (int level = 0; level < 3; ++level) {
    bins.next_level(level);
    memset(masses, 0, sizeof masses);
    memset(present, 0, sizeof present);
    for (int64_t begin = 0; begin < row.vocab; begin += kHeadChunk) {
      const int64_t count = row.chunk(begin, scores);
      exp_of_chunk(scores, top, weights);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t key = ordered(scores[i]);
        if (!bins.holds(key) || scores[i] < kept) continue;
        const uint32_t bin = bins.of(key);
        masses[bin] += double(weights[i] / total);
        present[bin] = true;
      }
    }
    int found = -1;
    double above_found = above;
    for (int bin = 2047; bin >= 0; --bin) {
      if (!present[bin]) continue;
      if (found >= 0 && !(above < p)) break;
      found = bin;
      above_found = above;
      above += masses[bin];
    }
    above = above_found;
    bins.enter(uint32_t(found));
  }
  return from_ordered(bins.prefix);
}

LK_INLINE bool is_filtered(const SamplingArgs& s, int64_t row, int64_t vocab) {
  return (s.top_k && s.top_k[row] > 0 && s.top_k[row] < vocab) || (s.top_p && s.top_p[row] < 1) ||
         (s.min_p && s.min_p[row] > 0);
}

// The row's token: argmax of what the filters keep, plus noise.
static int64_t draw_filtered(const SamplingArgs& s, int64_t index, const ScoreRow& row, const NoiseKey& key) {
  float scores[kHeadChunk], weights[kHeadChunk], noise[kHeadChunk];
  float top = -kInfinity;
  int64_t highest = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kHeadChunk) {
    const int64_t count = row.chunk(begin, scores);
    for (int64_t i = 0; i < count; ++i)
      if (scores[i] > top) {
        top = scores[i];
        highest = begin + i;
      }
  }
  if (top == kInfinity || top == -kInfinity) return highest;  // no noise changes that

  float threshold = -kInfinity;
  if (s.top_k && s.top_k[index] > 0 && s.top_k[index] < row.vocab) threshold = kth_largest(row, s.top_k[index]);
  if (s.top_p && s.top_p[index] < 1) threshold = nucleus(row, top, threshold, s.top_p[index]);
  const bool has_min_p = s.min_p && s.min_p[index] > 0;
  const float total = has_min_p ? total_weight(row, top, threshold) : 1;
  const float least = has_min_p ? s.min_p[index] * (1 / total) : 0;

  float best = -kInfinity;
  int64_t token = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kHeadChunk) {
    const int64_t count = row.chunk(begin, scores);
    if (max_of_chunk(scores) < threshold) continue;
    if (has_min_p) exp_of_chunk(scores, top, weights);
    gumbel_noise<kHeadChunk>(key, begin, noise);
    for (int64_t i = 0; i < count; ++i) {
      if (scores[i] < threshold || (has_min_p && weights[i] / total < least)) continue;
      if (scores[i] + noise[i] > best) {
        best = scores[i] + noise[i];
        token = begin + i;
      }
    }
  }
  return token;
}

}  // namespace lk::LK_VARIANT
