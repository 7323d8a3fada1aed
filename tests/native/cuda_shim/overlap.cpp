// A layer, a head and the end of a round, once launch by launch and once with overlapping launches, each kernel started
// before those in front of it have run (emulator.h): the same bytes, or a kernel reads too early.
#include <cstdio>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace {

using namespace lk;
using namespace lk::cuda;

constexpr int64_t B = 2, T = 3, H = 4, G = 2, D = 16, S = 160, C = H * D, I = 72, V = 100, M = B * T;
constexpr int64_t kMaxBytes = 8;  // of an element

int failures = 0;

void check(const char* name, bool passed) {
  std::printf("%s: %s\n", name, passed ? "passed" : "failed");
  failures += !passed;
}

template <class E>
struct Round {
  DType dtype;
  std::vector<std::vector<char>> written;  // by kernels

  static std::vector<E> numbers(size_t count) {
    std::vector<E> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = from_float<E>(float(int(i * 7 % 13) - 6) / 32);
    return values;
  }

  void* poisoned(int64_t count) {
    written.reserve(64);  // addresses stay
    written.emplace_back(size_t(count * kMaxBytes), char(0xff));
    return written.back().data();
  }

  void linear(const void* x, std::vector<LinearWeight> weights, int64_t c, const void* norm, const void* residual,
              bool swiglu) {
    const SmallLinearArgs args{x, c, M, c, weights.data(), int64_t(weights.size()), norm, 1e-5f, residual, C, swiglu, dtype};
    check("small_linear", small_linear(args, nullptr) == cudaSuccess);
  }

