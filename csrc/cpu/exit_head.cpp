#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/head_scores.h"
#include "cpu/ops.h"
#include "cpu/quantized_panel.h"
#include "cpu/rms_norm_row.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

static_assert(kHeadChunk % DenseRows<bf16>::kTileRows == 0 && kHeadChunk % QuantizedRows::kTileRows == 0 &&
              kHeadChunk % kWidth == 0 && kHeadChunk % 4 == 0);

// A token whose row of lm_head a screened row is asked about.
struct Candidate {
  float score, noise;
  int32_t token;
};
constexpr int kMostCandidates = kRescored * kHeadChunk;

// The kRescored best of `found`, the lower tokens among equals, come first; returns how many there are.
inline int keep_best(Candidate* found, int count) {
  const int kept = count < kRescored ? count : kRescored;
  std::partial_sort(found, found + kept, found + count, [](const Candidate& x, const Candidate& y) {
    return x.score > y.score || (x.score == y.score && x.token < y.token);
  });
  return kept;
}

// One pass over a head's weights: rows [first, first + m) of the call.
template <class T>
struct Pass {
  const ExitHeadArgs& a;
  Matrix head;  // lm_head, or the screen
  bool screened;
  int64_t first, m;
  const T* normed;       // [m, c]
  const float* x_norms;  // [m]; null but for a screen with errors
  Partial* partials;     // [chunks, m]
  float* memory;         // [m, v]: logits of filtered or screened rows, when there is no logits_out

  int64_t chunks() const { return (a.v + kHeadChunk - 1) / kHeadChunk; }

  // Where a row's logits are kept; null when nobody needs them.
  float* kept_logits(int64_t row) const {
    if (a.logits_out) return a.logits_out + (first + row) * a.logits_stride;
    return memory && (screened || needs_filter(a, first + row)) ? memory + row * a.v : nullptr;
  }

  template <class Rows>
  void chunk(int64_t index, const Rows& x) const {
    alignas(64) float logits[kMaxPackedRows][kHeadChunk];
    const int64_t begin = index * kHeadChunk;
    const int64_t count = a.v - begin < kHeadChunk ? a.v - begin : kHeadChunk;
    x.panel(head, begin, begin + count, Totals{logits[0], kHeadChunk});
    for (int64_t row = 0; row < m; ++row) {
      finish(row, begin, count, logits[row]);
      if (float* kept = kept_logits(row)) std::memcpy(kept + begin, logits[row], size_t(count) * sizeof(float));
      for (int64_t i = count; i < kHeadChunk; ++i) logits[row][i] = -kInfinity;
      partials[index * m + row] = summarise(a, first + row, begin, logits[row], x_norms ? x_norms + row : nullptr);
    }
  }

  // Dots of `count` tokens from `begin` on -> their logits.
  void finish(int64_t row, int64_t begin, int64_t count, float* logits) const {
    for (int64_t i = 0; i < count; i += kWidth) {
      const int64_t left = count - i;
      if (left < kWidth)
        store(logits + i, logits_of<T>(a, load(logits + i, left), begin + i, left), left);
      else
        store(logits + i, logits_of<T>(a, load(logits + i), begin + i, left));
    }
    if (a.penalty.factor) penalize(a.penalty, first + row, begin, count, logits);
  }

  struct Sums {
    Partial best;
    float max;
    double total;  // of exp(logit - base_of(max))
  };
  Sums merge(int64_t row) const {
    const Partial* partial = partials + row;
    const int64_t n = chunks();
    Sums s{partial[0], partial[0].max, 0};
    for (int64_t i = 1; i < n; ++i) {
      if (partial[i * m].best > s.best.best) s.best = partial[i * m];
      if (partial[i * m].max > s.max) s.max = partial[i * m].max;
    }
    for (int64_t i = 0; i < n; ++i) {
      const Partial& p = partial[i * m];
      if (p.sum != 0) s.total += double(p.sum) * ::exp(double(base_of(p.max)) - double(base_of(s.max)));
    }
    return s;
  }

  void choose(int64_t row) const {
    const Sums s = merge(row);
    if (needs_filter(a, first + row)) return draw(row, s);
    answer(row, s, s.best.best_token, s.best.best_logit);
  }
  void draw(int64_t row, const Sums& s) const {
    const int64_t at = first + row;
    const float* logits = kept_logits(row);
    const int64_t token = draw_filtered(a.sampling, at, {logits, a.v, a.sampling.temperature[at]}, key_of(a, at));
    answer(row, s, token, logits[token]);
  }
  void answer(int64_t row, const Sums& s, int64_t token, float logit) const {
    const float log_sum = float(double(base_of(s.max)) + ::log(s.total));
    a.token[first + row] = token;
    a.logprob[first + row] = logit - log_sum;
    a.confidence[first + row] = ::expf(s.max - log_sum);
  }

