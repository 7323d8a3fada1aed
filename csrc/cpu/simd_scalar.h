// Plain C++ vectors of eight floats: runs anywhere. Included by simd.h only.
#pragma once

namespace lk::LK_VARIANT {

constexpr int kWidth = 8;
constexpr int kRegisters = 8;  // vector accumulators a tile may hold

struct vf {
  float v[kWidth];
};

#define LK_LANES for (int i = 0; i < kWidth; ++i)

LK_INLINE vf set1(float value) { vf r; LK_LANES r.v[i] = value; return r; }
LK_INLINE vf zero() { return set1(0); }

template <class T>
LK_INLINE vf load(const T* p) { vf r; LK_LANES r.v[i] = to_float(p[i]); return r; }
template <class T>
LK_INLINE vf load(const T* p, int64_t n) { vf r; LK_LANES r.v[i] = i < n ? to_float(p[i]) : 0; return r; }
template <class T>
LK_INLINE void store(T* p, vf x) { LK_LANES p[i] = from_float<T>(x.v[i]); }
template <class T>
LK_INLINE void store(T* p, vf x, int64_t n) { for (int i = 0; i < n; ++i) p[i] = from_float<T>(x.v[i]); }

LK_INLINE vf add(vf a, vf b) { LK_LANES a.v[i] += b.v[i]; return a; }
LK_INLINE vf sub(vf a, vf b) { LK_LANES a.v[i] -= b.v[i]; return a; }
LK_INLINE vf mul(vf a, vf b) { LK_LANES a.v[i] *= b.v[i]; return a; }
LK_INLINE vf div(vf a, vf b) { LK_LANES a.v[i] /= b.v[i]; return a; }
LK_INLINE vf max(vf a, vf b) { LK_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
LK_INLINE vf min(vf a, vf b) { LK_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
LK_INLINE vf fma(vf a, vf b, vf c) { LK_LANES c.v[i] = a.v[i] * b.v[i] + c.v[i]; return c; }

LK_INLINE float sum(vf x) {
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
}
LK_INLINE float max_of(vf x) {
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
  return x.v[0];
}

LK_INLINE vf round_int(vf x) { LK_LANES x.v[i] = __builtin_rintf(x.v[i]); return x; }

LK_INLINE vf exp_fixup(vf x, vf p, vf n) {
  LK_LANES {
    if (x.v[i] < -86.9f) p.v[i] = 0;
    else if (x.v[i] > 88.72f) p.v[i] = float_from_bits(0x7f800000);
    else if (x.v[i] != x.v[i]) p.v[i] = x.v[i];
    else p.v[i] = p.v[i] * float_from_bits(uint32_t(int(n.v[i]) - 1 + 127) << 23) * 2;
  }
  return p;
}

LK_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef LK_LANES

}  // namespace lk::LK_VARIANT
