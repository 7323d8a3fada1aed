// One row of rms_norm, shared by the op and by everything that fuses a norm in front.
#pragma once

#include "cpu/simd.h"

namespace lk::LK_VARIANT {

// 1 / sqrt(mean(x^2) + eps). Four accumulators take the vectors in turn; the last, partial vector is filled with zeros.
template <class T>
LK_INLINE float inverse_rms(const T* x, int64_t c, float eps) {
  vf s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kWidth <= c; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) {
      const vf v = load(x + i + j * kWidth);
      s[j] = fma(v, v, s[j]);
    }
  for (int j = 0; i < c; i += kWidth, ++j) {
    const vf v = c - i >= kWidth ? load(x + i) : load(x + i, c - i);
    s[j] = fma(v, v, s[j]);
  }
  const float mean = sum(add(add(s[0], s[1]), add(s[2], s[3]))) / float(c);
  return 1.0f / sqrtf(mean + eps);
}

// out = round(x * inverse_rms * weight); out may be x.
template <class T>
LK_INLINE void rms_norm_row(const T* x, const T* weight, float eps, T* out, int64_t c) {
  const vf scale = set1(inverse_rms(x, c, eps));
  int64_t i = 0;
  for (; i + kWidth <= c; i += kWidth) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (i < c) store(out + i, mul(mul(load(x + i, c - i), scale), load(weight + i, c - i)), c - i);
}

// residual = round(residual + x)
template <class T>
LK_INLINE void add_row(T* residual, const T* x, int64_t c) {
  int64_t i = 0;
  for (; i + kWidth <= c; i += kWidth) store(residual + i, add(load(residual + i), load(x + i)));
  if (i < c) store(residual + i, add(load(residual + i, c - i), load(x + i, c - i)), c - i);
}

}  // namespace lk::LK_VARIANT