  // The logits and scores of a chunk whose logits were kept; returns how many there are.
  int64_t load_chunk(int64_t row, int64_t begin, float* logits, float* scores, float* noise) const {
    const int64_t count = a.v - begin < kHeadChunk ? a.v - begin : kHeadChunk;
    std::memcpy(logits, kept_logits(row) + begin, size_t(count) * sizeof(float));
    for (int64_t i = count; i < kHeadChunk; ++i) logits[i] = -kInfinity;
    if (is_sampled(a, first + row) && !needs_filter(a, first + row)) {
      scores_of(a, first + row, begin, logits, scores, noise);
    } else {
      std::memcpy(scores, logits, kHeadChunk * sizeof(float));
      std::memset(noise, 0, kHeadChunk * sizeof(float));
    }
    return count;
  }

  // Every token whose score, raised by its doubt, reaches that of the best one, lowered by its own: the answer of lm_head
  // is among them. Returns how many there are, 0 for too many or where something is not a finite number.
  int all_candidates(int64_t row, const Sums& s, Candidate* found) const {
    const Doubt doubt(a, first + row, x_norms[row]);
    const float* error = a.screen.error;
    const float reached =
        s.best.best - max_of(doubt.of(set1(error[s.best.best_token]), set1(s.best.best_logit)));
    if (!__builtin_isfinite(s.max) || !__builtin_isfinite(s.total) || !__builtin_isfinite(reached) || !(x_norms[row] > 1e-10f)) return 0;
    int n = 0;
    for (int64_t index = 0; index < chunks(); ++index) {
      const float upper = partials[index * m + row].upper;
      if (!(upper < kInfinity)) return 0;
      if (upper < reached) continue;
      float logits[kHeadChunk], scores[kHeadChunk], noise[kHeadChunk];
      const int64_t begin = index * kHeadChunk, count = load_chunk(row, begin, logits, scores, noise);
      for (int64_t i = 0; i < count; ++i) {
        if (scores[i] + max_of(doubt.of(set1(error[begin + i]), set1(logits[i]))) < reached) continue;
        if (n == kMostCandidates) return 0;
        found[n++] = {scores[i], noise[i], int32_t(begin + i)};
      }
    }
    return n;
  }

  // The kRescored tokens of largest score.
  int best_candidates(int64_t row, Candidate* found) const {
    // The largest chunks, the smallest of them in front: what is below it, is below as many scores.
    float largest[kRescored];
    for (float& score : largest) score = -kInfinity;
    const auto greater = [](float x, float y) { return x > y; };  // std::greater's instances would be all variants'
    for (int64_t index = 0; index < chunks(); ++index) {
      const float best = partials[index * m + row].best;
      if (!(best > largest[0])) continue;
      std::pop_heap(largest, largest + kRescored, greater);
      largest[kRescored - 1] = best;
      std::push_heap(largest, largest + kRescored, greater);
    }
    int n = 0;
    for (int64_t index = 0; index < chunks(); ++index) {
      if (partials[index * m + row].best < largest[0]) continue;
      float logits[kHeadChunk], scores[kHeadChunk], noise[kHeadChunk];
      const int64_t begin = index * kHeadChunk, count = load_chunk(row, begin, logits, scores, noise);
      for (int64_t i = 0; i < count; ++i) {
        if (!(scores[i] >= largest[0])) continue;
        if (n == kMostCandidates) n = keep_best(found, n);
        found[n++] = {scores[i], noise[i], int32_t(begin + i)};
      }
    }
    return keep_best(found, n);
  }

