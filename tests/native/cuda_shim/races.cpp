// Launches every kernel on small inputs, a std::thread per CUDA thread. Results are the Python tests' business: this is for
// ThreadSanitizer, which reports what two threads do to the same memory without a barrier between.
#include <cstdio>
#include <vector>

#include "common/dtypes.h"
#include "cuda/ops.h"

namespace {

using namespace lk;
using namespace lk::cuda;

int failures = 0;

void check(const char* name, cudaError_t error) {
  std::printf("%s\n", name);
  if (error != cudaSuccess) ++failures;
}

template <class T>
std::vector<T> filled(size_t count) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = from_float<T>(float(int(i * 7 % 13) - 6) / 8);
  return values;
}

template <class T>
void run_products(DType dtype) {
  const int64_t m = 2, c = 40, n = 20;
  std::vector<T> x = filled<T>(m * c), w = filled<T>(n * c), norm = filled<T>(c), out(m * n);
  const LinearWeight weights[] = {{w.data(), c, n, norm.data(), out.data(), n}};
  check("small_linear", small_linear({x.data(), c, m, c, weights, 1, norm.data(), 1e-5f, out.data(), n, false, dtype}, nullptr));
  const LinearWeight gate_and_up[] = {weights[0], weights[0]};
  check("small_linear, gated",
        small_linear({x.data(), c, m, c, gate_and_up, 2, nullptr, 0, nullptr, 0, true, dtype}, nullptr));

  const std::vector<float> temperature(m, 1.0f), top_p(m, 0.7f), min_p(m, 0.05f);
  const std::vector<int64_t> seed(m, 5), top_k(m, 9);
  const std::vector<float> factor(m, 1.2f);
  const std::vector<uint8_t> first_seen(n, 1), window_position{0, 1};
  std::vector<float> logits(m * n), logprob(m), confidence(m);
  std::vector<int64_t> token(m);
  std::vector<char> partials(size_t(m) * 2 * kPartialBytes);
  ExitHeadArgs head{};
  head.hidden = x.data(), head.hidden_stride = c, head.norm_weight = norm.data(), head.eps = 1e-5f;
  head.lm_head = w.data(), head.lm_head_stride = c, head.logit_scale = 1;
  head.penalty = {factor.data(), first_seen.data(), n, window_position.data(), m};
  head.sampling = {temperature.data(), seed.data(), seed.data(), nullptr, top_k.data(), top_p.data(), min_p.data()};
  head.logits = logits.data(), head.logits_stride = n, head.partials = partials.data();
  head.token = token.data(), head.logprob = logprob.data(), head.confidence = confidence.data();
  head.n = m, head.c = c, head.v = n, head.dtype = dtype;
  check("exit_head", exit_head(head, nullptr));
}

