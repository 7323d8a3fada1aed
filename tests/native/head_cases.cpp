// exit_head, verify_tokens, verify_rejection: each row of a batch against the row alone.
#include "check.h"

namespace {

struct Result {
  Buffer<int64_t> token;
  Buffer<float> logprob, confidence;
  explicit Result(int64_t n) : token(n), logprob(n), confidence(n) {}
};

template <class T>
void head(int num_threads) {
  const int64_t shapes[][3] = {{1, 1, 1}, {5, 193, 83}, {3, 1000, 40}, {66, 400, 17}};
  for (const auto& shape : shapes) {
    const int64_t n = shape[0], v = shape[1], c = shape[2];  // no bindings: clang captures none before C++20
    const int64_t stride = c + 3;
    const auto hidden = random_buffer<T>(span(n, stride, c), 1), norm = random_buffer<T>(c, 2);
    const auto w = random_buffer<T>(span(v, stride, c), 3), bias = random_buffer<T>(v, 4);
    Random random(5);
    Buffer<float> temperature(n), top_p(n), min_p(n), logits(n * v), factor(n);
    const int64_t share = 2;  // rows of `first_seen`, which lie one byte apart
    Buffer<uint8_t> first_seen(span((n + share - 1) / share, v + 1, v)), window_position(n);
    for (int64_t i = 0; i < first_seen.size; ++i) first_seen[i] = random.below(2) ? 255 : uint8_t(random.below(4));
    Buffer<int64_t> seed(n), position(n), stream(n), top_k(n);
    for (int64_t i = 0; i < n; ++i) {
      temperature[i] = i % 3 == 1 ? 0 : 0.3f + random.uniform();
      top_p[i] = i % 4 == 0 ? 1 : random.uniform();
      min_p[i] = i % 5 == 0 ? 0 : 0.3f * random.uniform();
      top_k[i] = i % 2 ? random.below(v + 2) : 0;
      seed[i] = int64_t(uint64_t(random.bits()) << 32 | random.bits());
      position[i] = random.bits();
      stream[i] = -i;
      factor[i] = 0.5f + random.uniform();
      window_position[i] = uint8_t(random.below(4));
    }
    // Greedy; plain draws; filters, with and without logits_out; all that with a head in 8 or 4 bits; two of four
    // with a repetition penalty.
    const int64_t even = c / 2 * 2;
    const Quantized heads[] = {{v, even, 8, 64, true, 6}, {v, even, 4, 64, false, 7}};
    for (int how = 0; how < 8; ++how) {
      const Quantized* q = how < 4 ? nullptr : &heads[how % 2];
      if (q && !even) continue;
      const void* lm_head = q ? static_cast<const void*>(q->values.data.get()) : w.data.get();
      auto run = [&](int64_t first, int64_t count, Result& out, float* logits_out, int threads) {
        lk::ExitHeadArgs a{};
        a.hidden = hidden + first * stride, a.hidden_stride = stride, a.norm_weight = norm, a.eps = 1e-5f;
        a.lm_head = lm_head, a.lm_head_stride = q ? q->stride : stride, a.bias = how % 2 ? nullptr : bias.data.get();
        a.logit_scale = 0.5f, a.softcap = how == 1 ? 30.f : 0.f;
        if (how % 4 % 3)
          a.penalty = {factor + first, first_seen + first / share * (v + 1), v + 1, window_position + first,
                       count == 1 ? 1 : share};
        lk::SamplingArgs& s = a.sampling;
        if (how % 4 > 0) s = {temperature + first, seed + first, position + first, stream + first, nullptr, nullptr, nullptr};
        if (how % 4 > 1) s.top_k = top_k + first, s.top_p = top_p + first, s.min_p = min_p + first;
        a.logits_out = logits_out, a.logits_stride = v;
        a.token = out.token, a.logprob = out.logprob, a.confidence = out.confidence;
        a.n = count, a.c = q ? even : c, a.v = v, a.dtype = dtype_of<T>, a.num_threads = threads;
        if (q) a.quantization = q->format;
        lk::exit_head(a);
      };
      Result all(n);
      run(0, n, all, how % 4 == 3 ? logits.data.get() : nullptr, num_threads);
      for (int64_t row = 0; row < n; ++row) {
        Result one(1);
        Buffer<float> own(v);
        run(row, 1, one, how % 4 == 3 ? own.data.get() : nullptr, 1);
        expect(one.token[0] == all.token[row] && same<float>(one.logprob, all.logprob + row, 1) &&
                   same<float>(one.confidence, all.confidence + row, 1) &&
                   (how % 4 != 3 || same<float>(own, logits + row * v, v)),
               "exit_head row", int(dtype_of<T>), n, v, how);
        expect(one.token[0] >= 0 && one.token[0] < v, "exit_head token", int(dtype_of<T>), n, v, how);
      }
    }
  }
}

// A screen that says nothing about lm_head: with an error to match, all rows of lm_head are looked at again, one by one
// or, where they are many, together; the answer stays that of lm_head. Without, each row of a batch says what it says alone.
template <class T>
void screened(int num_threads) {
  const int64_t shapes[][3] = {{1, 1, 1}, {5, 193, 83}, {66, 400, 17}, {3, 4000, 6}};
  for (const auto& shape : shapes) {
    const int64_t n = shape[0], v = shape[1], c = shape[2];  // no bindings: clang captures none before C++20
    const auto hidden = random_buffer<T>(n * c, 1), norm = random_buffer<T>(c, 2), w = random_buffer<T>(v * c, 3);
    const int64_t even = c / 2 * 2;
    const Quantized eight{v, c, 8, 64, false, 6}, four{v, even, 4, 64, true, 7};
    const Buffer<float> error = random_buffer<float>(v, 8, 1, 1000);
    Random random(5);
    Buffer<float> temperature(n), top_p(n);
    Buffer<int64_t> seed(n);
    for (int64_t i = 0; i < n; ++i) temperature[i] = i % 3 == 1 ? 0 : 0.3f + random.uniform(), seed[i] = i, top_p[i] = 0.9f;
    for (int how = 0; how < 6; ++how) {
      const Quantized& q = how < 4 ? eight : four;
      if (!even && how > 3) continue;
      auto run = [&](int64_t first, int64_t count, Result& out, bool screen, int threads) {
        lk::ExitHeadArgs a{};
        a.hidden = hidden + first * c, a.hidden_stride = c, a.norm_weight = norm, a.eps = 1e-5f;
        a.lm_head = w, a.lm_head_stride = c, a.logit_scale = 1;
        if (how % 2) a.sampling = {temperature + first, seed + first, seed + first, nullptr, nullptr, nullptr, nullptr};
        if (how == 5) a.sampling.top_p = top_p + first;
        a.token = out.token, a.logprob = out.logprob, a.confidence = out.confidence;
        a.n = count, a.c = how < 4 ? c : even, a.v = v, a.dtype = dtype_of<T>, a.num_threads = threads;
        if (screen) a.screen = {q.values.data.get(), q.stride, q.format, how < 2 ? error.data.get() : nullptr};
        lk::exit_head(a);
      };
      Result all(n), plain(n);
      run(0, n, all, true, num_threads);
      run(0, n, plain, false, num_threads);
      for (int64_t row = 0; row < n; ++row) {
        Result one(1);
        run(row, 1, one, true, 1);
        expect(one.token[0] == all.token[row] && same<float>(one.logprob, all.logprob + row, 1), "screened row",
               int(dtype_of<T>), n, v, how);
        expect(how > 1 || all.token[row] == plain.token[row], "exact screen", int(dtype_of<T>), n, v, how);
        expect(all.token[row] >= 0 && all.token[row] < v, "screened token", int(dtype_of<T>), n, v, how);
      }
    }
  }
}

struct Round {
  int64_t batch, drafts;
  Buffer<int64_t> draft, eos;
  Buffer<int32_t> num_draft, remaining;
  Buffer<bool> finished;
  Buffer<int64_t> tokens;
  Buffer<int32_t> num_emitted, num_accepted;
  Buffer<bool> finished_out;