  void run(bool overlap) {
    const std::vector<E> input = numbers(M * C), norm = numbers(C), weight = numbers(3 * I * C);
    const std::vector<E> head = numbers(V * C);
    std::vector<E> k_cache = numbers(B * G * S * D), v_cache = k_cache;
    std::vector<int32_t> lengths{70, 3}, positions{70, 71, 72, 3, 4, 5}, path{0, 2, 1, 0, 1, 2}, num_draft{2, 2};
    std::vector<int32_t> remaining{9, 9};
    const std::vector<float> inv_freq(D / 2, 0.1f), temperature(M, 1.0f), top_p(M, 0.7f), uniforms(B * T * 2, 0.4f);
    const std::vector<int64_t> seed(M, 5), draft{3, 4, 5, 6}, eos{9};
    const bool finished[B] = {};

    overlap_launches = overlap;
    void* x = poisoned(M * C);
    check("rms_norm", rms_norm({input.data(), C, norm.data(), nullptr, 0, x, C, M, C, 1e-5f, dtype}, nullptr) == cudaSuccess);
    void *q = poisoned(M * H * D), *k = poisoned(M * G * D), *v = poisoned(M * G * D);
    linear(x, {{weight.data(), C, H * D, nullptr, q, H * D}, {weight.data(), C, G * D, nullptr, k, G * D},
               {weight.data() + 64, C, G * D, nullptr, v, G * D}}, C, norm.data(), nullptr, false);

    RopeAppendArgs rope{};
    const int64_t outer[3] = {T * H * D, H * D, D}, inner[3] = {T * G * D, G * D, D}, cache[3] = {G * S * D, S * D, D};
    VerifyAttentionArgs attention{};
    for (int i = 0; i < 3; ++i) {
      rope.q_stride[i] = attention.q_stride[i] = attention.out_stride[i] = outer[i];
      rope.k_stride[i] = rope.v_stride[i] = inner[i];
      rope.k_cache_stride[i] = rope.v_cache_stride[i] = cache[i];
      attention.k_cache_stride[i] = attention.v_cache_stride[i] = cache[i];
    }
    rope.q = q, rope.k = k, rope.v = v, rope.k_cache = k_cache.data(), rope.v_cache = v_cache.data();
    rope.lengths = lengths.data(), rope.positions = positions.data(), rope.positions_stride = T;
    rope.inv_freq = inv_freq.data(), rope.attention_factor = 1;
    rope.b = B, rope.t = T, rope.h = H, rope.g = G, rope.d = D, rope.dtype = dtype;
    check("rope_append", rope_append(rope, nullptr) == cudaSuccess);

    void *attended = poisoned(M * H * D), *scratch = poisoned(verify_attention_scratch(B, T, H, G, D, S) / kMaxBytes + 1);
    attention.q = q, attention.k_cache = k_cache.data(), attention.v_cache = v_cache.data(), attention.out = attended;
    attention.lengths = lengths.data(), attention.scale = 0.25f, attention.scratch = static_cast<float*>(scratch);
    attention.b = B, attention.t = T, attention.h = H, attention.g = G, attention.d = D, attention.capacity = S;
    attention.dtype = dtype;
    check("verify_attention", verify_attention(attention, nullptr) == cudaSuccess);

    void *gated = poisoned(M * I), *gate = poisoned(M * I), *up = poisoned(M * I), *again = poisoned(M * I);
    linear(attended, {{weight.data(), C, C, nullptr, x, C}}, C, nullptr, x, false);
    const LinearWeight gate_and_up[2] = {{weight.data(), C, I, nullptr, gated, I}, {weight.data() + C, C, I, nullptr, gated, I}};
    linear(x, {gate_and_up[0], gate_and_up[1]}, C, norm.data(), nullptr, true);
    linear(gated, {{weight.data(), I, C, nullptr, x, C}}, I, nullptr, x, false);
    linear(x, {{weight.data(), C, I, nullptr, gate, I}, {weight.data() + C, C, I, nullptr, up, I}}, C, nullptr, nullptr, false);
    check("swiglu", swiglu({gate, I, up, I, again, I, M, I, dtype}, nullptr) == cudaSuccess);

    void *logits = poisoned(M * V), *token = poisoned(M), *logprob = poisoned(M), *confidence = poisoned(M);
    ExitHeadArgs choice{};
    choice.hidden = x, choice.hidden_stride = C, choice.norm_weight = norm.data(), choice.eps = 1e-5f;
    choice.lm_head = head.data(), choice.lm_head_stride = C, choice.logit_scale = 1, choice.n = M, choice.c = C, choice.v = V;
    choice.sampling = {temperature.data(), seed.data(), seed.data(), nullptr, nullptr, top_p.data(), nullptr};
    choice.logits = static_cast<float*>(logits), choice.logits_stride = V, choice.keep_logits = true;
    choice.partials = poisoned(M * 7 * kPartialBytes / kMaxBytes + 1), choice.dtype = dtype;
    choice.token = static_cast<int64_t*>(token), choice.logprob = static_cast<float*>(logprob);
    choice.confidence = static_cast<float*>(confidence);
    check("exit_head", exit_head(choice, nullptr) == cudaSuccess);

    void *tokens = poisoned(B * T), *emitted = poisoned(B), *accepted = poisoned(B), *ended = poisoned(B);
    VerifyRound round{draft.data(), 2, num_draft.data(), B, 2, eos.data(), 1, remaining.data(), finished,
                      static_cast<int64_t*>(tokens), T, static_cast<int32_t*>(emitted), static_cast<int32_t*>(accepted),
                      static_cast<bool*>(ended)};
    check("verify_tokens", verify_tokens({round, choice.token, T}, nullptr) == cudaSuccess);

    KvRollbackArgs rollback{};
    const int64_t whole[4] = {B * G * S * D, G * S * D, S * D, D};
    for (int i = 0; i < 4; ++i) rollback.k_cache_stride[i] = rollback.v_cache_stride[i] = whole[i];
    rollback.k_cache = k_cache.data(), rollback.v_cache = v_cache.data(), rollback.lengths = lengths.data();
    rollback.keep = static_cast<int32_t*>(emitted), rollback.path = path.data(), rollback.path_stride = T;
    rollback.window = T, rollback.scrub = true, rollback.layers = 1, rollback.b = B, rollback.g = G, rollback.d = D;
    rollback.dtype = dtype;
    check("kv_rollback", kv_rollback(rollback, nullptr) == cudaSuccess);

    void *window = poisoned(M), *step_lengths = poisoned(M), *room = poisoned(B), *pending = poisoned(B);
    const int32_t* grown = lengths.data();
    int32_t* num_emitted = static_cast<int32_t*>(emitted);
    check("end_round", end_round({static_cast<int64_t*>(tokens), num_emitted, remaining.data(), static_cast<int64_t*>(pending),
                                  B, T}, nullptr) == cudaSuccess);
    BeginRoundArgs next{static_cast<int64_t*>(pending), grown, remaining.data(), static_cast<int64_t*>(window),
                        positions.data(), static_cast<int32_t*>(step_lengths), static_cast<int32_t*>(room), nullptr, {}, 1,
                        B, T};
    next.repeated[0] = {emitted, poisoned(M), 4};
    check("begin_round", begin_round(next, nullptr) == cudaSuccess);
    check("embed", embed({static_cast<int64_t*>(window), T, head.data(), C, poisoned(B * C), C, B, C, dtype}, nullptr) ==
                       cudaSuccess);

    const float* probs = static_cast<float*>(logits);  // any numbers will do
    round.tokens = static_cast<int64_t*>(poisoned(B * T));
    check("verify_rejection", verify_rejection({round, probs, {T * V, V}, probs, {T * V, V}, uniforms.data(), {T * 2, 2}, V,
                                                true}, nullptr) == cudaSuccess);
    overlap_launches = false;
    check("kernels are held", shim::held.empty() != overlap);
    shim::run_held();
    for (const std::vector<E>* values : {&k_cache, &v_cache}) {
      const char* bytes = reinterpret_cast<const char*>(values->data());
      written.emplace_back(bytes, bytes + values->size() * sizeof(E));
    }
    check("tokens are chosen", choice.token[0] >= 0 && choice.token[0] < V);
    check("lengths grow", lengths[0] > 70 && lengths[0] <= 70 + T);
  }
};

template <class E>
void compare(const char* name, DType dtype) {
  Round<E> plain{dtype, {}}, overlapping{dtype, {}};
  plain.run(false);
  overlapping.run(true);
  check(name, plain.written == overlapping.written);
}

struct Copy {
  const int* from;
  int* to;
};
void copy_kernel(Copy a) {
  follow_previous_kernels();
  if (threadIdx.x == 0) *a.to = *a.from;
}
void early_kernel(Copy a) {
  const int value = *a.from;
  follow_previous_kernels();
  if (threadIdx.x == 0) *a.to = value;
}

int copied_through(void (*kernel)(Copy)) {
  const int given = 7;
  int between = 0, result = 0;
  overlap_launches = true;
  check("launch", launch(copy_kernel, dim3(2), 32, 0, nullptr, Copy{&given, &between}) == cudaSuccess);
  check("launch", launch(kernel, dim3(1), 32, 0, nullptr, Copy{&between, &result}) == cudaSuccess);
  overlap_launches = false;
  shim::run_held();
  return result;
}

}  // namespace

int main() {
  check("who waits reads what was written", copied_through(copy_kernel) == 7);
  check("who reads too early is found out", copied_through(early_kernel) == 0);
  compare<float>("float32, bytes of all that is written", DType::f32);
  compare<bf16>("bfloat16, bytes of all that is written", DType::bf16);
  std::printf("%d failures\n", failures);
  return failures;
}
