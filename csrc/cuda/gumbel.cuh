// The coupled noise: a fixed function of (seed, stream, position, token), specified in reference/gumbel.py.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

// Key and the counter's last three words of Philox4x32-10 (Salmon et al., SC 2011).
struct NoiseKey {
  uint32_t key0, key1, c1, c2, c3;
};

__device__ __forceinline__ NoiseKey noise_key(int64_t seed, int64_t stream, int64_t position) {
  const uint64_t s = uint64_t(seed), r = uint64_t(stream), p = uint64_t(position);
  const uint32_t stream_high = uint32_t(r >> 32);
  return {uint32_t(s), uint32_t(s >> 32), uint32_t(p), uint32_t(r),
          uint32_t(p >> 32) ^ (stream_high << 16 | stream_high >> 16)};
}

__device__ __forceinline__ float gumbel_noise(const NoiseKey& key, int64_t token) {
  uint32_t c0 = uint32_t(token / 4), c1 = key.c1, c2 = key.c2, c3 = key.c3, k0 = key.key0, k1 = key.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int word = int(token % 4);
  const uint32_t bits = word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
  const float v = fminf(float((double(bits) + 0.5) * 0x1p-32), 1 - 0x1p-24f);
  return -logf(-log1pf(-v));
}

}  // namespace lk::cuda
