#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/variant.h"

namespace lk::LK_VARIANT {
namespace {

struct Sequence {
  const VerifyRejectionArgs& args;
  int64_t row, drafts;

  const float* q(int64_t i) const {
    return args.draft_probs + row * args.draft_probs_stride[0] + i * args.draft_probs_stride[1];
  }
  const float* p(int64_t i) const {
    return args.target_probs + row * args.target_probs_stride[0] + i * args.target_probs_stride[1];
  }
  double uniform(int64_t i, int which) const {
    return args.uniforms[row * args.uniforms_stride[0] + i * args.uniforms_stride[1] + which];
  }
  int64_t draft(int64_t i) const { return args.round.draft[row * args.round.draft_stride + i]; }
  bool known(int64_t token) const { return token >= 0 && token < args.vocab; }
};

// max(ratio * p - q, 0), or p when there is no q. NaN stays NaN.
struct Weights {
  const float* p;
  const float* q;
  double ratio;
  double operator()(int64_t i) const {
    if (!q) return p[i];
    const double left = ratio * double(p[i]) - double(q[i]);
    return left < 0 ? 0 : left;
  }
};

LK_INLINE double total_of(const Weights& weights, int64_t vocab) {
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) total += weights(i);
  return total;
}

// The accepted length, and the weights of the next token.
LK_INLINE int64_t accept_standard(const Sequence& s, Weights& next) {
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

LK_INLINE int64_t accept_block(const Sequence& s, Weights& next) {
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

// First index whose cumulative weight exceeds uniform * total; always one of a weight that is not zero, if there is one.
LK_INLINE int64_t draw(const Weights& weights, double uniform, double total, int64_t vocab) {
  const double bound = uniform * total;
  double cumulative = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double weight = weights(i);
    cumulative += weight;
    if (weight != 0) last = i;
    if (!(cumulative <= bound)) return i;
  }
  return last;
}

LK_INLINE void verify(const VerifyRejectionArgs& args, int64_t row) {
  const Sequence s{args, row, drafts_of(args.round, row)};
  Weights next{nullptr, nullptr, 1};
  const int64_t accepted = args.block ? accept_block(s, next) : accept_standard(s, next);
  double total = total_of(next, args.vocab);
  if (!(total > 0) && next.q) {
    next = {s.p(accepted), nullptr, 1};
    total = total_of(next, args.vocab);
  }
  emit(args.round, row, accepted, draw(next, s.uniform(accepted, 1), total, args.vocab));
}

}  // namespace

void verify_rejection(const VerifyRejectionArgs& args) {
  auto task = [&](int64_t row) { verify(args, row); };
  parallel_for(args.num_threads, args.round.batch, task);
}

}  // namespace lk::LK_VARIANT
