// What a warp of verify_attention does with its 16 keys of a tile: scores of 16 query rows, one step of the online softmax,
// the weighted sum of the values. Two forms with one interface: mma for 16-bit elements, FMA for float32.
#pragma once

#include "cuda/device.cuh"

namespace lk::cuda {

constexpr int kQueryRows = 16;  // of a warp: query heads of one KV head x rows of the window
constexpr int kWarpKeys = 16;
constexpr int kKeyGroups = 4;  // warps that share the keys of a tile
constexpr int kTileKeys = kWarpKeys * kKeyGroups;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

__device__ __forceinline__ float finite_or_zero(float maximum) { return maximum == kMinusInfinity ? 0.0f : maximum; }
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < __builtin_huge_valf(); }

// What a query row sees: storage [first, end), of window rows those of the tree where there is one.
struct RowView {
  int first, end, t;
};

struct WindowTree {
  const bool* mask;  // [t, t] or null
  int64_t stride;
  int length;  // storage index of the window's first row
  __device__ __forceinline__ bool sees(const RowView& row, int position) const {
    if (position < row.first || position >= row.end) return false;
    return !mask || position < length || mask[row.t * stride + position - length];
  }
};

// Not 0 if one of the elements in a word is not finite: an exponent of ones and one more carry into the sign's place.
template <class T>
__device__ __forceinline__ unsigned not_finite(unsigned word) {
  constexpr unsigned kExponent = std::is_same_v<T, float> ? 0x7f800000u : std::is_same_v<T, f16> ? 0x7c007c00u : 0x7f807f80u;
  constexpr unsigned kSigns = std::is_same_v<T, float> ? 0x80000000u : 0x80008000u;
  return ((word & kExponent) + (kSigns - kExponent)) & kSigns;
}

// Bit i: key i of a warp's keys has values that are not finite.
template <class T>
__device__ __forceinline__ unsigned find_poison(const T* values, int stride, int columns) {
  const int lane = threadIdx.x % 32;
  const T* mine = values + lane / 2 * stride;
  unsigned bad = 0;
#pragma unroll 4
  for (int i = lane % 2 * kVector<T>; i < columns; i += 2 * kVector<T>) {
    const uint4 words = *reinterpret_cast<const uint4*>(mine + i);
    bad |= not_finite<T>(words.x) | not_finite<T>(words.y) | not_finite<T>(words.z) | not_finite<T>(words.w);
  }
  const unsigned votes = __ballot_sync(kAllLanes, bad != 0);
  if (votes == 0) return 0;
  unsigned keys = 0;
#pragma unroll
  for (int i = 0; i < kWarpKeys; ++i) keys |= unsigned((votes >> 2 * i & 3) != 0) << i;
  return keys;
}

// Makes zeros of those keys' values.
template <class T>
__device__ __forceinline__ void remove_poison(T* values, int stride, int d, unsigned keys) {
  const int lane = threadIdx.x % 32;
  if (keys >> lane / 2 & 1)
    for (int i = lane % 2; i < d; i += 2) values[lane / 2 * stride + i] = T{};
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}

// A lane holds rows lane / 4 and lane / 4 + 8, as the mma's result lies.
template <class T, int kMaxDim>
struct HalfTile {
  static constexpr int kStride = kMaxDim + 8;     // of rows in shared memory: ldmatrix without bank conflicts
  static constexpr int kSumStride = kMaxDim + 8;  // of rows of sums: the four that half a warp stores to, likewise
  static constexpr int kRows = 2;                 // of a lane
  static constexpr int kScratch = 0;              // floats of shared memory per warp
  float out[kMaxDim / 8][4];
  float maximum[kRows], total[kRows];  // total: this lane's part

  static __device__ __forceinline__ int row_of(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
  // Columns of Q, K and V that are read: zeros behind the d there are. Loops to d would take a branch and a wait per mma.
  static __device__ __forceinline__ int columns(int) { return kMaxDim; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kMaxDim / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) maximum[i] = kMinusInfinity, total[i] = 0;
  }

