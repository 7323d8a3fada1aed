// What small_linear and exit_head share: 16 rows of W times up to 64 rows of x ("tokens").
//
// A block of 8 warps owns a tile of 16 rows. W is the 16-row operand of mma.m16n8k16 and the tokens its 8-column operand,
// so one pass over W serves 8 tokens per mma, and more tokens are more mma on the fragments already in registers. Any
// assignment of k to an operand's places will do as long as both operands use it, so a lane feeds two mma with 8
// neighbouring elements of a row: weights and x go from memory to registers in 16-byte loads, no shared memory, no shuffles.
//
// The order of a sum: warp w takes the steps w, w + 8, ... of kStep elements, in each the same chain of mma; the block adds
// the warps' sums in rising order. That is a function of c and the dtype. The number of tokens, tiles, blocks, a list of
// weights, alignment and a fused norm change none of it. float32 has no mma that keeps its digits: a warp there takes two
// rows, a lane the vectors lane, lane + 32, ..., summed with FMA and over the lanes by shuffles.
//
// Little's law on an H100: 3.35 TB/s x 0.8 us = 2.7 MB under way, 20 KB per multiprocessor. Here each warp loads step i + 1
// (kDepth x 1 KB), across tile boundaries too, while it multiplies step i: 16 warps x 4 KB = 64 KB per multiprocessor.
#pragma once

#include <algorithm>

#include "cuda/rms_norm.cuh"

namespace lk::cuda {

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = 32 * kLinearWarps;
constexpr int kTileTokens = 8;  // of one mma, whose other operand are kTileRows of W
constexpr int kMaxTokens = 64;  // of one pass over W
constexpr int kChunk = 32;      // elements that the four lanes of a row load at once
constexpr int kDepth = 4;       // chunks in a step
constexpr int kStep = kChunk * kDepth;
constexpr int kSumStride = kTileRows + 4;  // floats between tokens: no bank conflicts

struct LinearInput {
  const void* x;  // [m, c], m <= kMaxTokens
  int64_t x_stride;
  int64_t m, c;
  const void* norm_weight;  // [c] or null; m <= kFusedNormRows with it
  float norm_eps;
};

struct WeightRows {  // rows [first, end) of a matrix: the tile, cut at its last row
  const void* data;
  int64_t stride, first, end;
};

// Operands of 8 neighbouring elements: as two mma take them.
template <class T, bool kWide>
__device__ __forceinline__ uint4 load_elements(const T* row, int64_t k, int64_t c) {
  if constexpr (kWide) {
    return k < c ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
  } else {
    alignas(16) T elements[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) elements[j] = k + j < c ? row[k + j] : T{};
    return *reinterpret_cast<const uint4*>(elements);
  }
}

template <class T, int kTiles, bool kWide>
struct HalfProduct {
  static constexpr int kTokens = kTiles * kTileTokens;
  static constexpr int kSums = kLinearWarps;  // of each output, to be added in order

  struct Step {
    uint4 upper[kDepth], lower[kDepth];  // rows lane / 4 and lane / 4 + 8 of the tile
  };
  float sums[kTiles][4];

  static __device__ __forceinline__ int64_t steps(int64_t c) {
    return (c + kLinearWarps * kStep - 1) / (kLinearWarps * kStep);
  }

  static __device__ __forceinline__ int64_t first_element(int64_t step) {
    return (step * kLinearWarps + threadIdx.x / 32) * kStep + threadIdx.x % 4 * 8;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
  }

  static __device__ __forceinline__ void load(Step& step, const WeightRows& w, int64_t index, int64_t c) {
    const int64_t row = w.first + threadIdx.x % 32 / 4, last = w.end - 1;
    const T* upper = static_cast<const T*>(w.data) + min(row, last) * w.stride;
    const T* lower = static_cast<const T*>(w.data) + min(row + 8, last) * w.stride;
    const int64_t k = first_element(index);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t at = k + i * kChunk;
      if constexpr (kWide) {
        step.upper[i] = at < c ? load_stream(upper + at) : make_uint4(0, 0, 0, 0);
        step.lower[i] = at < c ? load_stream(lower + at) : make_uint4(0, 0, 0, 0);
      } else {
        step.upper[i] = load_elements<T, false>(upper, at, c);
        step.lower[i] = load_elements<T, false>(lower, at, c);
      }
    }
  }