  Round(int64_t b, int64_t k, int64_t vocab, uint64_t seed)
      : batch(b), drafts(k), draft(b * k), eos(2), num_draft(b), remaining(b), finished(b), tokens(b * (k + 1)),
        num_emitted(b), num_accepted(b), finished_out(b) {
    Random random(seed);
    for (int64_t i = 0; i < b * k; ++i) draft[i] = random.below(vocab);
    for (int64_t i = 0; i < b; ++i) {
      num_draft[i] = int32_t(random.below(k + 1));
      remaining[i] = int32_t(random.below(k + 4)) - 1;
      finished[i] = random.below(7) == 0;
    }
    eos[0] = 1;
    eos[1] = vocab;
  }
  lk::VerifyRound args(int64_t first, int64_t count) {
    return {draft + first * drafts, drafts, num_draft + first, count, drafts, eos, 2, remaining + first, finished + first,
            tokens + first * (drafts + 1), drafts + 1, num_emitted + first, num_accepted + first, finished_out + first};
  }
  bool equals(const Round& other) const {
    return same<int64_t>(tokens, other.tokens, tokens.size) && same<int32_t>(num_emitted, other.num_emitted, batch) &&
           same<int32_t>(num_accepted, other.num_accepted, batch) &&
           same<bool>(finished_out, other.finished_out, batch);
  }
};

}  // namespace

