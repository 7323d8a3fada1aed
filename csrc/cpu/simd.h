// The few vector operations the kernels are written in: `vf`, a vector of kWidth floats, in the variant's namespace.
//
// fma() is fused, but in the scalar variant a multiply and an add. load(p, n) reads n elements and
// fills the rest with zeros; store(p, v, n) writes n. Loads widen float, f16 and bf16 to float; stores round to nearest
// even. sum() and max_of() have a fixed order: halves onto each other until one lane is left. sum4() writes four sum()s,
// of vectors in registers or in memory.
// permute() takes lane index[i] of x for lane i.
#pragma once

#include <math.h>

#include "common/dtypes.h"
#include "cpu/variant.h"

namespace lk {
// split_exponent() takes a positive normal x apart: x = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)).
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
}  // namespace lk

#if defined(LK_VARIANT_AVX512)
#include "cpu/simd_avx512.h"
#elif defined(LK_VARIANT_AVX2)
#include "cpu/simd_avx2.h"
#elif defined(LK_VARIANT_NEON)
#include "cpu/simd_neon.h"
#else
#include "cpu/simd_scalar.h"
#endif

namespace lk::LK_VARIANT {

// Rounds one float to T and back, for the rounding points between fused steps.
template <class T>
LK_INLINE float rounded(float value) {
  return to_float(from_float<T>(value));
}

// exp, within 2 ulp; 0 below -86.9 (no subnormal results), inf above 88.72, NaN stays NaN. Cody-Waite reduction by ln 2
// in two parts and a degree-6 polynomial on [-ln2/2, ln2/2].
LK_INLINE vf exp(vf x) {
  const vf n = round_int(mul(x, set1(1.44269504f)));
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return exp_fixup(x, p, n);
}

// log of a positive normal number, within 2 ulp: log1p(f) of the mantissa as f - f^2/2 + f^3 P(f), P a minimax fit.
LK_INLINE vf log(vf x) {
  vf exponent;
  const vf f = sub(split_exponent(x, &exponent), set1(1));
  vf p = set1(0.06746601f);
  p = fma(p, f, set1(-0.11675641f));
  p = fma(p, f, set1(0.11888175f));
  p = fma(p, f, set1(-0.124055915f));
  p = fma(p, f, set1(0.14219551f));
  p = fma(p, f, set1(-0.16667996f));
  p = fma(p, f, set1(0.20002119f));
  p = fma(p, f, set1(-0.2500001f));
  p = fma(p, f, set1(0.33333313f));
  const vf square = mul(f, f);
  vf y = mul(mul(p, f), square);
  y = fma(exponent, set1(-2.12194440e-4f), y);
  y = fma(square, set1(-0.5f), y);
  return fma(exponent, set1(0.693359375f), add(f, y));
}

// tanh, within 3 ulp: x + x^3 P(x^2), P a minimax fit, near zero, and 1 - 2 / (exp(2 |x|) + 1) elsewhere.
LK_INLINE vf tanh(vf x) {
  constexpr float kNear = 0.625f;
  const vf square = mul(x, x);
  vf p = set1(0.002147537f);
  p = fma(p, square, set1(-0.008182674f));
  p = fma(p, square, set1(0.021702968f));
  p = fma(p, square, set1(-0.053947203f));
  p = fma(p, square, set1(0.1333321f));
  p = fma(p, square, set1(-0.3333333f));
  const vf small = fma(mul(x, square), p, x);
  const vf magnitude = max(x, sub(zero(), x));
  const vf large = sub(set1(1), div(set1(2), add(exp(add(magnitude, magnitude)), set1(1))));
  float at[kWidth], of_small[kWidth], of_large[kWidth];
  store(at, x);
  store(of_small, small);
  store(of_large, large);
  for (int i = 0; i < kWidth; ++i)
    of_large[i] = __builtin_fabsf(at[i]) < kNear ? of_small[i] : __builtin_copysignf(of_large[i], at[i]);
  return load(of_large);
}

}  // namespace lk::LK_VARIANT