  // Eight elements of a token, normed like rms_norm_kernel does it.
  static __device__ __forceinline__ uint4 norm(uint4 x, uint4 weight, float scale) {
    alignas(16) T v[8], w[8];
    *reinterpret_cast<uint4*>(v) = x;
    *reinterpret_cast<uint4*>(w) = weight;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = narrow<T>(widen(v[j]) * scale * widen(w[j]));
    return *reinterpret_cast<const uint4*>(v);
  }

  __device__ __forceinline__ void multiply(const Step& step, const LinearInput& a, int64_t index, const float* scales) {
    const int64_t k = first_element(index);
    const int token = threadIdx.x % 32 / 4;
    if (k - threadIdx.x % 4 * 8 >= a.c) return;  // the whole warp: nothing but zeros follows
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t at = k + i * kChunk;
      uint4 weight;
      if (a.norm_weight) weight = load_elements<T, kWide>(static_cast<const T*>(a.norm_weight), at, a.c);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = tile * kTileTokens + token;
        if (tile * kTileTokens >= a.m) break;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < a.m) {
          x = load_elements<T, kWide>(static_cast<const T*>(a.x) + row * a.x_stride, at, a.c);
          if (a.norm_weight) x = norm(x, weight, scales[row]);
        }
        const uint32_t low_w[4] = {step.upper[i].x, step.lower[i].x, step.upper[i].y, step.lower[i].y};
        const uint32_t low_x[2] = {x.x, x.y};
        mma<T>(sums[tile], low_w, low_x);
        const uint32_t high_w[4] = {step.upper[i].z, step.lower[i].z, step.upper[i].w, step.lower[i].w};
        const uint32_t high_x[2] = {x.z, x.w};
        mma<T>(sums[tile], high_w, high_x);
      }
    }
  }

  // shared: [kSums][kTokens][kSumStride]
  __device__ __forceinline__ void store(float* shared) const {
    const int lane = threadIdx.x % 32;
    float* mine = shared + threadIdx.x / 32 * (kTokens * kSumStride) + lane % 4 * 2 * kSumStride + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mine[(tile * kTileTokens + j % 2) * kSumStride + j / 2 * 8] = sums[tile][j];
  }
};

template <bool kWide>
struct FloatProduct {
  static constexpr int kTokens = kTileTokens;  // more are more passes, mostly over the L2 cache
  static constexpr int kSums = 1;
  static constexpr int kRows = kTileRows / kLinearWarps;
  static constexpr int kFloatStep = 2 * 32 * 4;

  struct Step {
    Vector<float> w[kRows][2];
  };
  float sums[kRows][kTokens];

  static __device__ __forceinline__ int64_t steps(int64_t c) { return (c + kFloatStep - 1) / kFloatStep; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kTokens; ++j) sums[i][j] = 0;
  }

  static __device__ __forceinline__ void load(Step& step, const WeightRows& w, int64_t index, int64_t c) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = min(w.first + int64_t(threadIdx.x / 32 * kRows + i), w.end - 1);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t k = index * kFloatStep + j * 128 + threadIdx.x % 32 * 4;
        step.w[i][j] = load_vector(static_cast<const float*>(w.data) + row * w.stride, k, c, kWide);
      }
    }
  }

  __device__ __forceinline__ void multiply(const Step& step, const LinearInput& a, int64_t index, const float* scales) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t k = index * kFloatStep + j * 128 + threadIdx.x % 32 * 4;
      Vector<float> weight;
      if (a.norm_weight) weight = load_vector(static_cast<const float*>(a.norm_weight), k, a.c, kWide);
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        if (token >= a.m) break;
        Vector<float> x = load_vector(static_cast<const float*>(a.x) + token * a.x_stride, k, a.c, kWide);
        if (a.norm_weight)
