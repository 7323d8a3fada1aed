// The coupled noise: a fixed function of (seed, stream, position, token), specified in reference/gumbel.py.
#pragma once

#include "cpu/simd.h"

namespace lk::LK_VARIANT {

// Key and the counter's last three words of Philox4x32-10 (Salmon et al., SC 2011).
struct NoiseKey {
  uint32_t key0, key1, c1, c2, c3;
};

LK_INLINE NoiseKey noise_key(int64_t seed, int64_t stream, int64_t position) {
  const uint64_t s = uint64_t(seed), r = uint64_t(stream), p = uint64_t(position);
  const uint32_t stream_high = uint32_t(r >> 32);
  return {uint32_t(s), uint32_t(s >> 32), uint32_t(p), uint32_t(r),
          uint32_t(p >> 32) ^ (stream_high << 16 | stream_high >> 16)};
}

// words[4 i + j] = output word j of counter first + i.
template <int kCounters>
LK_INLINE void philox(const NoiseKey& key, uint32_t first, uint32_t* words) {
  uint32_t out[4][kCounters];
  for (int i = 0; i < kCounters; ++i) {
    uint32_t c0 = first + uint32_t(i), c1 = key.c1, c2 = key.c2, c3 = key.c3, k0 = key.key0, k1 = key.key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
      c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(product1);
      c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0][i] = c0;
    out[1][i] = c1;
    out[2][i] = c2;
    out[3][i] = c3;
  }
  for (int i = 0; i < kCounters; ++i)
    for (int j = 0; j < 4; ++j) words[4 * i + j] = out[j][i];
}

// noise[i] = Gumbel noise of token first + i; first and kTokens are multiples of 4 and of kWidth.
template <int kTokens>
LK_INLINE void gumbel_noise(const NoiseKey& key, int64_t first, float* noise) {
  uint32_t words[kTokens];
  philox<kTokens / 4>(key, uint32_t(first / 4), words);
  for (int i = 0; i < kTokens; ++i) noise[i] = float((double(words[i]) + 0.5) * 0x1p-32);
  for (int i = 0; i < kTokens; i += kWidth) {
    const vf v = min(load(noise + i), set1(1 - 0x1p-24f)), one = set1(1);
    const vf u = sub(one, v);
    // -log1p(-v): log(u), and what rounding 1 - v to u left out.
    const vf exponential = sub(div(add(sub(u, one), v), u), log(u));
    store(noise + i, sub(zero(), log(exponential)));
  }
}

}  // namespace lk::LK_VARIANT