  // q, k, v: this warp's rows and keys, the first at `position`. mixed: not all rows see all of the keys; poison: those whose
  // values were taken out.
  __device__ __forceinline__ void step(const T* q, const T* k, const T* v, int, float scale, int position, bool mixed,
                                       unsigned poison, const RowView (&rows)[kRows], const WindowTree& tree, float*) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    float scores[2][4] = {};
    const T* q_row = q + (matrix % 2 * 8 + r) * kStride + matrix / 2 * 8;
    const T* k_row = k + (matrix / 2 * 8 + r) * kStride + matrix % 2 * 8;
#pragma unroll
    for (int i = 0; i < kMaxDim / 16; ++i) {
      uint32_t a[4], b[4];
      load_matrices<false>(a, q_row + i * 16);
      load_matrices<false>(b, k_row + i * 16);
      mma<T>(scores[0], a, {b[0], b[1]});
      mma<T>(scores[1], a, {b[2], b[3]});
    }
    float highest[kRows] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 4][i % 4];
      const int row = i % 4 / 2, key = position + i / 4 * 8 + lane % 4 * 2 + i % 2;
      score *= scale;
      if (mixed && !tree.sees(rows[row], key)) score = kMinusInfinity;
      highest[row] = fmaxf(highest[row], score);
    }
    float rescale[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        highest[row] = fmaxf(highest[row], __shfl_xor_sync(kAllLanes, highest[row], distance));
      const float shift = finite_or_zero(highest[row]);
      rescale[row] = exp2f((maximum[row] - shift) * kLog2E);
      maximum[row] = highest[row];
      total[row] *= rescale[row];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 4][i % 4];
      const int row = i % 4 / 2, key = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (poison >> key & 1 && score != kMinusInfinity) total[row] = NAN;
      score = exp2f((score - finite_or_zero(maximum[row])) * kLog2E);
      total[row] += score;
    }
    const uint32_t weights[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                                 pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
    const T* v_row = v + (matrix % 2 * 8 + r) * kStride + matrix / 2 * 8;
#pragma unroll
    for (int i = 0; i < kMaxDim / 16; ++i) {
      uint32_t b[4];
      load_matrices<true>(b, v_row + i * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[2 * i][j] *= rescale[j / 2], out[2 * i + 1][j] *= rescale[j / 2];
      mma<T>(out[2 * i], weights, {b[0], b[1]});
      mma<T>(out[2 * i + 1], weights, {b[2], b[3]});
    }
  }

  // sums: [kQueryRows][kSumStride]; stats: [kQueryRows][2], maximum and total.
  __device__ __forceinline__ void store(float* sums, float* stats, int d) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        total[row] += __shfl_xor_sync(kAllLanes, total[row], distance);
      if (lane % 4 == 0) stats[2 * row_of(row)] = maximum[row], stats[2 * row_of(row) + 1] = total[row];
    }
#pragma unroll
    for (int i = 0; i < kMaxDim / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i * 8 < d) sums[row_of(j / 2) * kSumStride + i * 8 + lane % 4 * 2 + j % 2] = out[i][j];
  }
};

// A lane holds one row, lane / 2: the scores of eight keys, half of the columns of the sum.
template <int kMaxDim>
struct FloatTile {
  static constexpr int kStride = kMaxDim + 4;
  static constexpr int kSumStride = kMaxDim + 1;
  static constexpr int kRows = 1;
  static constexpr int kScratch = kQueryRows * (kWarpKeys + 1);  // weights [row][key]
  static constexpr int kKeys = kWarpKeys / 2;
  float out[kMaxDim / 2];
  float maximum[kRows], total[kRows];

  static __device__ __forceinline__ int row_of(int) { return threadIdx.x % 32 / 2; }
  static __device__ __forceinline__ int columns(int d) { return d; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kMaxDim / 2; ++i) out[i] = 0;
    maximum[0] = kMinusInfinity, total[0] = 0;
  }

  __device__ __forceinline__ void step(const float* q, const float* k, const float* v, int d, float scale, int position,
                                       bool mixed, unsigned poison, const RowView (&rows)[kRows], const WindowTree& tree,
                                       float* scratch) {
    const int row = row_of(0), half = threadIdx.x % 2;
    const float* q_row = q + row * kStride;
    const float* k_row = k + half * kKeys * kStride;
    float scores[kKeys] = {};
#pragma unroll 1
    for (int i = 0; i < d; ++i) {
      const float x = q_row[i];
#pragma unroll
      for (int key = 0; key < kKeys; ++key) scores[key] = fmaf(x, k_row[key * kStride + i], scores[key]);
    }
    float highest = maximum[0];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      scores[key] *= scale;
      if (mixed && !tree.sees(rows[0], position + half * kKeys + key)) scores[key] = kMinusInfinity;
      highest = fmaxf(highest, scores[key]);
    }
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
    const float shift = finite_or_zero(highest), rescale = exp2f((maximum[0] - shift) * kLog2E);
    maximum[0] = highest;
    total[0] *= rescale;
    float* weights = scratch + row * (kWarpKeys + 1);
    __syncwarp();  // the last step's weights have been read
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const float weight = exp2f((scores[key] - shift) * kLog2E);
      if (poison >> (half * kKeys + key) & 1 && scores[key] != kMinusInfinity) total[0] = NAN;
      total[0] += weight;
      weights[half * kKeys + key] = weight;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMaxDim / 2; ++i) out[i] *= rescale;
#pragma unroll 1
    for (int key = 0; key < kWarpKeys; ++key) {
      const float weight = weights[key];
      const float* v_row = v + key * kStride + half * (d / 2);
#pragma unroll
      for (int i = 0; i < kMaxDim / 2; i += 4)
        if (i < d / 2)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[i + j] = fmaf(weight, v_row[i + j], out[i + j]);
    }
  }

  __device__ __forceinline__ void store(float* sums, float* stats, int d) {
    const int row = row_of(0), half = threadIdx.x % 2;
    total[0] += __shfl_xor_sync(kAllLanes, total[0], 1);
    if (half == 0) stats[2 * row] = maximum[0], stats[2 * row + 1] = total[0];
#pragma unroll
    for (int i = 0; i < kMaxDim / 2; ++i)
      if (i < d / 2) sums[row * kSumStride + half * (d / 2) + i] = out[i];
  }
};

template <class T, int kMaxDim>
using AttentionTile = std::conditional_t<std::is_same_v<T, float>, FloatTile<kMaxDim>, HalfTile<T, kMaxDim>>;

}  // namespace lk::cuda