#pragma unroll
          for (int e = 0; e < 4; ++e) x.at[e] = x.at[e] * scales[token] * weight.at[e];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][token] = fmaf(step.w[i][j].at[e], x.at[e], sums[i][token]);
      }
    }
  }

  __device__ __forceinline__ void store(float* shared) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const float sum = warp_sum(sums[i][token]);
        if (threadIdx.x % 32 == 0) shared[token * kSumStride + threadIdx.x / 32 * kRows + i] = sum;
      }
  }
};

template <class T, int kTiles, bool kWide>
using Product = std::conditional_t<std::is_same_v<T, float>, FloatProduct<kWide>, HalfProduct<T, kTiles, kWide>>;

// Goes over the tiles blockIdx.x, blockIdx.x + gridDim.x, ... : rows_of(tile) says which rows those are, and
// finish(tile, i, sum) is called by all threads with i = 16 token + row of the tile, sum only valid where token < m.
template <class P, class T, bool kWide, class RowsOf, class Finish>
__device__ __forceinline__ void for_tiles(const LinearInput& a, int64_t tiles, RowsOf rows_of, Finish finish) {
  __shared__ float shared[P::kSums * P::kTokens * kSumStride];
  __shared__ float scales[kFusedNormRows];
  const int64_t steps = P::steps(a.c);
  int64_t tile = blockIdx.x;
  typename P::Step now, next;
  P::load(now, rows_of(tile), 0, a.c);
  if (a.norm_weight) {  // the first weights are on their way
    for (int64_t row = threadIdx.x / 32; row < a.m; row += kLinearWarps) {
      const float scale = inverse_rms(static_cast<const T*>(a.x) + row * a.x_stride, a.c, a.norm_eps, kWide);
      if (threadIdx.x % 32 == 0) scales[row] = scale;
    }
    __syncthreads();
  }
  for (; tile < tiles; tile += gridDim.x) {
    P product;
    product.clear();
    for (int64_t step = 0; step < steps; ++step) {
      const bool last = step + 1 == steps;
      const int64_t following = last ? tile + gridDim.x : tile;
      if (following < tiles) P::load(next, rows_of(following), last ? 0 : step + 1, a.c);
      product.multiply(now, a, step, scales);
      now = next;
    }
    product.store(shared);
    __syncthreads();
    for (int64_t first = 0; first < a.m * kTileRows; first += kLinearThreads) {
      const int i = int(first) + threadIdx.x, place = i / kTileRows * kSumStride + i % kTileRows;
      float sum = 0;
      if (i < a.m * kTileRows) {
        sum = shared[place];
#pragma unroll
        for (int w = 1; w < P::kSums; ++w) sum += shared[w * (P::kTokens * kSumStride) + place];
      }
      finish(tile, i, sum);
    }
    __syncthreads();
  }
}

// call(T{}, tiles of tokens, wide): the instance for m rows, which decides no sum. Unaligned rows are slow, and have one.
template <class Call>
cudaError_t for_product(DType dtype, int64_t m, bool wide, Call call) {
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using Yes = std::true_type;
    using No = std::false_type;
    if constexpr (std::is_same_v<T, float>) {
      return wide ? call(type, std::integral_constant<int, 1>{}, Yes{}) : call(type, std::integral_constant<int, 1>{}, No{});
    } else {
      if (!wide) return call(type, std::integral_constant<int, 8>{}, No{});
      if (m <= 8) return call(type, std::integral_constant<int, 1>{}, Yes{});
      if (m <= 16) return call(type, std::integral_constant<int, 2>{}, Yes{});
      return call(type, std::integral_constant<int, 8>{}, Yes{});
    }
  });
}

// Tokens that one launch takes.
inline int64_t tokens_per_pass(DType dtype) { return dtype == DType::f32 ? kTileTokens : kMaxTokens; }

// Blocks of a launch: at most as many as are resident at once.
inline cudaError_t linear_grid(int64_t tiles, int64_t m, dim3* grid) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *grid = dim3(unsigned(std::min<int64_t>(tiles, int64_t(processors) * (m <= 16 ? 2 : 1))));
  return error;
}

}  // namespace lk::cuda