// Windows of up to 8 rows fill one warp's query rows, larger ones two.
template <class T>
void run_cache(DType dtype, int64_t t) {
  const int64_t b = 1, h = 4, g = 2, d = 24, s = 160;
  std::vector<T> q = filled<T>(b * t * h * d), k = filled<T>(b * t * g * d), v = k, out(q.size());
  std::vector<T> k_cache = filled<T>(b * g * s * d), v_cache = k_cache;
  std::vector<int32_t> lengths{140}, positions, keep{3}, path;
  for (int i = 0; i < t; ++i) positions.push_back(140 + i), path.push_back(i * 2 % int(t));
  const std::vector<float> inv_freq(d / 2, 0.1f);
  RopeAppendArgs rope{};
  const int64_t outer[3] = {t * h * d, h * d, d}, inner[3] = {t * g * d, g * d, d}, cache[3] = {g * s * d, s * d, d};
  for (int i = 0; i < 3; ++i) {
    rope.q_stride[i] = outer[i], rope.k_stride[i] = rope.v_stride[i] = inner[i];
    rope.k_cache_stride[i] = rope.v_cache_stride[i] = cache[i];
  }
  rope.q = q.data(), rope.k = k.data(), rope.v = v.data(), rope.k_cache = k_cache.data(), rope.v_cache = v_cache.data();
  rope.lengths = lengths.data(), rope.positions = positions.data(), rope.positions_stride = t;
  rope.inv_freq = inv_freq.data(), rope.attention_factor = 1;
  rope.b = b, rope.t = t, rope.h = h, rope.g = g, rope.d = d, rope.dtype = dtype;
  check("rope_append", rope_append(rope, nullptr));

  std::vector<float> scratch(size_t(verify_attention_scratch(b, t, h, g, d, s)) / 4);
  v_cache[142 * d] = from_float<T>(__builtin_inff());  // only some rows see it
  VerifyAttentionArgs attention{};
  for (int i = 0; i < 3; ++i) {
    attention.q_stride[i] = attention.out_stride[i] = outer[i];
    attention.k_cache_stride[i] = attention.v_cache_stride[i] = cache[i];
  }
  attention.q = q.data(), attention.k_cache = k_cache.data(), attention.v_cache = v_cache.data();
  attention.out = out.data(), attention.lengths = lengths.data(), attention.scale = 0.2f, attention.b = b;
  attention.t = t, attention.h = h, attention.g = g, attention.d = d, attention.capacity = s, attention.dtype = dtype;
  attention.scratch = scratch.data();
  check("verify_attention", verify_attention(attention, nullptr));

  KvRollbackArgs rollback{};
  const int64_t whole[4] = {g * s * d, g * s * d, s * d, d};
  for (int i = 0; i < 4; ++i) rollback.k_cache_stride[i] = rollback.v_cache_stride[i] = whole[i];
  rollback.k_cache = k_cache.data(), rollback.v_cache = v_cache.data(), rollback.lengths = lengths.data();
  rollback.keep = keep.data(), rollback.path = path.data(), rollback.path_stride = t, rollback.window = t;
  rollback.scrub = true, rollback.layers = 1, rollback.b = b, rollback.g = g, rollback.d = d, rollback.dtype = dtype;
  check("kv_rollback", kv_rollback(rollback, nullptr));
}

void run_rows() {
  std::vector<float> x = filled<float>(5 * 33), weight = filled<float>(33), out(x.size());
  check("rms_norm", rms_norm({x.data(), 33, weight.data(), x.data(), 33, out.data(), 33, 5, 33, 1e-5f, DType::f32}, nullptr));
  check("swiglu", swiglu({x.data(), 33, out.data(), 33, out.data(), 33, 5, 33, DType::f32}, nullptr));
}

void run_tokens() {
  const int64_t drafts = 2, vocab = 2100;
  const std::vector<int64_t> draft{3, 4}, target{3, 5, 6}, eos{9};
  const std::vector<int32_t> num_draft{2}, remaining{8};
  const bool finished = false;
  bool finished_out;
  std::vector<int64_t> tokens(3);
  int32_t emitted, accepted;
  const VerifyRound round{draft.data(), drafts, num_draft.data(), 1, drafts, eos.data(), 1, remaining.data(), &finished,
                          tokens.data(), 3, &emitted, &accepted, &finished_out};
  check("verify_tokens", verify_tokens({round, target.data(), 3}, nullptr));
  std::vector<int32_t> left{8}, numbers(9), counts{2};
  std::vector<int64_t> window(3, 1), pending(1);
  check("end_round", end_round({tokens.data(), counts.data(), left.data(), pending.data(), 1, 3}, nullptr));
  check("begin_round", begin_round({pending.data(), counts.data(), left.data(), window.data(), numbers.data(),
                                    numbers.data() + 3, numbers.data() + 6, nullptr, {}, 0, 1, 3}, nullptr));
  const std::vector<float> table = filled<float>(60);
  std::vector<float> embedded(15);
  check("embed", embed({window.data(), 1, table.data(), 5, embedded.data(), 5, 3, 5, DType::f32}, nullptr));
  const std::vector<float> probs(3 * vocab, 1.0f / vocab), uniforms(6, 0.9f);
  const VerifyRejectionArgs args{round, probs.data(), {2 * vocab, vocab}, probs.data(), {3 * vocab, vocab},
                                 uniforms.data(), {6, 2}, vocab, true};
  check("verify_rejection", verify_rejection(args, nullptr));
}

}  // namespace

int main() {
  run_rows();
  run_tokens();
  run_products<bf16>(DType::bf16);
  run_cache<float>(DType::f32, 5);
  run_cache<bf16>(DType::bf16, 5);
  run_cache<bf16>(DType::bf16, 13);
  std::printf("%d failures\n", failures);
  return failures;
}