void check_exit_head(int num_threads) {
  FOR_EVERY_DTYPE(head, num_threads);
  FOR_EVERY_DTYPE(screened, num_threads);
}

void check_verify_tokens(int) {
  for (int64_t drafts : {0, 1, 7, 63}) {
    const int64_t batch = 41;
    Round all(batch, drafts, 3, 1), single(batch, drafts, 3, 1);
    Random random(2);
    Buffer<int64_t> target(batch * (drafts + 1));
    for (int64_t i = 0; i < target.size; ++i) target[i] = random.below(3);
    for (int64_t i = 0; i < batch; i += 2)
      for (int64_t j = 0; j < drafts; ++j) target[i * (drafts + 1) + j] = all.draft[i * drafts + j];
    lk::verify_tokens({all.args(0, batch), target, drafts + 1});
    for (int64_t i = 0; i < batch; ++i) lk::verify_tokens({single.args(i, 1), target + i * (drafts + 1), drafts + 1});
    expect(all.equals(single), "verify_tokens row", -1, drafts);
  }
}

void check_verify_rejection(int num_threads) {
  for (int64_t drafts : {0, 1, 5})
    for (int64_t vocab : {1, 7, 300})
      for (bool block : {false, true}) {
        const int64_t batch = 9;
        Round all(batch, drafts, vocab, 3), single(batch, drafts, vocab, 3);
        const auto q = random_buffer<float>(batch * drafts * vocab, 4, 0.5f, 0.5f);
        const auto p = random_buffer<float>(batch * (drafts + 1) * vocab, 5, 0.5f, 0.5f);
        const auto u = random_buffer<float>(batch * (drafts + 1) * 2, 6, 0.49f, 0.49f);
        auto run = [&](Round& round, int64_t first, int64_t count, int threads) {
          lk::verify_rejection({round.args(first, count), q + first * drafts * vocab, {drafts * vocab, vocab},
                                p + first * (drafts + 1) * vocab, {(drafts + 1) * vocab, vocab},
                                u + first * (drafts + 1) * 2, {(drafts + 1) * 2, 2}, vocab, block, threads});
        };
        run(all, 0, batch, num_threads);
        for (int64_t i = 0; i < batch; ++i) run(single, i, 1, 1);
        expect(all.equals(single), "verify_rejection row", -1, drafts, vocab, block);
      }
}
