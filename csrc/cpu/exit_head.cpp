#include <cstring>

#include "cpu/ops.h"
#include "cpu/quantized_panel.h"
#include "cpu/rms_norm_row.h"
#include "cpu/score_filter.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

static_assert(kHeadChunk % kTileRows == 0 && kHeadChunk % kWidth == 0 && kHeadChunk % 4 == 0);

// What one chunk of the vocabulary says about one row.
struct Partial {
  float max;   // of the logits, NaN aside
  float sum;   // of exp(logit - base_of(max)), NaN included
  float best;  // largest score, noise included
  float best_logit;
  int32_t best_token;
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

// `logits` has kHeadChunk elements, filled up with -inf.
LK_INLINE Partial summarise(const ExitHeadArgs& a, int64_t row, int64_t begin, const float* logits) {
  Partial p;
  p.max = max_of_chunk(logits);
  const vf base = set1(base_of(p.max));
  vf sums[2] = {zero(), zero()};
  for (int64_t i = 0; i < kHeadChunk; i += 2 * kWidth)
    for (int j = 0; j < 2; ++j) sums[j] = add(sums[j], exp(sub(load(logits + i + j * kWidth), base)));
  p.sum = sum(add(sums[0], sums[1]));

  int64_t index;
  if (is_sampled(a, row) && !needs_filter(a, row)) {
    float scores[kHeadChunk], noise[kHeadChunk];
    gumbel_noise<kHeadChunk>(key_of(a, row), begin, noise);
    const vf temperature = set1(a.sampling.temperature[row]), lowest = set1(-kInfinity);
    for (int64_t i = 0; i < kHeadChunk; i += kWidth)
      store(scores + i, add(max(div(load(logits + i), temperature), lowest), load(noise + i)));
    p.best = max_of_chunk(scores);
    index = index_of(scores, p.best);
  } else {
    p.best = p.max;
    index = index_of(logits, p.max);
  }
  p.best_token = int32_t(begin + index);
  p.best_logit = logits[index];
  return p;
}

// One pass over the weights: rows [first, first + m) of the call.
template <class T>
struct Pass {
  const ExitHeadArgs& a;
  int64_t first, m;
  Partial* partials;  // [chunks, m]
  float* memory;      // [m, v]: logits of filtered rows, when there is no logits_out

  // Where a row's logits are kept; null when nobody needs them.
  float* kept_logits(int64_t row) const {
    if (a.logits_out) return a.logits_out + (first + row) * a.logits_stride;
    return memory && needs_filter(a, first + row) ? memory + row * a.v : nullptr;
  }

  template <class Rows>
  void chunk(int64_t index, const Rows& x) const {
    alignas(64) float logits[kMaxPackedRows][kHeadChunk];
    const int64_t begin = index * kHeadChunk;
    const int64_t count = a.v - begin < kHeadChunk ? a.v - begin : kHeadChunk;
    const Matrix lm_head{a.lm_head, a.lm_head_stride, a.v, a.quantization};
    x.panel(lm_head, begin, begin + count, Totals{logits[0], kHeadChunk});
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t left = count - i;
        if (left < kWidth)
          store(logits[row] + i, logits_of<T>(a, load(logits[row] + i, left), begin + i, left), left);
        else
          store(logits[row] + i, logits_of<T>(a, load(logits[row] + i), begin + i, left));
      }
      if (a.penalty.factor) penalize(a.penalty, first + row, begin, count, logits[row]);
      if (float* kept = kept_logits(row)) std::memcpy(kept + begin, logits[row], size_t(count) * sizeof(float));
      for (int64_t i = count; i < kHeadChunk; ++i) logits[row][i] = -kInfinity;
      partials[index * m + row] = summarise(a, first + row, begin, logits[row]);
    }
  }

  void merge(int64_t row, int64_t chunks) const {
    const Partial* partial = partials + row;
    Partial best = partial[0];
    float max = best.max;
    for (int64_t i = 1; i < chunks; ++i) {
      if (partial[i * m].best > best.best) best = partial[i * m];
      if (partial[i * m].max > max) max = partial[i * m].max;
    }
    double total = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const Partial& p = partial[i * m];
      if (p.sum != 0) total += double(p.sum) * ::exp(double(base_of(p.max)) - double(base_of(max)));
    }
    const int64_t at = first + row;
    int64_t token = best.best_token;
    float logit = best.best_logit;
    if (needs_filter(a, at)) {
      const float* logits = kept_logits(row);
      token = draw_filtered(a.sampling, at, {logits, a.v, a.sampling.temperature[at]}, key_of(a, at));
      logit = logits[token];
    }
    const float log_sum = float(double(base_of(max)) + ::log(total));
    a.token[at] = token;
    a.logprob[at] = logit - log_sum;
    a.confidence[at] = ::expf(max - log_sum);
  }
};

template <class T, class Rows>
void run_passes(const ExitHeadArgs& a, Rows rows) {
  const int64_t most = rows.m;
  const int64_t chunks = (a.v + kHeadChunk - 1) / kHeadChunk;
  const SamplingArgs& s = a.sampling;
  const bool needs_memory = s.temperature && (s.top_k || s.top_p || s.min_p) && !a.logits_out;
  T* normed = static_cast<T*>(workspace(Workspace::linear_norm, size_t(a.c) * sizeof(T)));
  Partial* partials =
      static_cast<Partial*>(workspace(Workspace::head_partials, size_t(chunks * most) * sizeof(Partial)));
  float* memory = needs_memory
                      ? static_cast<float*>(workspace(Workspace::head_logits, size_t(most * a.v) * sizeof(float)))
                      : nullptr;
  for (int64_t first = 0; first < a.n; first += kMaxPackedRows) {
    rows.m = a.n - first < kMaxPackedRows ? a.n - first : kMaxPackedRows;
    for (int64_t row = 0; row < rows.m; ++row) {
      const T* x = static_cast<const T*>(a.hidden) + (first + row) * a.hidden_stride;
      rms_norm_row(x, static_cast<const T*>(a.norm_weight), a.eps, normed, a.c);
      rows.pack(row, normed);
    }
    const Pass<T> pass{a, first, rows.m, partials, memory};
    auto chunk = [&](int64_t index) { pass.chunk(index, rows); };
    parallel_for(a.num_threads, chunks, chunk);
    auto merge = [&](int64_t row) { pass.merge(row, chunks); };
    parallel_for(a.num_threads, rows.m, merge);
  }
}

template <class T>
void run(const ExitHeadArgs& a) {
  const int64_t most = a.n < kMaxPackedRows ? a.n : kMaxPackedRows;
  if (a.quantization.bits) return run_passes<T>(a, QuantizedRows(most, a.c, a.quantization.bits));
  run_passes<T>(a, DenseRows<T>(most, a.c));
}

}  // namespace

void exit_head(const ExitHeadArgs& args) {
  if (args.n == 0) return;
  switch (args.dtype) {
    case DType::f32: return run<float>(args);
    case DType::f16: return run<f16>(args);
    case DType::bf16: return run<bf16>(args);
  }
}

}  // namespace lk::LK_VARIANT
