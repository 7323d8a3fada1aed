// The few vector operations the kernels are written in: `vf`, a vector of kWidth floats, in the variant's namespace.
//
// fma() is fused on AVX2 and AVX-512 and a multiply and an add in the scalar variant. load(p, n) reads n elements and
// fills the rest with zeros; store(p, v, n) writes n. Loads widen float, f16 and bf16 to float; stores round to nearest
// even. sum() and max_of() have a fixed order: halves onto each other until one lane is left.
#pragma once

#include <math.h>

#include "common/dtypes.h"
#include "cpu/variant.h"

#if defined(LK_VARIANT_AVX512)
#include "cpu/simd_avx512.h"
#elif defined(LK_VARIANT_AVX2)
#include "cpu/simd_avx2.h"
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

}  // namespace lk::LK_VARIANT