  // As choose(), for a screened row: the candidates' logits as lm_head gives them. False where lm_head has to be read.
  // `x`: all rows, packed for lm_head; a few dot products too many, and no memory of the choosing thread.
  template <class Rows>
  bool choose_screened(int64_t row, const Matrix& lm_head, const Rows& x) const {
    const Sums s = merge(row);
    Candidate found[kMostCandidates];
    const int n = x_norms ? all_candidates(row, s, found) : best_candidates(row, found);
    if (x_norms && n == 0) return false;
    const bool filtered = needs_filter(a, first + row);
    const float temperature = is_sampled(a, first + row) && !filtered ? a.sampling.temperature[first + row] : 1;
    float logits[kMaxPackedRows], best = -kInfinity, best_logit = s.best.best_logit;
    int64_t token = s.best.best_token;
    for (int i = 0; i < n; ++i) {
      const int64_t candidate = found[i].token;
      x.panel(lm_head, candidate, candidate + 1, Totals{logits, 1});
      float& logit = logits[row];
      finish(row, candidate, 1, &logit);
      kept_logits(row)[candidate] = logit;
      const float score = logit / temperature + found[i].noise;
      if (score > best || (score == best && candidate < token)) best = score, best_logit = logit, token = candidate;
    }
    if (filtered)
      draw(row, s);
    else
      answer(row, s, token, best_logit);
    return true;
  }
};

// Reads `head` for rows [first, first + rows.m): the pass, ready to choose.
template <class T, class Rows>
Pass<T> read(const ExitHeadArgs& a, const Matrix& head, bool screened, int64_t first, Rows rows) {
  const int64_t m = rows.m, chunks = (a.v + kHeadChunk - 1) / kHeadChunk;
  const SamplingArgs& s = a.sampling;
  const bool keeps = screened || (s.temperature && (s.top_k || s.top_p || s.min_p));
  T* normed = static_cast<T*>(workspace(Workspace::linear_norm, size_t(m * a.c) * sizeof(T)));
  float* x_norms = nullptr;
  if (screened && a.screen.error)
    x_norms = static_cast<float*>(workspace(Workspace::head_x_norms, size_t(m) * sizeof(float)));
  Partial* partials =
      static_cast<Partial*>(workspace(Workspace::head_partials, size_t(chunks * m) * sizeof(Partial)));
  float* memory = nullptr;
  if (keeps && !a.logits_out)
    memory = static_cast<float*>(workspace(Workspace::head_logits, size_t(m * a.v) * sizeof(float)));
  for (int64_t row = 0; row < m; ++row) {
    const T* x = static_cast<const T*>(a.hidden) + (first + row) * a.hidden_stride;
    rms_norm_row(x, static_cast<const T*>(a.norm_weight), a.eps, normed + row * a.c, a.c);
    if (x_norms) x_norms[row] = sqrtf(float(a.c)) / inverse_rms(normed + row * a.c, a.c, 0);
  }
  pack_all(rows, normed, a.c);
  const Pass<T> pass{a, head, screened, first, m, normed, x_norms, partials, memory};
  auto chunk = [&](int64_t index) { pass.chunk(index, rows); };
  parallel_for(a.num_threads, chunks, chunk);
  return pass;
}

// `rows(m)`: memory for m packed rows of products with lm_head.
template <class T, class MakeRows>
void run(const ExitHeadArgs& a, const MakeRows& rows) {
  const Matrix lm_head{a.lm_head, a.lm_head_stride, a.v, a.quantization};
  const Matrix screen{a.screen.weight, a.screen.stride, a.v, a.screen.quantization};
  bool screened = a.screen.weight && !(a.screen.error && a.logits_out);
  for (int64_t row = 0; row < a.n && a.screen.error; ++row) screened = screened && !needs_filter(a, row);
  for (int64_t first = 0; first < a.n; first += kMaxPackedRows) {
    const int64_t m = a.n - first < kMaxPackedRows ? a.n - first : kMaxPackedRows;
    std::atomic<bool> certain{screened};
    if (screened) {
      const Pass<T> pass = read<T>(a, screen, true, first, QuantizedRows(m, a.c));
      auto exact = rows(m, Workspace::head_x);
      pack_all(exact, pass.normed, a.c);
      auto choose = [&](int64_t row) {
        if (!pass.choose_screened(row, lm_head, exact)) certain = false;
      };
      parallel_for(a.num_threads, m, choose);
    }
    if (certain) continue;
    const Pass<T> pass = read<T>(a, lm_head, false, first, rows(m, Workspace::linear_x));
    auto choose = [&](int64_t row) { pass.choose(row); };
    parallel_for(a.num_threads, m, choose);
  }
}

template <class T>
void run(const ExitHeadArgs& a) {
  if (a.quantization.bits)
    run<T>(a, [&](int64_t m, Workspace use) { return QuantizedRows(m, a.c, use); });
  else
    run<T>(a, [&](int64_t m, Workspace use) { return DenseRows<T>(m, a.c, use); });
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
