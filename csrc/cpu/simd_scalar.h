// Eight floats without intrinsics: runs anywhere. Included by simd.h only.
#pragma once

namespace lk::LK_VARIANT {

constexpr int kWidth = 8;
constexpr int kRegisters = 4;  // vector accumulators a tile may hold

typedef float vf __attribute__((vector_size(kWidth * sizeof(float))));

LK_INLINE vf set1(float value) { return vf{} + value; }
LK_INLINE vf zero() { return vf{}; }

// Loops over lanes stay out of line: inlined into every tile they take minutes to compile.
template <class T>
static __attribute__((noinline)) void widen(const T* p, int64_t n, float* lanes) {
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
}
template <class T>
static __attribute__((noinline)) void narrow(const float* lanes, int64_t n, T* p) {
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}

template <class T>
LK_INLINE vf load(const T* p, int64_t n) {
  vf x = zero();
  widen(p, n, reinterpret_cast<float*>(&x));
  return x;
}
template <class T>
LK_INLINE vf load(const T* p) { return load(p, kWidth); }
LK_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
LK_INLINE void store(T* p, vf x, int64_t n) { narrow(reinterpret_cast<const float*>(&x), n, p); }
template <class T>
LK_INLINE void store(T* p, vf x) { store(p, x, kWidth); }
LK_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }

LK_INLINE vf add(vf a, vf b) { return a + b; }
LK_INLINE vf sub(vf a, vf b) { return a - b; }
LK_INLINE vf mul(vf a, vf b) { return a * b; }
LK_INLINE vf div(vf a, vf b) { return a / b; }
LK_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
LK_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
LK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
LK_INLINE vf permute(vf x, const int32_t* index) {
  vf y;
  for (int i = 0; i < kWidth; ++i) y[i] = x[index[i]];
  return y;
}

LK_INLINE float sum(vf x) {
  const float a = x[0] + x[4], b = x[1] + x[5], c = x[2] + x[6], d = x[3] + x[7];
  return (a + c) + (b + d);
}
LK_INLINE void sum4(vf a, vf b, vf c, vf d, float* sums) {
  sums[0] = sum(a), sums[1] = sum(b), sums[2] = sum(c), sums[3] = sum(d);
}
LK_INLINE void sum4(const vf* v, float* sums) { sum4(v[0], v[1], v[2], v[3], sums); }
LK_INLINE float larger(float a, float b) { return a > b ? a : b; }
LK_INLINE float max_of(vf x) {
  const float a = larger(x[0], x[4]), b = larger(x[1], x[5]), c = larger(x[2], x[6]), d = larger(x[3], x[7]);
  return larger(larger(a, c), larger(b, d));
}

LK_INLINE vf round_int(vf x) {
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_rintf(x[i]);
  return x;
}

LK_INLINE vf exp_fixup(vf x, vf p, vf n) {
  for (int i = 0; i < kWidth; ++i) {
    if (x[i] < -86.9f) p[i] = 0;
    else if (x[i] > 88.72f) p[i] = __builtin_inff();
    else if (x[i] != x[i]) p[i] = x[i];
    else p[i] = p[i] * float_from_bits(uint32_t(int(n[i]) + 126) << 23) * 2;
  }
  return p;
}

LK_INLINE vf split_exponent(vf x, vf* exponent) {
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t bits = float_bits(x[i]);
    const int32_t e = int32_t(bits - kSqrtHalfBits) >> 23;
    (*exponent)[i] = float(e);
    x[i] = float_from_bits(bits - (uint32_t(e) << 23));
  }
  return x;
}

LK_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
// Into the second-level cache only.
LK_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace lk::LK_VARIANT
