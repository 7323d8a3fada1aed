#include <math.h>

#include "cpu/ops.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // less is not worth a second thread
constexpr int64_t kAnglesPerTask = 256;

LK_INLINE int64_t real_rows(const RopeAppendArgs& a, int64_t b) { return a.num_queries ? a.num_queries[b] : a.t; }

// y may be x: both halves are read before either is written.
template <class T>
LK_INLINE void rotate(const T* x, T* y, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; i += kWidth) {
    if (half - i >= kWidth) {
      const vf a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
      store(y + i, sub(mul(a, c), mul(b, s)));
      store(y + half + i, add(mul(b, c), mul(a, s)));
    } else {
      const int64_t n = half - i;
      const vf a = load(x + i, n), b = load(x + half + i, n), c = load(cosines + i, n), s = load(sines + i, n);
      store(y + i, sub(mul(a, c), mul(b, s)), n);
      store(y + half + i, add(mul(b, c), mul(a, s)), n);
    }
  }
}

template <class T>
LK_INLINE void append_row(const RopeAppendArgs& a, const float* cosines, int64_t b, int64_t t) {
  const int64_t half = a.d / 2;
  const float* sines = cosines + half;
  T* q = static_cast<T*>(a.q) + b * a.q_stride[0] + t * a.q_stride[1];
  for (int64_t h = 0; h < a.h; ++h) rotate(q + h * a.q_stride[2], q + h * a.q_stride[2], cosines, sines, half);
  const int64_t slot = a.slot_ids ? a.slot_ids[b] : b, place = a.lengths[b] + t;
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + t * a.k_stride[1];
  const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + t * a.v_stride[1];
  T* k_cache = static_cast<T*>(a.k_cache) + slot * a.k_cache_stride[0] + place * a.k_cache_stride[2];
  T* v_cache = static_cast<T*>(a.v_cache) + slot * a.v_cache_stride[0] + place * a.v_cache_stride[2];
  for (int64_t g = 0; g < a.g; ++g) {
    rotate(k + g * a.k_stride[2], k_cache + g * a.k_cache_stride[1], cosines, sines, half);
    memcpy(v_cache + g * a.v_cache_stride[1], v + g * a.v_stride[2], size_t(a.d) * sizeof(T));
  }
}

template <class T>
void run(const RopeAppendArgs& a, const float* table) {
  const int64_t rows = a.b * a.t;
  int64_t rows_per_task = kElementsPerTask / ((a.h + 2 * a.g) * a.d);
  if (rows_per_task < 1) rows_per_task = 1;
  auto task = [&](int64_t index) {
    const int64_t begin = index * rows_per_task;
    const int64_t end = begin + rows_per_task < rows ? begin + rows_per_task : rows;
    for (int64_t row = begin; row < end; ++row)
      if (row % a.t < real_rows(a, row / a.t)) append_row<T>(a, table + row * a.d, row / a.t, row % a.t);
  };
  parallel_for(a.num_threads, (rows + rows_per_task - 1) / rows_per_task, task);
}

}  // namespace

void rope_table(const RopeAppendArgs& a, float* table) {
  const int64_t rows = a.b * a.t, half = a.d / 2;
  const int64_t rows_per_task = kAnglesPerTask / half > 1 ? kAnglesPerTask / half : 1;
  auto task = [&](int64_t index) {
    const int64_t begin = index * rows_per_task;
    const int64_t end = begin + rows_per_task < rows ? begin + rows_per_task : rows;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / a.t, t = row % a.t;
      if (t >= real_rows(a, b)) continue;
      const float position = float(a.positions[b * a.positions_stride + t]);
      const float* inv_freq = a.inv_freq + b * a.inv_freq_stride[0] + t * a.inv_freq_stride[1];
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(position * inv_freq[i]);  // in double, a large angle loses nothing to reduction
        table[row * a.d + i] = float(cos(angle)) * a.attention_factor;
        table[row * a.d + half + i] = float(sin(angle)) * a.attention_factor;
      }
    }
  };
  parallel_for(a.num_threads, (rows + rows_per_task - 1) / rows_per_task, task);
}

void rope_append(const RopeAppendArgs& args) {
  if (args.b == 0 || args.t == 0) return;
  const float* table = args.table;
  if (!table) {
    float* made = static_cast<float*>(workspace(Workspace::rope_table, size_t(args.b * args.t * args.d) * sizeof(float)));
    rope_table(args, made);
    table = made;
  }
  switch (args.dtype) {
    case DType::f32: return run<float>(args, table);
    case DType::f16: return run<f16>(args, table);
    case DType::bf16: return run<bf16>(args, table);
  }
}

}  // namespace lk::LK_VARIANT
